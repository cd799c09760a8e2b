"""Tables {their name: our name} with placeholders, read in both directions, and what they leave out.

Queries, keys and values are one tensor here and often three there: `name[0]`, `name[1]` and `name[2]` in a table mean
the thirds of our tensor `name`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from groundingdino.runtime.messages import some

PATTERNS = {"i": r"\d+", "j": r"\d+", "p": "weight|bias"}  # {i}, {j}: an index; {p}: of a layer's two parameters

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_types(tensors: Mapping[str, Tensor]) -> None:
    """ValueError that names weights of types that a checkpoint of ours does not take."""
    wrong = [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in WEIGHT_DTYPES]
    if wrong:
        raise ValueError(f"{len(wrong)} weights are not float64, 32, 16 or bfloat16: {some(wrong)}")


class KeyTable:
    """Renames by templates such as `"neck.convs.{i}.gn.{p}": "neck.projections.{i}.norm.{p}"`.

    Both sides of a row hold the same placeholders (see `PATTERNS`). A name fits at most one row, else ValueError.
    `dropped` has patterns of their names that have no counterpart here, each with the reason.
    """

    def __init__(self, rows: dict[str, str], dropped: Mapping[re.Pattern[str], str] | None = None) -> None:
        self._dropped = dropped or {}
        self._to_ours = _compile(rows.items())
        self._to_theirs = _compile((ours, theirs) for theirs, ours in rows.items())
        self.ours = lru_cache(maxsize=4096)(lambda name: _rename(self._to_ours, name))
        self.theirs = lru_cache(maxsize=4096)(lambda name: _rename(self._to_theirs, name))

    def dropped_because(self, name: str) -> str | None:
        """Why a tensor of theirs has no counterpart here; None where it has one or is unknown."""
        return next((reason for pattern, reason in self._dropped.items() if pattern.fullmatch(name)), None)

    def kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors without those that are dropped. ValueError for 8-bit numbers, which cannot be moved about."""
        kept = {name: tensor for name, tensor in state.items() if self.dropped_because(name) is None}
        check_types({name: t for name, t in kept.items() if t.dtype.is_floating_point and t.dtype.itemsize == 1})
        return kept


def rename(state: Mapping[str, Tensor], target: Callable[[str], str | None], model: str) -> dict[str, Tensor]:
    """The tensors under other names. One that stands under two names is taken once.

    Raises:
        ValueError: names for which `target` knows none: tensors that `model` does not have; two that mean the same and
            differ.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        new = target(name)
        if new is None:
            unknown.append(name)
        elif new in renamed and not torch.equal(renamed[new], tensor):
            raise ValueError(f"two different tensors both mean {new!r}, one of them {name!r}")
        else:
            renamed[new] = tensor
    if unknown:
        raise ValueError(f"{len(unknown)} tensors that {model} does not have: {some(unknown)}")
    return renamed


def _compile(rows: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for source, target in rows:
        parts = re.split(r"\{(\w)\}", source)  # text, placeholder, text, ...
        groups = [f"(?P<{part}>{PATTERNS[part]})" if at % 2 else re.escape(part) for at, part in enumerate(parts)]
        compiled.append((re.compile("".join(groups)), target))
    return compiled


def _rename(rows: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    hits = [target.format(**match.groupdict()) for pattern, target in rows if (match := pattern.fullmatch(name))]
    if len(hits) > 1:
        raise ValueError(f"{name!r} fits several rows of the key table: {hits}")
    return hits[0] if hits else None


def split_levels(name: str, prefix: str, maps: int) -> str:
    """`prefix.3.rest` as `prefix.extra.0.rest` where the backbone has three `maps`; other names as they are."""
    found = re.match(rf"({re.escape(prefix)})\.(\d+)\.(.*)", name)
    if found is None or int(found[2]) < maps:
        return name
    return f"{found[1]}.extra.{int(found[2]) - maps}.{found[3]}"


def plain_levels(name: str, prefix: str, maps: int) -> str:
    """The inverse of `split_levels`."""
    found = re.match(rf"({re.escape(prefix)})\.extra\.(\d+)\.(.*)", name)
    return f"{found[1]}.{maps + int(found[2])}.{found[3]}" if found else name


def whole_name(part: str) -> str:
    """`name` of its third `name[i]`; other names as they are."""
    return part[:-3] if part.endswith(("[0]", "[1]", "[2]")) else part


def thirds(name: str) -> tuple[str, str, str]:
    """The names of a packed tensor's parts: `name[0]`, `name[1]`, `name[2]`."""
    return f"{name}[0]", f"{name}[1]", f"{name}[2]"


def pack(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose thirds are joined into the tensor they are part of; others as they are.

    Raises:
        ValueError: one or two of three are missing, or they are of different sizes or types.
    """
    packed: dict[str, Tensor] = {}
    for part, tensor in parts.items():
        name = whole_name(part)
        if name == part:
            packed[name] = tensor
        elif name not in packed:
            found = [parts[third] for third in thirds(name) if third in parts]
            if len(found) < 3:
                raise ValueError(f"query, key and value of {name!r} are not all there")
            if any(t.dim() == 0 for t in found) or len({(t.shape[1:], t.dtype) for t in found}) > 1:
                forms = [f"{tuple(t.shape)} {t.dtype}" for t in found]
                raise ValueError(f"query, key and value of {name!r} do not go together: {some(forms)}")
            packed[name] = torch.cat(found)
    return packed
