"""How many, how large: counts of a data set as a table and as a picture."""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from groundingdino.data.formats.record import AnnotatedImage

SMALL, MEDIUM = 32.0, 96.0  # pixels: sides of COCO's small and medium squares
BARS = 30  # categories in the picture


@dataclass
class Counts:
    """Counts of one split."""

    entries: int = 0
    categories: Counter[str] = field(default_factory=Counter)  # boxes per name; of grounding data, none
    images_of: Counter[str] = field(default_factory=Counter)  # images per name
    sides: array = field(default_factory=lambda: array("f"))  # square root of each box's area, in pixels
    shares: array = field(default_factory=lambda: array("f"))  # of the image's
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) of the images
    per_image: Counter[int] = field(default_factory=Counter)  # number of boxes -> images

    def add(self, entry: AnnotatedImage) -> None:
        """Count one entry."""
        self.entries += 1
        self.sizes[entry.width, entry.height] += 1
        self.per_image[len(entry.objects)] += 1
        image_side = (entry.width * entry.height) ** 0.5 or 1.0
        for thing in entry.objects:
            x1, y1, x2, y2 = thing.box
            side = ((x2 - x1) * (y2 - y1)) ** 0.5
            self.sides.append(side)
            self.shares.append(side / image_side)
        if entry.caption is None:
            names = [thing.name for thing in entry.objects]
            self.categories.update(names)
            self.images_of.update(set(names))


def table(counts: Mapping[str, Counts], most: int = 20) -> Iterator[str]:
    """Lines of a table: per split images, boxes and sizes; then boxes per category, the most frequent first."""
    yield f"{'split':<12}{'images':>10}{'boxes':>12}{'per image':>11}{'small':>8}{'medium':>8}{'large':>8}  sizes"
    for split, one in counts.items():
        sides = np.asarray(one.sides)
        share = [
            np.mean(part) if len(sides) else 0
            for part in (sides < SMALL, (sides >= SMALL) & (sides < MEDIUM), sides >= MEDIUM)
        ]
        per_image = len(sides) / max(one.entries, 1)
        yield (
            f"{split:<12}{one.entries:>10,}{len(sides):>12,}{per_image:>11.1f}"
            + "".join(f"{part:>8.0%}" for part in share)
            + f"  {_sizes(one)}"
        )
    names: Counter[str] = Counter()
    for one in counts.values():
        names.update(one.categories)
    if not names:
        return
    yield ""
    yield f"{'category':<32}" + "".join(f"{split:>12}" for split in counts)
    for name, _ in names.most_common(most):
        shown = name if len(name) <= 30 else name[:29] + "…"
        yield f"{shown:<32}" + "".join(f"{one.categories[name]:>12,}" for one in counts.values())
    if len(names) > most:
        rest = {name for name, _ in names.most_common()[most:]}
        sums = (sum(one.categories[name] for name in rest) for one in counts.values())
        yield f"{f'{len(rest):,} others':<32}" + "".join(f"{total:>12,}" for total in sums)


def _sizes(one: Counts) -> str:
    known = [size for size in one.sizes if size != (0, 0)]
    if not known:
        return "unknown"
    if len(known) == 1:
        return f"{known[0][0]}x{known[0][1]}"
    low, high = min(known, key=lambda size: size[0] * size[1]), max(known, key=lambda size: size[0] * size[1])
    return f"{low[0]}x{low[1]} to {high[0]}x{high[1]}"


def draw(counts: Mapping[str, Counts], path: Path) -> None:
    """Save a picture: boxes per category, box sizes, boxes per image, image sizes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    total: Counter[str] = Counter()
    for one in counts.values():
        total.update(one.categories)
    names = [name for name, _ in total.most_common(BARS)]
    for split, one in counts.items():
        label = f"{split} ({one.entries:,} images, {len(one.sides):,} boxes)"
        axes[0, 0].plot(range(len(names)), [one.categories[name] for name in names], marker="o", label=label)
        axes[0, 1].hist(np.asarray(one.shares), bins=np.linspace(0, 1, 41), histtype="step", density=True)
        many = sorted(one.per_image)
        axes[1, 0].plot(many, [one.per_image[number] for number in many], marker=".")
        axes[1, 1].scatter(*zip(*(one.sizes or [(0, 0)]), strict=True), s=8)
    axes[0, 0].set_xticks(range(len(names)), [name[:16] for name in names], rotation=90, fontsize=7)
    axes[0, 0].set(title="boxes per category" + (f" (the {BARS} most frequent)" if len(total) > BARS else ""))
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set(
        title="box sizes", xlabel="side of a box / side of its image (square roots of areas)", ylabel="density"
    )
    axes[1, 0].set(title="boxes per image", xlabel="boxes", ylabel="images")
    axes[1, 1].set(title="image sizes", xlabel="width in pixels", ylabel="height in pixels")
    figure.savefig(path, dpi=100)
