"""Boxes for words by onnxruntime alone: python example.py photo.jpg "a cat. remote control." (beside the .onnx files)

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
GRAPHS = ("model", "image", "text", "detect")  # one, or three that run in this order


def pixels_of(image: Image.Image, size: list[int], dynamic: bool = False) -> np.ndarray:
    """(1, 3, H, W): the image fitted into (height, width), normalised, and padded to it with zeros.

    A dynamic graph takes images of any size, so a tall one is fitted into a tall frame, and none is padded.
    """
    if dynamic:
        size = sorted(size, reverse=image.height > image.width)
    ratio = min(size[0] / image.height, size[1] / image.width)
    width, height = max(int(image.width * ratio), 1), max(int(image.height * ratio), 1)
    rgb = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    pixels = np.zeros((1, 3, height, width) if dynamic else (1, 3, *size), np.float32)
    normalized = (rgb - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
    pixels[0, :, :height, :width] = normalized.transpose(2, 0, 1)
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
                name = caption[tokens.offsets[previous + 1][0] : tokens.offsets[end - 1][1]]
                names[name] = list(range(previous + 1, end))
        previous = int(end)
    ids = np.array(tokens.ids)
    given = {"token_ids": ids, "position_ids": positions, "attends": attends, "valid": np.ones(count, bool)}
    return {name: array[None] for name, array in given.items()}, names


def detect(image: Image.Image, caption: str = "", threshold: float = 0.3) -> list[tuple[str, float, list[float]]]:
    """(name, score, xyxy in pixels) of everything found, best first; the caption's names each end in "."."""
    files = [str(FOLDER / f"{name}.onnx") for name in GRAPHS if (FOLDER / f"{name}.onnx").exists()]
    sessions = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]
    facts = sessions[0].get_modelmeta().custom_metadata_map
    values, tokens = text_of(caption)
    values["pixels"] = pixels_of(image, json.loads(facts["size"]), json.loads(facts["dynamic"]))
    for session in sessions:
        found = session.run(None, {given.name: values[given.name] for given in session.get_inputs()})
        values |= {output.name: array for output, array in zip(session.get_outputs(), found, strict=True)}
    names, scores = list(tokens), values.get("scores")
    if scores is None:
        chances = 1 / (1 + np.exp(-values["logits"]))
        scores = np.stack([chances[:, :, own].mean(axis=2) for own in tokens.values()], axis=2)
    else:  # exported for fixed names
        names = json.loads(facts["names"])
    center, half = values["boxes"][0, :, :2], values["boxes"][0, :, 2:] / 2
    corners = np.concatenate([center - half, center + half], axis=1).clip(0, 1) * (image.size * 2)
    rows = [(names[c], float(scores[0, q, c]), corners[q].tolist()) for q, c in np.argwhere(scores[0] > threshold)]
    return sorted(rows, key=lambda row: -row[1])


if __name__ == "__main__":
    picture = Image.open(sys.argv[1])
    ImageOps.exif_transpose(picture, in_place=True)
    for row in detect(picture.convert("RGB"), " ".join(sys.argv[2:])):
        print(*row)
