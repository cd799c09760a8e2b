"""Detections drawn on a picture, with Pillow alone.

A label keeps its colour from picture to picture. Labels stand on or in their boxes where there is room; where they
would cover each other they become numbers, with a legend below the picture. Sizes follow the picture's.
"""

import colorsys
import zlib
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from groundingdino.structures import Detections

Color = tuple[int, int, int]
Rect = tuple[float, float, float, float]  # left, top, right, bottom

SMALLEST_FONT = 12  # pixels: below this a label cannot be read
FONT_SHARE = 0.022  # of the longer side
COMFORTABLE_SIDE = 400  # pixels of the longer side: a smaller picture has little room for labels
MARGIN = 3  # pixels around a label's text
PAPER: Color = (255, 255, 255)
INK: Color = (20, 20, 20)
LONGEST_NAME = 60  # characters; a longer one is cut
TRUTH_COLOR: Color = (0, 200, 0)


def color_of(name: str) -> Color:
    """A saturated colour that depends on the name alone."""
    code = zlib.crc32(name.encode())
    lightness = 0.35 + 0.3 * (code % 97) / 96
    red, green, blue = colorsys.hls_to_rgb((code % 359) / 359, lightness, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def comfortable_factor(size: tuple[int, int]) -> int:
    """How many times a picture of this size should be enlarged to have room for labels; 1 for most."""
    return max(1, -(-COMFORTABLE_SIDE // max(size)))


def draw_detections(
    image: Image.Image, detections: Detections, *, scores: bool = True, color: Color | None = None, enlarge: int = 1
) -> Image.Image:
    """A copy of the image with boxes and labels, the best on top.

    Args:
        image: RGB, the one that the boxes' pixels belong to.
        detections: boxes, names and scores.
        scores: whether labels say the score.
        color: one for all instead of one for each name.
        enlarge: draw on a picture this many times as large; see `comfortable_factor`.

    Returns:
        RGB; higher and, if need be, wider than `image` where a legend was added.
    """
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in detections.names]
    texts = [
        f"{name} {score:.2f}" if scores else name for name, score in zip(names, detections.scores.tolist(), strict=True)
    ]
    colors = [color or color_of(name) for name in detections.names]
    if enlarge > 1:
        image = image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.BICUBIC)
    return _draw(image, [tuple(box) for box in (detections.boxes * enlarge).tolist()], texts, colors)


def draw_comparison(image: Image.Image, truth: Detections, found: Detections) -> Image.Image:
    """Ground truth (left) beside the prediction (right), each under its title; a small image is enlarged."""
    enlarge = comfortable_factor(image.size)
    left = draw_detections(image, truth, scores=False, color=TRUTH_COLOR, enlarge=enlarge)
    right = draw_detections(image, found, enlarge=enlarge)
    font = _font(_font_size((image.width * enlarge, image.height * enlarge)))
    band = round(font.size * 1.8)
    canvas = Image.new("RGB", (left.width + right.width + band // 2, max(left.height, right.height) + band), PAPER)
    pen = ImageDraw.Draw(canvas)
    for picture, x, title in ((left, 0, "ground truth"), (right, left.width + band // 2, "prediction")):
        pen.text((x + MARGIN, band // 2), title, fill=INK, font=font, anchor="lm")
        canvas.paste(picture, (x, band))
    return canvas


def tile(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """One picture of pictures of any sizes, `columns` in a row, on white. ValueError without any."""
    if not pictures:
        raise ValueError("no picture to tile")
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    gap, width = 6, max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    size = (min(columns, len(pictures)) * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1))
    sheet = Image.new("RGB", size, PAPER)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (gap + column * (width + gap), top))
        top += height + gap
    return sheet


def _draw(image: Image.Image, boxes: Sequence[Rect], texts: Sequence[str], colors: Sequence[Color]) -> Image.Image:
    picture = image.convert("RGB").copy()
    size = _font_size(picture.size)
    font = _font(size)
    pen = ImageDraw.Draw(picture)
    for box, color in reversed(list(zip(boxes, colors, strict=True))):
        pen.rectangle(_inside(box, picture.size), outline=color, width=max(2, size // 6))
    taken: list[Rect] = []
    legend: list[tuple[str, Color]] = []
    for box, text, color in zip(boxes, texts, colors, strict=True):
        place = _free_place(box, _text_size(text, font), picture.size, taken)
        if place is None:
            text, place = _numbered(len(legend) + 1, text, color, box, font, picture.size, taken, legend)
        taken.append(place)
        _label(pen, place, text, color, font)
    return _with_legend(picture, legend, font) if legend else picture


def _numbered(
    number: int,
    text: str,
    color: Color,
    box: Rect,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: list[Rect],
    legend: list[tuple[str, Color]],
) -> tuple[str, Rect]:
    """Move a text into the legend; its number stands on the picture instead, in a free place if there is one."""
    legend.append((f"{number}  {text}", color))
    extent = _text_size(str(number), font)
    place = _free_place(box, extent, size, taken)
    if place is None:
        left, top, _, _ = _inside(box, size)
        left, top = min(left, max(0, size[0] - extent[0])), min(top, max(0, size[1] - extent[1]))
        place = (left, top, left + extent[0], top + extent[1])
    return str(number), place


def _free_place(box: Rect, extent: tuple[float, float], size: tuple[int, int], taken: list[Rect]) -> Rect | None:
    """Where a label of this extent covers no other: above the box, in its upper corners, below it, in the lower."""
    left, top, right, bottom = _inside(box, size)
    width, height = extent
    corners = [
        (left, top - height), (left, top), (right - width, top - height), (right - width, top),
        (left, bottom), (left, bottom - height), (right - width, bottom - height), (right - width, bottom),
    ]  # fmt: skip
    for x, y in corners:
        x = min(max(x, 0), max(0, size[0] - width))  # slide along the border rather than leave the picture
        place = (x, y, x + width, y + height)
        inside = 0 <= y and place[2] <= size[0] and place[3] <= size[1]
        if inside and not any(overlap(place, other) for other in taken):
            return place
    return None


def overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _label(pen: ImageDraw.ImageDraw, place: Rect, text: str, color: Color, font: ImageFont.FreeTypeFont) -> None:
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    middle = (place[1] + place[3]) / 2
    pen.text((place[0] + MARGIN, middle), text, fill=_readable_on(color), font=font, anchor="lm")


def _with_legend(
    picture: Image.Image, legend: Sequence[tuple[str, Color]], font: ImageFont.FreeTypeFont
) -> Image.Image:
    """The picture with one line a number below it, in as many columns as its width allows."""
    height = round(font.size * 1.5)
    column = max(round(_text_size(text, font)[0]) for text, _ in legend) + height
    columns = max(1, picture.width // column)
    rows = -(-len(legend) // columns)
    canvas = Image.new("RGB", (max(picture.width, column), picture.height + rows * height), PAPER)
    canvas.paste(picture, (0, 0))
    pen = ImageDraw.Draw(canvas)
    for index, (text, color) in enumerate(legend):
        x, y = (index // rows) * column, picture.height + (index % rows) * height
        pen.rectangle((x + MARGIN, y + MARGIN, x + height - MARGIN, y + height - MARGIN), fill=color)
        pen.text((x + height + MARGIN, y + height / 2), text, fill=INK, font=font, anchor="lm")
    return canvas


def _inside(box: Rect, size: tuple[int, int]) -> Rect:
    left, right = (min(max(x, 0), size[0] - 1) for x in (box[0], box[2]))
    top, bottom = (min(max(y, 0), size[1] - 1) for y in (box[1], box[3]))
    return left, top, max(left, right), max(top, bottom)


def _readable_on(color: Color) -> Color:
    red, green, blue = color
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


def _text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[float, float]:
    return font.getlength(text) + 2 * MARGIN, font.size * 1.25 + MARGIN


def _font_size(size: tuple[int, int]) -> int:
    return max(SMALLEST_FONT, round(max(size) * FONT_SHARE))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # a scalable font that Pillow brings
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
