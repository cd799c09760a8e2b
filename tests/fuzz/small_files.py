"""A model that is small enough to be read a thousand times a minute, in every form that a model is stored in."""

import dataclasses
import json
import struct
from functools import cache
from pathlib import Path

from training_runs import SMALL

from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.model_file import save_detector
from groundingdino.model import build_detector

Header = dict[str, dict]


@cache
def small_checkpoint(folder: Path) -> Path:
    """A checkpoint of ours in `folder`, and beside it mmdet's (.pth) and transformers' (theirs/)."""
    path = folder / "small.safetensors"
    model = build_detector(dataclasses.replace(SMALL, num_heads=4, ffn_width=64))  # sizes that transformers has, too
    save_detector(path, model, {"groundingdino.scale": "[48, 96]", "groundingdino.source": "{}"})
    convert_file(path, folder / "small.pth", to="mmdet")
    convert_file(path, folder / "theirs", to="huggingface")
    return path


def split(content: bytes) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    """The inverse of `split`; the header may be anything that JSON says."""
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data
