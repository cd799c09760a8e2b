"""Whatever is sent to the server: detections, or a refusal in one line; never a 500, never no answer."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fuzz.fuzzing import LONGEST_MESSAGE, ODD_VALUES, damaged, damaged_bytes, run_cases
from golden_cases import tiny_model
from hypothesis import strategies as st
from PIL import Image

from groundingdino.inference.predictor import Predictor

for package in ("fastapi", "fastapi_offline", "prometheus_client", "multipart", "httpx"):
    pytest.importorskip(package)

from fastapi.testclient import TestClient  # noqa: E402

from groundingdino.integrations.server import build_app  # noqa: E402
from groundingdino.integrations.server_limits import Limits  # noqa: E402

CASES = 60
REFUSALS = {400, 404, 405, 413, 422, 503}


def photo(width: int = 24, height: int = 18, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(stream, kind)
    return stream.getvalue()


PHOTOS = [photo(), photo(kind="jpeg"), photo(kind="gif"), photo(1, 1), photo(1, 2000), photo(3000, 1), photo(400, 300)]
ASKS: list[dict[str, Any]] = [
    {"categories": ["a cat", "person"], "threshold": 0.3, "top_k": 5, "nms": 0.5},
    {"referring": "the man on the left", "threshold": 0.0},
    {"phrases": "a man with a flag", "top_k": 3},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(ODD_VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
IMAGES = st.sampled_from(PHOTOS) | st.sampled_from(PHOTOS).flatmap(damaged_bytes) | st.binary(max_size=60)
QUESTIONS = st.one_of(st.sampled_from(ASKS), st.sampled_from(ASKS).flatmap(damaged), JSON)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    limits = Limits(megabytes=0.2, megapixels=0.1, prompt=300, seconds=8)
    app = build_app(Predictor(tiny_model(), scale=(48, 96)), limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def check(answer: Any) -> None:
    """Detections or shapes, or a refusal in one line."""
    if answer.status_code == 200:
        assert answer.json().keys() in ({"detections", "width", "height"}, {"success", "data"})
        return
    assert answer.status_code in REFUSALS, (answer.status_code, answer.text[:LONGEST_MESSAGE])
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and detail.isprintable() and 5 < len(detail) < LONGEST_MESSAGE, detail


def as_json(value: Any) -> bytes:
    """With half surrogates, NaN and whatever else Python writes."""
    return json.dumps(value).encode()


def test_any_json_with_any_image_is_answered(request: pytest.FixtureRequest, client: TestClient) -> None:
    def with_image(question: Any, image: bytes) -> Any:
        coded = base64.b64encode(image).decode()
        return {**question, "image": coded} if isinstance(question, dict) else question

    cases = st.builds(with_image, QUESTIONS, IMAGES) | JSON
    run_cases(request, cases, lambda body: check(client.post("/predict", content=as_json(body))), CASES)


def test_any_bytes_of_any_type_are_answered(request: pytest.FixtureRequest, client: TestClient) -> None:
    good = as_json({**ASKS[0], "image": base64.b64encode(PHOTOS[0]).decode()})
    types = ["application/json", "text/plain", "multipart/form-data; boundary=x", "multipart/form-data", "\xff", ""]
    bodies = damaged_bytes(good, busy=60) | st.binary(max_size=80) | st.just(b"[" * 50_000) | st.just(b"x" * 300_000)
    paths = st.sampled_from(["/predict", "/predict/upload", "/v1/predict", "/health", "/none"])

    def post(case: tuple[str, bytes, str]) -> None:
        path, body, kind = case
        check(client.post(path, content=body, headers={"content-type": kind.encode("latin-1")}))

    run_cases(request, st.tuples(paths, bodies, st.sampled_from(types)), post, CASES)


def test_any_form_is_answered(request: pytest.FixtureRequest, client: TestClient) -> None:
    fields = st.dictionaries(st.sampled_from(["ask", "image", "x"]), QUESTIONS.map(as_json) | st.text(max_size=30))
    files = st.dictionaries(st.sampled_from(["image", "ask", "x"]), IMAGES, max_size=2)

    def post(case: tuple[dict[str, Any], dict[str, bytes]]) -> None:
        data = {key: value if isinstance(value, bytes) else value.encode(errors="replace")
                for key, value in case[0].items()}  # fmt: skip
        check(client.post("/predict/upload", data=data, files=case[1]))

    run_cases(request, st.tuples(fields, files), post, CASES)
    whole = client.build_request("POST", "/predict/upload", files={"image": PHOTOS[0]}, data={"ask": as_json(ASKS[0])})
    kind, body = whole.headers["content-type"], whole.read()
    assert client.post("/predict/upload", content=body, headers={"content-type": kind}).status_code == 200

    def post_damaged(content: bytes) -> None:
        check(client.post("/predict/upload", content=content, headers={"content-type": kind}))

    run_cases(request, damaged_bytes(body), post_damaged, CASES)


def test_anything_from_x_anylabelings_client_is_answered(request: pytest.FixtureRequest, client: TestClient) -> None:
    params = {"text_prompt": "a cat, person", "conf_threshold": 0.3, "iou_threshold": 0.5, "filter_classes": []}
    body = {"model": "tiny", "image": base64.b64encode(PHOTOS[1]).decode(), "params": params}
    run_cases(
        request, damaged(body) | JSON, lambda body: check(client.post("/v1/predict", content=as_json(body))), CASES
    )
