"""Boxes for words by onnxruntime alone: python example.py photo.jpg "a cat. remote control." (beside model.onnx)

An export lays this file beside the model, ready to be copied from; it needs onnxruntime, numpy, tokenizers and Pillow.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent


def pixels_of(image: Image.Image, height: int, width: int) -> np.ndarray:
    """(1, 3, height, width): the image, its proportions kept, normalised and padded with zeros."""
    ratio = min(height / image.height, width / image.width)
    size = max(int(image.width * ratio), 1), max(int(image.height * ratio), 1)
    rgb = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    pixels = np.zeros((1, 3, height, width), np.float32)
    pixels[0, :, : size[1], : size[0]] = ((rgb - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)).transpose(
        2, 0, 1
    )
    return pixels


def text_of(caption: str) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """The model's inputs for a caption, and the tokens of each name: what lies between two separators."""
    tokens = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(caption)
    count, previous, names = len(tokens.ids), 0, {}
    attends, positions = np.eye(count, dtype=bool), np.zeros(count, np.int64)
    for end in np.flatnonzero(np.isin(tokens.ids, (101, 102, 1012, 1029))):  # [CLS] [SEP] . ?
        if 0 < end < count - 1:
            own = slice(previous + 1, end + 1)
            attends[own, own], positions[own] = True, np.arange(end - previous)
            if previous + 1 < end:
                names[caption[tokens.offsets[previous + 1][0] : tokens.offsets[end - 1][1]]] = [
                    *range(previous + 1, end)
                ]
        previous = int(end)
    ids = np.array(tokens.ids)
    given = {"token_ids": ids, "position_ids": positions, "attends": attends, "valid": np.ones(count, bool)}
    return {name: array[None] for name, array in given.items()}, names


def detect(image: Image.Image, caption: str = "", threshold: float = 0.3) -> list[tuple[str, float, list[float]]]:
    """(name, score, xyxy in pixels) of everything found, best first; the caption's names each end in "."."""
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {"pixels": pixels_of(image, *session.get_inputs()[0].shape[2:])}
    if len(session.get_inputs()) == 1:  # exported for fixed names
        names = json.loads(session.get_modelmeta().custom_metadata_map["names"])
        scores, boxes = session.run(None, inputs)
    else:
        text, tokens = text_of(caption)
        logits, boxes = session.run(None, inputs | text)
        names, chances = list(tokens), 1 / (1 + np.exp(-logits))
        scores = np.stack([chances[:, :, own].mean(axis=2) for own in tokens.values()], axis=2)
    center, half = boxes[0, :, :2], boxes[0, :, 2:] / 2
    corners = np.concatenate([center - half, center + half], axis=1).clip(0, 1) * (image.size * 2)
    found = [(names[c], float(scores[0, q, c]), corners[q].tolist()) for q, c in np.argwhere(scores[0] > threshold)]
    return sorted(found, key=lambda row: -row[1])


if __name__ == "__main__":
    for row in detect(ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB"), " ".join(sys.argv[2:])):
        print(*row)
