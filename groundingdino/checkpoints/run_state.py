"""The state of a training run as one safetensors file: nested dicts, lists, tuples and tensors, without pickle."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from groundingdino.checkpoints.safetensors_file import TensorFile, write_tensors
from groundingdino.runtime.messages import brief

STATE_KEY = "groundingdino.state"
STATE_VERSION_KEY = "groundingdino.state_version"
STATE_VERSION = "3"  # 1: of 0.1.0; 2: never released
PLAIN = (str, int, float, bool, type(None))


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Save e.g. `{"model": ..., "optimizer": ..., "rng": ..., "step": 7}` as one file with a checksum, atomically.

    Args:
        path: file to write or replace; its folder must exist.
        state: dicts (keys: str, int, float, bool, None), lists, tuples, tensors, and plain str/int/float/bool/None,
            nested at will. Subclasses of dict come back as dict.
    Raises:
        ValueError: anything else, named by its place. OSError: full disk and the like; the old file is intact.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    write_tensors(path, tensors, {STATE_VERSION_KEY: STATE_VERSION, STATE_KEY: json.dumps(tree)}, checksum=True)


def load_state(path: str | Path) -> dict[str, Any]:
    """What `save_state` saved: same nesting, same types, tensors on the CPU.

    Raises:
        ValueError: missing, truncated, altered since it was written, or not a training state; says which.
    """
    with TensorFile(path) as file:
        version = file.metadata.get(STATE_VERSION_KEY)
        if version is None:
            raise ValueError(f"{path}: not the state of a training run ({len(file.entries)} tensors without one)")
        if version != STATE_VERSION:
            raise ValueError(
                f"{path}: training state of version {brief(version)}, this groundingdino reads {STATE_VERSION}: "
                "finish that run with the version that began it, or start from its weights with --init-from"
            )
        file.verify_checksum()
        try:
            state = _decode(json.loads(file.metadata[STATE_KEY]), file)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a training state of this program ({brief(repr(error))})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: a training state that is a {type(state).__name__}, not a dict")
    return state


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON-ready form. Containers become {kind: content}, so that no key of a user's is mistaken for a mark of ours."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if type(value) in PLAIN:
        return value
    if isinstance(value, dict):
        for key in value:
            if type(key) not in PLAIN:
                raise ValueError(
                    f"{place} has a key of type {type(key).__name__}, expected str, int, float, bool or None"
                )
        return {"dict": [[key, _encode(item, f"{place}.{key!r}", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    raise ValueError(f"{place} is a {type(value).__name__}, expected dict, list, tuple, tensor or a plain value")


def _decode(value: Any, file: TensorFile) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return file.read(content)
    if kind == "dict":
        return {key: _decode(item, file) for key, item in content}
    items = [_decode(item, file) for item in content]
    return tuple(items) if kind == "tuple" else items
