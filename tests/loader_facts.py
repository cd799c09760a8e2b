"""A data set that says where it is loaded; in a file of its own because loader processes import it."""

import os
import sys

from torch.utils.data import Dataset


class LoaderFacts(Dataset[tuple[int, bool]]):
    """One sample: the parent of the process that loads it, and whether torch_npu is imported there."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> tuple[int, bool]:
        return os.getppid(), "torch_npu" in sys.modules
