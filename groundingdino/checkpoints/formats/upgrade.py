"""Our own older checkpoints: where the tensors of today's names lie in a file of an earlier version.

Version 1 (groundingdino 0.1.0) kept BERT's queries, keys and values in three tensors and had other names in its layers.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from groundingdino.checkpoints.formats.key_table import KeyTable, thirds, whole_name
from groundingdino.checkpoints.formats.mmdet import QKV

BERT_LAYER = "text_encoder.layers.{i}"
RENAMED = KeyTable(
    {f"{BERT_LAYER}.{part}.{{p}}": f"{BERT_LAYER}.attention.in_proj_{{p}}[{i}]" for i, part in enumerate(QKV)}
    | {
        f"{BERT_LAYER}.attention_out.{{p}}": f"{BERT_LAYER}.attention.out_proj.{{p}}",
        f"{BERT_LAYER}.ffn_in.{{p}}": f"{BERT_LAYER}.ffn.fc1.{{p}}",
        f"{BERT_LAYER}.ffn_out.{{p}}": f"{BERT_LAYER}.ffn.fc2.{{p}}",
    }
)


def stored_names(names: Iterable[str], version: str) -> dict[str, tuple[str, ...]]:
    """{today's name: the names in the file that are to be joined along the first axis}, in the file's order."""
    if version != "1":
        return {name: (name,) for name in names}
    stored = {RENAMED.ours(name) or name: name for name in names}
    whole = dict.fromkeys(whole_name(part) for part in stored)
    return {
        name: (stored[name],) if name in stored else tuple(stored[third] for third in thirds(name) if third in stored)
        for name in whole
    }


def upgrade(tensors: Mapping[str, Tensor], version: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint of ours under today's names."""
    stored = stored_names(tensors, version)
    return {
        name: tensors[parts[0]] if len(parts) == 1 else torch.cat([tensors[part] for part in parts])
        for name, parts in stored.items()
    }
