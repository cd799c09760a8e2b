"""An HTTP server over a predictor: `app = build_app(predictor, Limits())`, for uvicorn or any other ASGI server.

POST /predict takes JSON with the image in base64, POST /predict/upload a form with a file; both answer
{"detections": [{"box": [x1, y1, x2, y2], "score", "label", "name"}], "width", "height"}. GET /health, /metrics
(Prometheus) and /docs (OpenAPI). GET /v1/models and POST /v1/predict are what X-AnyLabeling asks a remote server.
A refusal is {"detail": "what was wrong and what is allowed"}: 413 too large, 422 not understood, 503 too busy.
"""

import asyncio
import base64
import binascii
import contextlib
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import fastapi
from fastapi import Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

import groundingdino
from groundingdino.inference.learned_prompt import SUFFIX, read_learned_prompt
from groundingdino.inference.predictor import DetectionFilter, Predictor
from groundingdino.inference.prompts import Categories, Phrases, Prompt, Referring, resolve
from groundingdino.inference.results import to_json
from groundingdino.inputs.images import load_image, resize_for_inference
from groundingdino.integrations import x_anylabeling
from groundingdino.integrations.batching import Batcher, Question
from groundingdino.integrations.server_limits import BROKEN_OFF, Limits, Metrics, RequestGuard
from groundingdino.runtime.messages import printable
from groundingdino.structures import Detections

WRONG_FIELDS_NAMED = 5  # of one refusal


class Ask(BaseModel):
    """What to find: exactly one of categories, referring and phrases."""

    model_config = ConfigDict(extra="forbid")

    categories: list[str] | None = None
    referring: str | None = None
    phrases: str | None = None
    threshold: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=1)] = None
    nms: Annotated[float | None, Field(ge=0, le=1)] = None

    def prompt(self, learned: Mapping[str, Path]) -> Prompt:
        """ValueError unless there is exactly one. No file is read but those of the learned prompts that are served."""
        given = [field for field in (self.categories, self.referring, self.phrases) if field is not None]
        if len(given) != 1:
            raise ValueError(f"give one of categories, referring and phrases, got {len(given)}")
        if self.categories is not None:
            files = [name for name in self.categories if name.endswith(SUFFIX)]
            if files:
                raise ValueError(f"{files[0]}: files are not read here; of the learned names there are {list(learned)}")
            return Categories([str(learned.get(name, name)) for name in self.categories])
        return Referring(self.referring) if self.referring is not None else Phrases(self.phrases or "")


class AskOfImage(Ask):
    """An image in base64, or a data URI, and what to find in it."""

    image: str


class Found(BaseModel):
    """What was found, best first; boxes in pixels of the image."""

    detections: list[dict[str, Any]]
    width: int
    height: int


class AnyLabelingRequest(BaseModel):
    """What X-AnyLabeling's remote-server client sends."""

    model: str
    image: str
    params: dict[str, Any] = {}


class Service:
    """What the routes share: the predictor behind its queue, and what an image and a prompt may be."""

    def __init__(self, predictor: Predictor, limits: Limits, metrics: Metrics, learned: Mapping[str, Path]) -> None:
        self.predictor, self.limits, self.learned = predictor, limits, learned
        self.batcher = Batcher(predictor, limits.batch, metrics.batches.observe)

    async def find(self, request: Request, content: bytes, ask: Ask) -> tuple[Detections, tuple[int, int]]:
        """The detections and the image's (width, height). HTTPException where the request cannot be answered."""
        try:
            question, size = await asyncio.to_thread(self._open, content, ask)
        except (ValueError, TypeError) as error:
            raise HTTPException(422, str(error)) from error
        try:
            return await self.batcher.answer(question, request.is_disconnected), size
        except ConnectionError as error:
            raise HTTPException(BROKEN_OFF, str(error)) from error

    def _open(self, content: bytes, ask: Ask) -> tuple[Question, tuple[int, int]]:
        length = sum(map(len, ask.categories or ())) + len(ask.referring or "") + len(ask.phrases or "")
        if length > self.limits.prompt:
            raise HTTPException(413, f"a prompt of {length:,} characters: at most {self.limits.prompt:,}")
        predictor = self.predictor
        prompt = resolve(ask.prompt(self.learned), predictor.tokenizer, predictor.model.config.max_tokens)
        image = self._image(content)
        keep = DetectionFilter(ask.threshold, ask.top_k, ask.nms)
        return Question(resize_for_inference(image, predictor.scale), prompt, keep), image.size

    def _image(self, content: bytes) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(content))  # reads the size only
        except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead them into
            raise ValueError("the image is not of a format that Pillow reads, or damaged") from error
        if image.width * image.height > self.limits.megapixels * 1e6:
            size = f"{image.width}x{image.height} pixels"
            raise HTTPException(413, f"an image of {size}: at most {self.limits.megapixels:g} megapixels")
        return load_image(image)


