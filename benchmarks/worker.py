"""One side of a comparison in a process of its own.

python -m benchmarks.worker (ours | transformers) FOLDER THREADS

Reads a JSON request a line, {"call": NAME, "inputs": FILE, "result": FILE or null, ...}, runs that method of the side
and answers {"seconds": ..., "peak": MiB, ...}. Tensors travel in safetensors files.
"""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Forget the largest resident set so far (Linux). Loading the weights is not part of what is measured."""
    CLEAR_REFS.write_text("5")


def peak_mib() -> float:
    """Largest resident set since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def serve(side: Any, requests: TextIO, answers: TextIO) -> None:
    """Answer until the requests end."""
    from safetensors.torch import load_file, save_file

    for line in requests:
        request = json.loads(line)
        method = getattr(side, request.pop("call"))
        result_file, inputs_file = request.pop("result"), request.pop("inputs")
        arguments = [] if inputs_file is None else [load_file(inputs_file)]
        reset_peak()
        started = time.perf_counter()
        found = method(*arguments, **request)
        answer = {"seconds": time.perf_counter() - started, "peak": peak_mib()}
        side.forget()
        answer |= {name: value for name, value in found.items() if isinstance(value, (int, float))}
        if result_file is not None:
            save_file({k: v.contiguous() for k, v in found.items() if k not in answer}, result_file)
        del found, arguments
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Build the side that the command line names and serve it."""
    name, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    # One module a side: the process of transformers must not import groundingdino, which sets how memory is allocated.
    if name == "ours":
        from groundingdino.runtime import bootstrap

        bootstrap.wait_briefly()  # as every program of the library does
    side = import_module(f"benchmarks.side_{name}").Side(Path(folder), int(threads))
    serve(side, sys.stdin, answers)
    side.close()


if __name__ == "__main__":
    main()
