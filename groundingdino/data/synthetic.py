"""Rendered scenes with referring expressions: the quick start's data, which `synthetic_refcoco` writes.

A scene holds four or five shapes that differ in shape, color, size and place. An expression names one of them in one of
four forms, each of which needs more than its noun (another object has the same shape):

    attribute   the small red circle
    place       the topmost blue square
    relation    the red circle left of the large square      (without the relation, two objects would answer)
    ordinal     the second circle from the left              (out of three or more)

An expression is kept only if every sensible reading gives the same object: compared coordinates differ by at least
`MARGIN` pixels, "left of" holds in the half plane as well as in the quadrant around its axis, and no other candidate
is even in the half plane. Everything is a pure function of the seed.

A held-out caption is one sentence, as in RefCOCO. A training caption may hold several, each with its own box.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 30),
}
RADII = {"small": (0.078, 0.092), "large": (0.130, 0.150)}  # of the image side; nothing lies between the two words
FORMS = {"attribute": 0.30, "place": 0.22, "relation": 0.28, "ordinal": 0.20}  # how often each is tried first
MARGIN = 6.0  # pixels between compared coordinates
GAP = 3.0  # pixels between two objects, and to the border
OVERSAMPLING = 3  # drawn this much larger, then averaged down: smooth edges

# word -> (axis, sign): the object lies at smaller (-1) or larger (+1) x (axis 0) or y (axis 1, downwards)
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
PLACES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "lowest": (1, 1)}
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
ORDINALS = {"second": 2, "third": 3}

SPLITS = ("train", "val", "testA", "testB")


@dataclass(frozen=True)
class SyntheticConfig:
    """What to render. Splits never share a scene."""

    train_scenes: int = 8000
    heldout_scenes: int = 200  # each of val, testA and testB
    train_sentences: tuple[int, ...] = (1, 4, 6)  # one number is drawn for each scene: sentences in its one caption
    heldout_sentences: int = 3  # of each scene, at most; every one is a caption of its own
    image_size: int = 96  # pixels, square
    seed: int = 0


@dataclass(frozen=True)
class SceneObject:
    """One drawn shape."""

    shape: str
    color: str
    size: str  # "small" | "large"
    rgb: tuple[int, int, int]
    center: tuple[float, float]  # x, y in pixels
    radius: float  # pixels
    angle: float  # radians, clockwise

    def outline(self) -> list[tuple[float, float]]:
        """Corners of the polygon in pixels; empty for a circle."""
        return _polygon(self.shape, self.center, self.radius, self.angle)

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """xyxy in pixels."""
        points = self.outline()
        if not points:
            (x, y), r = self.center, self.radius
            return (x - r, y - r, x + r, y + r)
        xs, ys = zip(*points, strict=True)
        return (min(xs), min(ys), max(xs), max(ys))

    @cached_property
    def middle(self) -> tuple[float, float]:
        """Middle of the box, by which places are compared: x, y in pixels."""
        left, top, right, bottom = self.box
        return ((left + right) / 2, (top + bottom) / 2)


@dataclass(frozen=True)
class Scene:
    """A square picture of some objects that do not touch."""

    size: int  # pixels
    background: tuple[int, int, int]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Expression:
    """A sentence that is true of one object of its scene."""

    caption: str
    target: int  # index into `Scene.objects`
    form: str  # a key of FORMS
    candidates: int  # objects that answer to size, color and shape alone


def _polygon(shape: str, center: tuple[float, float], radius: float, angle: float) -> list[tuple[float, float]]:
    if shape == "circle":
        return []
    corners = {"square": 4, "triangle": 3}[shape]
    # circumradius that gives every shape about the same extent as the circle of that radius
    reach = {"square": 1.25, "triangle": 1.2}[shape] * radius
    turns = [angle + 2 * math.pi * (i + 0.5 * (shape == "square")) / corners for i in range(corners)]
    return [(center[0] + reach * math.sin(turn), center[1] - reach * math.cos(turn)) for turn in turns]


def make_scene(rng: Random, size: int = 96) -> Scene:
    """Draw one scene from `rng`: four or five objects, one shape at least twice. `size` is the image side in pixels."""
    while True:
        count = rng.choice((4, 5))
        main, *others = rng.sample(SHAPES, len(SHAPES))
        repeats = rng.choice((2, 3, 3))
        shapes = [main] * min(repeats, count - 1)
        shapes += [rng.choice(others) for _ in range(count - len(shapes))]
        palette = rng.sample(sorted(COLORS), rng.choice((2, 3)))  # few colors, so that one is often not enough
        objects: list[SceneObject] = []
        for shape in shapes:
            placed = _place(rng, shape, rng.choice(palette), size, objects)
            if placed is None:
                break
            objects.append(placed)
        else:
            rng.shuffle(objects)
            shade = rng.randint(200, 245)
            background = tuple(min(255, shade + rng.randint(-8, 8)) for _ in range(3))
            return Scene(size, background, tuple(objects))  # type: ignore[arg-type]


def _place(rng: Random, shape: str, color: str, size: int, others: Sequence[SceneObject]) -> SceneObject | None:
    """A new object that keeps GAP from the others; None when no free place turns up."""
    name = rng.choice(sorted(RADII))
    radius = rng.uniform(*RADII[name]) * size
    rgb = tuple(max(0, min(255, value + rng.randint(-14, 14))) for value in COLORS[color])
    angle = rng.uniform(-0.15, 0.15)
    for _ in range(40):
        center = (rng.uniform(0, size), rng.uniform(0, size))
        candidate = SceneObject(shape, color, name, rgb, center, radius, angle)  # type: ignore[arg-type]
        left, top, right, bottom = candidate.box
        if min(left, top) < GAP or max(right, bottom) > size - GAP:
            continue
        if all(_apart((left, top, right, bottom), other.box) for other in others):
            return candidate
    return None


def _apart(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[2] + GAP < b[0] or b[2] + GAP < a[0] or a[3] + GAP < b[1] or b[3] + GAP < a[1]


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `scene.size` pixels a side, with smooth edges."""
    canvas = Image.new("RGB", (scene.size * OVERSAMPLING,) * 2, scene.background)
    draw = ImageDraw.Draw(canvas)
    for item in scene.objects:
        outline = item.outline()
        if outline:
            draw.polygon([(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in outline], fill=item.rgb)
        else:
            draw.ellipse([value * OVERSAMPLING for value in item.box], fill=item.rgb)
    return canvas.reduce(OVERSAMPLING)


# ------------------------------------------------------------------------------------------------------- expressions

Description = tuple[str | None, str | None, str]  # size or None, color or None, shape


def _phrase(description: Description) -> str:
    return " ".join(word for word in description if word)


def matches(description: Description, scene: Scene) -> list[int]:
    """Indices of the scene's objects that a description is true of."""
    size, color, shape = description
    return [
        i
        for i, item in enumerate(scene.objects)
        if item.shape == shape and size in (None, item.size) and color in (None, item.color)
    ]


def _descriptions(scene: Scene) -> dict[Description, list[int]]:
    """Every description that is true of some object, with the objects it is true of."""
    found = {}
    for item in scene.objects:
        for size in (None, item.size):
            for color in (None, item.color):
                description = (size, color, item.shape)
                found[description] = matches(description, scene)
    return found


def _words(*words: str) -> str:
    return " ".join(word for word in ("the", *words) if word)


def _sorted_along(scene: Scene, members: Sequence[int], axis: int, sign: int) -> list[int] | None:
    """Members from the side that `sign` names inwards; None if two neighbours are closer than MARGIN."""
    order = sorted(members, key=lambda i: -sign * scene.objects[i].middle[axis])
    places = [scene.objects[i].middle[axis] for i in order]
    clear = all(abs(a - b) >= MARGIN for a, b in zip(places, places[1:], strict=False))
    return order if clear else None


def _by_attribute(scene: Scene, described: dict[Description, list[int]]) -> Iterator[Expression]:
    for description, members in described.items():
        if len(members) == 1 and len(described[(None, None, description[2])]) > 1:
            yield Expression(_words(_phrase(description)), members[0], "attribute", len(members))


def _by_place(scene: Scene, described: dict[Description, list[int]]) -> Iterator[Expression]:
    for description, members in described.items():
        for word, (axis, sign) in PLACES.items():
            order = _sorted_along(scene, members, axis, sign) if len(members) > 1 else None
            if order:
                caption = _words(word, _phrase(description))
                yield Expression(caption, order[0], "place", len(members))


def _by_ordinal(scene: Scene, described: dict[Description, list[int]]) -> Iterator[Expression]:
    for description, members in described.items():
        for side, (axis, sign) in SIDES.items():
            order = _sorted_along(scene, members, axis, sign) if len(members) > 2 else None
            for word, rank in ORDINALS.items():
                if order and rank < len(order):  # the last of a row is a place, not an ordinal
                    caption = _words(word, _phrase(description), f"from the {side}")
                    yield Expression(caption, order[rank - 1], "ordinal", len(members))


def _by_relation(scene: Scene, described: dict[Description, list[int]]) -> Iterator[Expression]:
    anchors = [(description, members[0]) for description, members in described.items() if len(members) == 1]
    for description, members in described.items():
        for anchor_description, anchor in anchors:
            if len(members) < 2 or anchor in members:
                continue
            for word, (axis, sign) in RELATIONS.items():
                target = _only_one_beyond(scene, members, anchor, axis, sign)
                if target is not None:
                    caption = _words(_phrase(description), f"{word} the {_phrase(anchor_description)}")
                    yield Expression(caption, target, "relation", len(members))


def _only_one_beyond(scene: Scene, members: Sequence[int], anchor: int, axis: int, sign: int) -> int | None:
    """The one member beyond the anchor, in its quadrant; None if that is not beyond doubt."""
    origin = scene.objects[anchor].middle
    ahead = {i: sign * (scene.objects[i].middle[axis] - origin[axis]) for i in members}
    beyond = [i for i in members if ahead[i] > 0]
    if len(beyond) != 1 or any(abs(distance) < MARGIN for distance in ahead.values()):
        return None
    sideways = abs(scene.objects[beyond[0]].middle[1 - axis] - origin[1 - axis])
    return beyond[0] if sideways <= ahead[beyond[0]] else None


def all_expressions(scene: Scene) -> dict[str, list[Expression]]:
    """Every unambiguous expression about the scene, by form."""
    described = _descriptions(scene)
    makers = {"attribute": _by_attribute, "place": _by_place, "relation": _by_relation, "ordinal": _by_ordinal}
    return {form: list(make(scene, described)) for form, make in makers.items()}


def sample_expressions(scene: Scene, rng: Random, count: int) -> list[Expression]:
    """At most `count` different expressions, forms drawn with the weights of FORMS as far as the scene offers them."""
    offered = all_expressions(scene)
    chosen: list[Expression] = []
    while len(chosen) < count:
        left = {form: [e for e in found if e not in chosen] for form, found in offered.items()}
        forms = [form for form in FORMS if left[form]]
        if not forms:
            break
        form = rng.choices(forms, [FORMS[f] for f in forms])[0]
        target = rng.choice(sorted({e.target for e in left[form]}))  # by object first: long phrases have more variants
        chosen.append(rng.choice([e for e in left[form] if e.target == target]))
    return chosen


def scenes_of_split(config: SyntheticConfig, split: str) -> Iterator[tuple[Scene, list[Expression]]]:
    """The scenes of one split with their expressions, always the same for the same config.

    ValueError if the split is not one of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    for index in range(config.train_scenes if split == "train" else config.heldout_scenes):
        rng = Random(f"{config.seed}/{split}/{index}")
        scene = make_scene(rng, config.image_size)
        count = rng.choice(config.train_sentences) if split == "train" else config.heldout_sentences
        yield scene, sample_expressions(scene, rng, count)
