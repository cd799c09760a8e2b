"""Many category names in one image: 80 against one sentence, and 1,203 against the passes that they need.

python -m benchmarks categories [--size swin_b] [--height 800] [--width 1333] [--rounds 3] [--threads 2]
"""

import itertools

import tyro

from benchmarks.race import Options, alternate, gib, prepared, row

COCO = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
).split(", ")
MANY = 1203  # as LVIS has


def many_names() -> list[str]:
    """As many names as LVIS has, of about as many tokens each."""
    colors = ("", "red ", "green ", "blue ", "black ", "white ", "old ", "small ", "big ", "wooden ", "round ", "flat ",
              "long ", "wet ", "toy ", "metal ")  # fmt: skip
    return [color + name for color, name in itertools.product(colors, COCO)][:MANY]


def main(options: Options) -> None:
    """Measure and print."""
    with prepared(options, "ours") as ((ours,), inputs):
        split = ours.call("categories", inputs, names=many_names())  # which warms up, too
        one_caption = many_names()[: int(split["first"])]
        measured = alternate(
            options.rounds,
            {
                "sentence": lambda: ours.call("categories", inputs, names=["the man in the red shirt on the left"]),
                "coco": lambda: ours.call("categories", inputs, names=COCO),
                "caption": lambda: ours.call("categories", inputs, names=one_caption),
                "many": lambda: ours.call("categories", inputs, names=many_names()),
                "image": lambda: ours.call("image_half", inputs),
            },
        )
    sentence, coco, caption, many, image = (measured[key] for key in ("sentence", "coco", "caption", "many", "image"))
    ratio, pieces = coco.seconds / sentence.seconds, int(split["pieces"])
    limit = image.seconds + pieces * (caption.seconds - image.seconds)
    print(options.heading(f"one {options.height}x{options.width} image"))
    print(row("one sentence", f"{sentence.seconds:.2f} s, {gib(sentence.peak)}"))
    print(row("image half alone", f"{image.seconds:.2f} s"))
    print(row("80 COCO names", f"{coco.seconds:.2f} s, {gib(coco.peak)}"))
    print(row("80 names against the sentence", f"{ratio:.2f}", "1.25", ratio <= 1.25))
    print(row(f"{len(one_caption)} names, a full caption", f"{caption.seconds:.2f} s, {gib(caption.peak)}"))
    passes = f"{limit:.1f} s: image half and {pieces} passes"
    print(row(f"{MANY:,} names", f"{many.seconds:.1f} s, {gib(many.peak)}", passes, many.seconds <= limit))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
