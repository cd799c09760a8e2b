"""Around every request of the server: what it may cost, and what Prometheus learns of it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # bounds of the histogram's buckets
BROKEN_OFF = 499  # as nginx calls it: nobody was there for the answer


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    batch: int = 8  # requests answered together
    queue: int = 64  # POST requests inside at a time; more are answered 503
    seconds: float = 30.0  # from a request's head to its answer; then 503
    megabytes: float = 20.0  # of a request
    megapixels: float = 40.0  # of an image
    prompt: int = 10_000  # characters


class Metrics:
    """What `/metrics` shows, of one server."""

    def __init__(self) -> None:
        self.registry = place = CollectorRegistry()
        self.requests = Counter("groundingdino_requests", "Requests by answer", ["path", "status"], registry=place)
        self.seconds = Histogram(
            "groundingdino_request_seconds", "From a request's head to its answer", ["path"],
            buckets=SECONDS, registry=place,
        )  # fmt: skip
        self.batches = Histogram(
            "groundingdino_batch_size", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32), registry=place
        )
        self.waiting = Gauge("groundingdino_waiting", "Requests that wait for the model", registry=place)


class RequestGuard:
    """ASGI middleware that refuses with 413 and 503 what is too large, too many or too slow, and counts everything."""

    def __init__(self, app: App, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._inside = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start = BROKEN_OFF, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        asks = scope["method"] == "POST"
        self._inside += asks
        try:
            if asks and self._inside > self._limits.queue:
                return await _busy(f"{self._limits.queue} requests are inside, the most that may be")(
                    scope, receive, noted
                )
            async with asyncio.timeout(self._limits.seconds):
                await self._app(scope, self._limited(receive), noted)
        except TimeoutError:
            if status == BROKEN_OFF:  # no answer has begun
                await _busy(f"not answered within {self._limits.seconds:g} s")(scope, receive, noted)
        finally:
            self._inside -= asks
            path = getattr(scope.get("route"), "path", "other")  # not what the client wrote: there is no end of these
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that raises 413 as soon as the body is too large."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limits.megabytes * 1e6:
                raise HTTPException(413, f"a request of over {self._limits.megabytes:g} MB, the most that is read")
            return message

        return limited


def _busy(reason: str) -> JSONResponse:
    return JSONResponse({"detail": f"{reason}: try again"}, 503, {"Retry-After": "1"})
