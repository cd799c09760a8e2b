"""Pictures of answers: the sentence above the image, the annotated box in green, the best answer in red."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

TRUTH, ANSWER = (30, 160, 60), (215, 40, 40)
SIDE = 320  # pixels of a picture's longer side
LINE = 14  # pixels of a line of text
Box = Sequence[float]  # xyxy in pixels of the image


def draw_answer(image: Image.Image, sentence: str, truth: Box, answer: Box, score: float) -> Image.Image:
    """One picture: `image` (any size, RGB) brought to `SIDE`, its boxes, and the sentence with the answer's score."""
    factor = SIDE / max(image.size)
    width, height = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    words = [*_wrap(sentence.strip(), width), f"score {score:.2f}"]
    band = LINE * len(words) + 4
    picture = Image.new("RGB", (width, height + band), "white")
    picture.paste(image.convert("RGB").resize((width, height)), (0, band))
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(words):
        draw.text((2, 2 + number * LINE), line, fill="black", font=ImageFont.load_default(11))
    for box, colour in ((truth, TRUTH), (answer, ANSWER)):
        left, top, right, bottom = (float(value) * factor for value in box)
        draw.rectangle((left, top + band, max(left, right), max(top, bottom) + band), outline=colour, width=2)
    return picture


def _wrap(sentence: str, width: int) -> list[str]:
    font, lines, line = ImageFont.load_default(11), [], ""
    for word in sentence.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width - 4:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]


def grid(pictures: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Pictures of any sizes side by side, `columns` in a row, on white. ValueError without any."""
    if not pictures:
        raise ValueError("no picture to put into a grid")
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    gap, width = 6, max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    size = (min(columns, len(pictures)) * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1))
    sheet = Image.new("RGB", size, "white")
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (gap + column * (width + gap), top))
        top += height + gap
    return sheet