def from_base64(text: str) -> bytes:
    """The bytes of base64 text or a data URI. HTTPException (422) where it is neither."""
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except binascii.Error as error:
        raise HTTPException(422, f"the image is not base64: {error}") from error


def checked(fields: dict[str, Any] | str) -> Ask:
    """The question in JSON or fields. HTTPException (422) says which field is wrong."""
    try:
        return Ask.model_validate_json(fields) if isinstance(fields, str) else Ask.model_validate(fields)
    except ValidationError as error:
        raise HTTPException(422, one_line(error)) from error


def one_line(error: ValidationError | RequestValidationError) -> str:
    """Which fields are wrong, and how."""
    wrong = [(".".join(str(place) for place in one["loc"] if place != "body"), one["msg"]) for one in error.errors()]
    return "; ".join(f"{place or 'request'}: {message}" for place, message in wrong[:WRONG_FIELDS_NAMED])


async def refuse(_: Request, error: Exception) -> JSONResponse:
    """The answer to what was not understood, in one printable line: it may quote the request."""
    status = error.status_code if isinstance(error, StarletteHTTPException) else 422
    reason = one_line(error) if isinstance(error, RequestValidationError) else str(getattr(error, "detail", error))
    return JSONResponse({"detail": printable(reason)}, status, getattr(error, "headers", None))


def build_app(predictor: Predictor, limits: Limits | None = None, learned: Sequence[Path] = ()) -> fastapi.FastAPI:
    """The application. It answers as long as its lifespan runs, and ends with the requests in flight answered.

    `learned` are files of learned prompts: a category that is called as one of them is looked for by it.
    """
    limits, metrics = limits or Limits(), Metrics()
    service = Service(predictor, limits, metrics, {read_learned_prompt(path).name: path for path in learned})
    metrics.waiting.set_function(lambda: len(service.batcher))

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(service.batcher.run())
        yield
        worker.cancel()

    app = FastAPIOffline(title="Grounding DINO", version=groundingdino.__version__, lifespan=lifespan)
    app.add_middleware(RequestGuard, limits=limits, metrics=metrics)
    for kind in (RequestValidationError, StarletteHTTPException):
        app.add_exception_handler(kind, refuse)

    @app.post("/predict")
    async def predict(request: Request, ask: AskOfImage) -> Found:
        """Detections in an image that comes in base64."""
        found, (width, height) = await service.find(request, from_base64(ask.image), ask)
        return Found(detections=to_json(found), width=width, height=height)

    @app.post("/predict/upload")
    async def upload(
        request: Request,
        image: UploadFile,
        ask: Annotated[str, Form(description='JSON, such as {"categories": ["cat"]}')],
    ) -> Found:
        """Detections in an uploaded file; `ask` is the JSON of `/predict` without the image."""
        found, (width, height) = await service.find(request, await image.read(), checked(ask))
        return Found(detections=to_json(found), width=width, height=height)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers, and with which model."""
        return {"status": "ok", "model": predictor.model.config.name, "device": str(predictor.device)}

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counts and times for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """X-AnyLabeling: which models there are."""
        name = predictor.model.config.name
        return {"success": True, "data": {name: x_anylabeling.model_entry(f"Grounding DINO ({name})")}}

    @app.post("/v1/predict")
    async def label(request: Request, asked: AnyLabelingRequest) -> dict[str, Any]:
        """X-AnyLabeling: shapes for an image and a text prompt."""
        if asked.model != predictor.model.config.name:
            raise HTTPException(404, f"no model {asked.model!r} here: {predictor.model.config.name}")
        found, _ = await service.find(request, from_base64(asked.image), checked(x_anylabeling.ask(asked.params)))
        return {"success": True, "data": {"shapes": x_anylabeling.shapes(found), "description": ""}}

    return app
