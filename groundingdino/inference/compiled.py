"""A model whose parts torch compiles, each at its first call and once for images and captions of all sizes.

Compiling takes minutes; what it yields is kept in torch's cache on disk for the next process. A CPU needs a C++
compiler, a GPU Triton, which torch's Linux wheels bring.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from groundingdino.model.detector import GroundingDINO

DEVICES = ("cpu", "cuda")  # for which torch brings a compiler
_one_at_a_time = threading.Lock()  # torch's settings are the process's


class CompiledDetector:
    """The parts of a model under the names that they have there.

    Raises:
        ValueError: torch brings no compiler for the model's device.
    """

    def __init__(self, model: GroundingDINO) -> None:
        device = model.level_embedding.device.type
        if device not in DEVICES:
            raise ValueError(f"compile=True works on {' and '.join(DEVICES)}, not on {device}: leave it out")
        self.encode_image = _Compiled(model.encode_image)
        self.encode_text = _Compiled(model.encode_text)
        self.detect = _Compiled(model.detect)


class _Compiled:
    """A method, compiled at its first call. A copy, and what comes out of a pickle, compile anew."""

    def __init__(self, method: Callable) -> None:
        self._method = method
        self._run: Callable | None = None

    def __reduce__(self) -> tuple:
        return _Compiled, (self._method,)

    def __call__(self, *inputs: Any) -> Any:
        """What the method returns.

        Raises:
            RuntimeError: the compiler is missing, or failed.
        """
        from torch._dynamo.exc import BackendCompilerFailed  # a second to import

        with _one_at_a_time, _graphs_for_all_sizes():
            if self._run is None:
                self._run = torch.compile(self._method, fullgraph=True, dynamic=True)
            try:
                return self._run(*inputs)
            except BackendCompilerFailed as error:
                why = " ".join(str(error.inner_exception).split())
                raise RuntimeError(f"the model could not be compiled, leave out compile=True: {why:.300}") from error


@contextmanager
def _graphs_for_all_sizes() -> Iterator[None]:
    """Settings of torch 2.9 under which a graph assumes nothing about the sizes that it was first seen with."""
    import torch._dynamo.config
    import torch.fx.experimental._config

    sizes = torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        use_duck_shape=False,  # two sides may be equally long
        backed_size_oblivious=True,  # a batch may be one image, and a map one window
    )
    # The compiled form of the guards took a square image's graph for other images, too.
    guards = torch._dynamo.config.patch(enable_cpp_symbolic_shape_guards=False)
    with sizes, guards, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        yield
