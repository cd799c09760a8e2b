"""A trained BERT in transformers' layout, for the text encoder of a model that is trained from nothing."""

from pathlib import Path
from typing import Annotated

import msgspec
from torch import Tensor

from groundingdino.checkpoints.formats import mmdet
from groundingdino.checkpoints.formats.foreign_weights import is_safetensors, weight_files
from groundingdino.checkpoints.formats.key_table import KeyTable, pack
from groundingdino.checkpoints.formats.pytorch_file import read_pytorch_file
from groundingdino.checkpoints.safetensors_file import TensorFile
from groundingdino.config import TextConfig
from groundingdino.inputs.text import VOCABULARY_FILE
from groundingdino.runtime.files import open_file
from groundingdino.runtime.messages import some

TABLE = KeyTable(mmdet.bert_rows("bert"))
UNUSED = ("pooler.", "cls.", "embeddings.position_ids", "embeddings.token_type_ids")  # beginnings of names
CONFIG_LIMIT = 1_000_000  # bytes
Size = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class _Config(msgspec.Struct):
    """config.json, as far as it decides what our encoder computes."""

    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    vocab_size: Size
    max_position_embeddings: Size = 512
    model_type: str = "bert"
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    layer_norm_eps: float = 1e-12


EXPECTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": 1e-12}


def read_bert(folder: Path) -> tuple[TextConfig, dict[str, Tensor]]:
    """The sizes of a BERT and its tensors under the names of `TextEncoder`, without a projection.

    Args:
        folder: with config.json, vocab.txt, and model.safetensors or pytorch_model.bin.
    Raises:
        ValueError: one line that says what is missing or what differs from the BERT that our text encoder is.
    """
    config = _read_config(folder)
    vocabulary = folder / "vocab.txt"
    if not vocabulary.is_file() or vocabulary.read_bytes().split() != VOCABULARY_FILE.read_bytes().split():
        raise ValueError(f"{vocabulary}: not bert-base-uncased's vocabulary, which captions are tokenised with")
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        state |= _tensors(file)
    state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    names = {name: TABLE.ours(f"bert.{name}") for name in state if not name.startswith(UNUSED)}
    unknown = [name for name, ours in names.items() if ours is None]
    if unknown or not names:
        raise ValueError(f"{folder}: tensors that a BERT does not have: {some(unknown) or 'no others'}")
    packed = pack({str(ours): state[name].float() for name, ours in names.items()})
    text = TextConfig(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
    )
    return text, {name.removeprefix("text_encoder."): tensor for name, tensor in packed.items()}


def _read_config(folder: Path) -> _Config:
    path = folder / "config.json"
    with open_file(path) as file:
        content = file.read(CONFIG_LIMIT)
    try:
        config = msgspec.json.decode(content, type=_Config)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not the config of a BERT ({error})") from error
    for name, value in EXPECTED.items():
        if getattr(config, name) != value:
            raise ValueError(f"{path}: {name} is {getattr(config, name)!r}, our text encoder has {value!r}")
    return config


def _tensors(file: Path) -> dict[str, Tensor]:
    if is_safetensors(file):
        with TensorFile(file) as opened:
            return {name: opened.read(name) for name in opened.entries}
    content = read_pytorch_file(file).content
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{file}: not a dict of tensors")
    return {str(name): tensor for name, tensor in content.items()}
