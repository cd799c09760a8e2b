"""Answer over HTTP; needs the extra: pip install "groundingdino[serve]".

    groundingdino serve --checkpoint model.safetensors
    curl -F image=@photo.jpg -F 'ask={"categories": ["cat", "dog"]}' http://127.0.0.1:8000/predict/upload

/docs describes every route, /metrics counts for Prometheus. SIGTERM and Ctrl-C: requests in flight are answered first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from groundingdino.cli import console, loading
from groundingdino.cli.demo import check_address

PACKAGES = ("fastapi", "uvicorn", "multipart", "prometheus_client", "fastapi_offline")


@dataclass(frozen=True)
class Arguments:
    """Which model to serve, where, and what a request may cost."""

    checkpoint: Path | None = None
    """default: the only .safetensors in this folder, weights/ or checkpoints/"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 lets other machines in"""
    port: int = 8000
    """port to listen at"""
    device: str = "auto"
    """cpu, cuda, cuda:1, npu, ..."""
    precision: loading.Precision = "fp32"
    """of weights and arithmetic; -mixed keeps the weights in float32"""
    learned: tuple[Path, ...] = ()
    """files of learned prompts; a category that is called as one of them is looked for by it"""
    batch: int = 8
    """most requests answered together; 1: an answer depends on its image only"""
    queue: int = 64
    """most requests inside at a time; more are answered 503"""
    seconds: float = 30.0
    """most time of a request; then it is answered 503"""
    megabytes: float = 20.0
    """most of a request"""
    megapixels: float = 40.0
    """most of an image"""
    prompt: int = 10_000
    """most characters of a prompt"""


def serve(arguments: Arguments) -> int:
    """Serve until stopped. The exit code."""
    for name in ("batch", "queue", "seconds", "megabytes", "megapixels", "prompt"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name} {getattr(arguments, name)}: more than 0")
    check_address(arguments.host, arguments.port)
    checkpoint = loading.find_checkpoint(arguments.checkpoint)
    console.require(PACKAGES, "serve")
    import uvicorn

    from groundingdino.integrations.server import build_app
    from groundingdino.integrations.server_limits import Limits

    predictor = loading.load_predictor(checkpoint, arguments.device, arguments.precision)
    limits = Limits(**{name: getattr(arguments, name) for name in Limits.__dataclass_fields__})
    uvicorn.run(
        build_app(predictor, limits, arguments.learned),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=round(arguments.seconds) + 1,
    )
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino serve") -> int:
    """The exit code."""
    return console.run(prog, lambda: serve(console.parse(Arguments, arguments, prog, description=__doc__)))
