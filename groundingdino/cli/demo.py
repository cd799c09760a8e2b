"""Serve a page to try a model in the browser; needs the extra: pip install "groundingdino[demo]".

    groundingdino demo --checkpoint model.safetensors --samples photos/

Ctrl-C stops it.
"""

import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from groundingdino.cli import console, loading


@dataclass(frozen=True)
class Arguments:
    """Which model to serve, and where."""

    checkpoint: Path | None = None
    """default: the only .safetensors in this folder, weights/ or checkpoints/"""
    samples: Path | None = None
    """folder of images to choose from"""
    names: str | None = None
    """names to begin with, with their prompts: names.yaml, names.txt, coco, lvis, ..."""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 lets other machines in"""
    port: int = 7860
    """port to listen at"""
    device: str = "auto"
    """cpu, cuda, cuda:1, npu, ..."""
    precision: loading.Precision = "fp32"
    """of weights and arithmetic; -mixed keeps the weights in float32"""


def check_address(host: str, port: int) -> None:
    """ValueError where nothing can listen there."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: ports go from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot listen at {host}:{port} ({error}): choose another --port or --host") from error


def serve(arguments: Arguments) -> int:
    """Serve until interrupted. The exit code."""
    check_address(arguments.host, arguments.port)
    checkpoint = loading.find_checkpoint(arguments.checkpoint)
    if arguments.samples is not None and not arguments.samples.is_dir():
        raise ValueError(f"--samples {arguments.samples} is not a folder")
    console.require(["gradio"], "demo")
    from groundingdino.cli.demo_page import LARGEST_UPLOAD, build_page
    from groundingdino.inference.vocabulary import read_vocabulary

    predictor = loading.load_predictor(checkpoint, arguments.device, arguments.precision)
    vocabulary = None if arguments.names is None else read_vocabulary(arguments.names)
    page = build_page(predictor, arguments.samples, vocabulary)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: files are removed
    page.launch(server_name=arguments.host, server_port=arguments.port, max_file_size=LARGEST_UPLOAD)
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino demo") -> int:
    """The exit code."""
    return console.run(prog, lambda: serve(console.parse(Arguments, arguments, prog, description=__doc__)))
