"""`groundingdino serve` under load on loopback: requests per second and latency at 1, 4 and 16 clients.

    python -m benchmarks serve [--seconds 20] [--checkpoint model.safetensors]

Each client sends its next request as soon as it has its answer. The server is a program of its own on the same
machine, so its clients take some of its time.
"""

import asyncio
import base64
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import tyro
from PIL import Image

from benchmarks.race import ROOT
from groundingdino.checkpoints.model_file import SCALE_KEY, save_detector
from groundingdino.config import quickstart_model
from groundingdino.model import build_detector

CLIENTS = (1, 4, 16)
PORT = 8123
SIDE = 96  # pixels of the quick start's images


def main(seconds: float = 20.0, checkpoint: Path | None = None, device: str = "auto", batch: int = 8) -> None:
    """Print a table.

    Args:
        seconds: of each load, after a second to warm up.
        checkpoint: default is the quick start's model (6.5 M parameters, images of 96 pixels) with random weights.
        device: of the server.
        batch: most requests that the server answers together.
    """
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = Path(folder) / "quickstart.safetensors"
            save_detector(checkpoint, build_detector(quickstart_model()), {SCALE_KEY: json.dumps([SIDE, SIDE])})
        options = ["--checkpoint", str(checkpoint), "--port", str(PORT), "--device", device, "--batch", str(batch)]
        server = subprocess.Popen([sys.executable, "-m", "groundingdino", "serve", *options], cwd=ROOT)
        try:
            asyncio.run(_wait())
            print("\n| clients | requests/s | median | 99th | lost |\n|---|---|---|---|---|")
            for clients in CLIENTS:
                asyncio.run(_load(clients, 1.0))
                times, lost, took = asyncio.run(_load(clients, seconds))
                middle, late = statistics.median(times), statistics.quantiles(times, n=100)[98]
                rate = len(times) / took
                print(
                    f"| {clients} | {rate:.1f} | {1000 * middle:.0f} ms | {1000 * late:.0f} ms | {lost} |", flush=True
                )
        finally:
            server.terminate()
            server.wait()


async def _wait() -> None:
    async with httpx.AsyncClient() as client:
        while True:
            try:
                await client.get(f"http://127.0.0.1:{PORT}/health")
                return
            except httpx.ConnectError:
                await asyncio.sleep(0.1)


async def _load(clients: int, seconds: float) -> tuple[list[float], int, float]:
    """Seconds of each answered request, the number of others, and the seconds of it all."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "jpeg")
    ask = {"image": base64.b64encode(file.getvalue()).decode(), "categories": ["red circle", "blue square"]}
    times: list[float] = []
    lost = 0
    begin = time.perf_counter()

    async def one_client() -> None:
        nonlocal lost
        async with httpx.AsyncClient(timeout=60) as client:
            while time.perf_counter() - begin < seconds:
                start = time.perf_counter()
                answer = await client.post(f"http://127.0.0.1:{PORT}/predict", json=ask)
                times.append(time.perf_counter() - start)
                lost += answer.status_code != 200

    await asyncio.gather(*(one_client() for _ in range(clients)))
    return times, lost, time.perf_counter() - begin


if __name__ == "__main__":
    tyro.cli(main)
