"""`groundingdino.util.utils` of IDEA-Research/GroundingDINO, as far as other programs call it."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groundingdino.inputs.text import default_tokenizer


class Tokenizer:
    """What IDEA's clients do with `model.tokenizer`: token ids of a caption, and words of token ids."""

    def __call__(self, caption: str) -> dict[str, list[int]]:
        """{"input_ids": token ids, [CLS] and [SEP] included}."""
        return {"input_ids": list(default_tokenizer().encode(caption).token_ids)}

    def decode(self, token_ids: Sequence[int]) -> str:
        """The words of token ids, special tokens left out."""
        return default_tokenizer().decode(token_ids)


def clean_state_dict(state_dict: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """The tensors without `module.` in front of their names."""
    return OrderedDict((name.removeprefix("module."), tensor) for name, tensor in state_dict.items())


def get_phrases_from_posmap(
    posmap: Tensor, tokenized: Mapping[str, Any], tokenizer: Any, left_idx: int = 0, right_idx: int = 255
) -> str:
    """The words of the tokens that are True in `posmap` (T,), but for those up to `left_idx` and from `right_idx`."""
    if posmap.dim() != 1:
        raise NotImplementedError(f"posmap has {posmap.dim()} axes, expected one")
    place = torch.arange(len(posmap), device=posmap.device)
    chosen = (posmap.bool() & (place > left_idx) & (place < right_idx)).nonzero().flatten().tolist()
    return tokenizer.decode([tokenized["input_ids"][index] for index in chosen])
