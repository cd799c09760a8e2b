"""A name whose token features were learned from examples (`training.learn_prompt`), and its file of a few kilobytes.

Wherever a list of categories or a vocabulary has a name, "apple.prompt" may stand: the name of such a file. The caption
holds the name's words as ever; only what the text half says of its tokens is replaced.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from groundingdino.checkpoints.safetensors_file import TensorFile, write_tensors

SUFFIX = ".prompt"
TOKENS, NAME, MODEL = "tokens", "groundingdino.name", "groundingdino.model"


@dataclass(frozen=True, eq=False)
class LearnedPrompt:
    """A name and what stands for its tokens."""

    name: str
    tokens: Tensor  # (T, D) float32 on the CPU, one row for each of the name's tokens
    model: str  # `ModelConfig.name` of the model that it was learned with; other weights of that size do not fit

    def save(self, path: str | Path) -> None:
        """Write the file. ValueError unless it ends in ".prompt"; OSError as `files.atomic_file`."""
        if Path(path).suffix != SUFFIX:
            raise ValueError(f"{path}: the name of a learned prompt's file ends in {SUFFIX}")
        write_tensors(path, {TOKENS: self.tokens}, {NAME: self.name, MODEL: self.model})


def read_learned_prompt(path: str | Path) -> LearnedPrompt:
    """What `LearnedPrompt.save` wrote. ValueError in one line for any other file."""
    with TensorFile(path) as file:
        known = file.metadata.keys() >= {NAME, MODEL} and file.entries.keys() == {TOKENS}
        if not known or len(file.entries[TOKENS].shape) != 2:
            raise ValueError(f"{path}: no learned prompt of groundingdino")
        return LearnedPrompt(file.metadata[NAME], file.read(TOKENS).float(), file.metadata[MODEL])
