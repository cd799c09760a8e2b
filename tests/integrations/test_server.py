"""The HTTP server: what it answers, what it refuses and how, and that nobody loses an answer."""

import base64
import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from PIL import Image
from training_runs import environment, free_port

from groundingdino.checkpoints.model_file import SCALE_KEY, save_detector
from groundingdino.inference.learned_prompt import LearnedPrompt
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.results import to_json

for package in ("fastapi", "fastapi_offline", "prometheus_client", "multipart", "httpx"):
    pytest.importorskip(package)

from fastapi.testclient import TestClient  # noqa: E402

from groundingdino.integrations import batching  # noqa: E402
from groundingdino.integrations.server import build_app  # noqa: E402
from groundingdino.integrations.server_limits import Limits  # noqa: E402

NAMES = ["a cat", "person"]
SAME = 1e-5  # other batch shapes, other order of sums


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_model(), scale=(96, 160))


@pytest.fixture(scope="module")
def photo(golden):
    return (golden / "photos/train2014/COCO_train2014_000000000001.jpg").read_bytes()


@pytest.fixture(scope="module")
def client(predictor):
    with TestClient(build_app(predictor, Limits(batch=4))) as client:
        yield client


def question(photo, **ask):
    return {"image": base64.b64encode(photo).decode(), **(ask or {"categories": NAMES, "threshold": 0.02})}


def wanted(predictor, photo, **options):
    return to_json(predictor.predict(Image.open(io.BytesIO(photo)), **options))


def counted(client, name):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_base64_data_uri_and_upload_answer_what_the_predictor_answers(client, predictor, photo):
    expected = wanted(predictor, photo, categories=NAMES, threshold=0.02)
    assert len(expected) > 3
    size = Image.open(io.BytesIO(photo)).size
    asked = question(photo)
    answers = [
        client.post("/predict", json=asked),
        client.post("/predict", json=asked | {"image": f"data:image/jpeg;base64,{asked['image']}"}),
        client.post(
            "/predict/upload",
            files={"image": photo},
            data={"ask": '{"categories": ["a cat", "person"], "threshold": 0.02}'},
        ),
    ]
    for answer in answers:
        assert answer.status_code == 200
        assert answer.json() == {"detections": expected, "width": size[0], "height": size[1]}


def test_referring_phrases_and_options_mean_what_they_mean_in_predict(client, predictor, photo):
    for ask in ({"referring": "the man on the left"}, {"phrases": "a man with a flag", "threshold": 0.0, "top_k": 3},
                {"categories": NAMES, "threshold": 0.0, "nms": 0.5}):  # fmt: skip
        answer = client.post("/predict", json=question(photo, **ask)).json()["detections"]
        assert json.loads(json.dumps(wanted(predictor, photo, **ask))) == answer and answer


def test_x_anylabelings_client_finds_the_model_and_gets_shapes(client, predictor, photo):
    (name, entry), *others = client.get("/v1/models").json()["data"].items()
    assert name == "tiny" and not others and entry["batch_processing_mode"] == "text_prompt"
    assert {"edit_text", "button_send", "edit_conf"} <= {widget["name"] for widget in entry["widgets"]}
    image = f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"
    params = {"text_prompt": "a cat, person", "conf_threshold": 0.02, "iou_threshold": 0.0, "epsilon_factor": 0.001}
    answer = client.post("/v1/predict", json={"model": name, "image": image, "params": params}).json()
    expected = wanted(predictor, photo, categories=NAMES, threshold=0.02)
    assert answer["success"] and [s["label"] for s in answer["data"]["shapes"]] == [row["name"] for row in expected]
    x1, y1, x2, y2 = expected[0]["box"]
    assert answer["data"]["shapes"][0]["points"][2] == pytest.approx([x2, y2], abs=0.01)
    assert client.post("/v1/predict", json={"model": "x", "image": image, "params": params}).status_code == 404
    empty = client.post("/v1/predict", json={"model": name, "image": image})
    assert empty.status_code == 422 and "no categories" in empty.json()["detail"]


def test_pages_of_health_metrics_and_openapi(client):
    assert client.get("/health").json() == {"status": "ok", "model": "tiny", "device": "cpu"}
    assert {"/predict", "/predict/upload", "/v1/predict", "/health"} <= client.get("/openapi.json").json()[
        "paths"
    ].keys()
    page = client.get("/docs").text
    assert "swagger" in page and "https://" not in page  # works without internet access
    client.get("/no/such/path")
    text = client.get("/metrics").text
    assert 'groundingdino_requests_total{path="other",status="404"}' in text and "/no/such" not in text
    assert 'groundingdino_request_seconds_bucket{le="0.5",path="/health"}' in text


def test_what_cannot_be_answered_is_refused_in_one_clear_line(predictor, photo):
    def tall_image():
        file = io.BytesIO()
        Image.new("L", (2000, 1000)).save(file, "png")
        return file.getvalue()

    limits = Limits(megabytes=0.1, megapixels=1, prompt=50)
    with TestClient(build_app(predictor, limits)) as client:
        for status, message, ask in [
            (422, "not base64", {"image": "?", "categories": NAMES}),
            (422, "not of a format that Pillow reads", question(b"no image")),
            (422, "not a readable image", question(photo[:2000])),
            (413, "2000x1000 pixels: at most 1 megapixels", question(tall_image())),
            (413, "a prompt of 60 characters: at most 50", question(photo, categories=["x" * 60])),
            (413, "a request of over 0.1 MB", question(b"x" * 200_000)),
            (422, "give one of categories, referring and phrases, got 0", question(photo, threshold=0.5)),
            (422, "referring and phrases, got 2", question(photo, categories=["a"], referring="b")),
            (422, "category '(a)' is empty", question(photo, categories=["(a)"])),
            (422, "less than or equal to 1", question(photo, categories=["a"], threshold=2)),
            (422, "Extra inputs", question(photo, categories=["a"], treshold=0.2)),
        ]:  # fmt: skip
            answer = client.post("/predict", json=ask)
            assert answer.status_code == status, answer.text
            assert message in answer.json()["detail"]
        too_large = client.post("/predict/upload", files={"image": b"x" * 200_000}, data={"ask": "{}"})
        assert too_large.status_code == 413 and "over 0.1 MB" in too_large.json()["detail"]
        wrong = client.post("/predict/upload", files={"image": photo}, data={"ask": '{"top_k": 0}'})
        assert wrong.status_code == 422 and "top_k: Input should be greater" in wrong.json()["detail"]


def test_a_learned_prompt_is_served_by_its_name_and_no_other_file_is_read(predictor, photo, tmp_path):
    path = tmp_path / "cat.prompt"
    LearnedPrompt("cat", torch.full((1, 256), 0.5), "tiny").save(path)
    with TestClient(build_app(predictor, learned=[path])) as client:
        answer = client.post("/predict", json=question(photo, categories=["cat"], threshold=0.0)).json()
        assert answer["detections"] == wanted(predictor, photo, categories=[str(path)], threshold=0.0)
        assert answer["detections"] != wanted(predictor, photo, categories=["cat"], threshold=0.0)
        refused = client.post("/predict", json=question(photo, categories=[str(path)]))
        assert refused.status_code == 422 and "files are not read here" in refused.json()["detail"]


@pytest.fixture
def held(monkeypatch):
    """The model waits for this event; it is set when the test ends."""
    go, answer_together = threading.Event(), batching.answer_together

    def wait_and_answer(predictor, questions):
        assert go.wait(30)
        return answer_together(predictor, questions)

    monkeypatch.setattr(batching, "answer_together", wait_and_answer)
    yield go
    go.set()


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        time.sleep(0.01)


def test_requests_that_wait_run_together_and_each_gets_its_own_answer(predictor, photo, held):
    prompts = [["a cat"], ["person"], ["a cat", "flag"], ["man"]]
    with TestClient(build_app(predictor, Limits(batch=4))) as client, ThreadPoolExecutor() as threads:

        def ask(names):
            return threads.submit(client.post, "/predict", json=question(photo, categories=names, threshold=0.01))

        first = ask(["dog"])
        wait_until(lambda: counted(client, "groundingdino_batch_size_sum") == 1)  # it is with the model
        others = [ask(names) for names in prompts]
        wait_until(lambda: counted(client, "groundingdino_waiting") == 4)
        held.set()
        assert first.result().status_code == 200
        for names, answer in zip(prompts, others, strict=True):
            expected = wanted(predictor, photo, categories=names, threshold=0.01)
            rows = answer.result().json()["detections"]
            assert [row["name"] for row in rows] == [row["name"] for row in expected]
            np.testing.assert_allclose([row["score"] for row in rows], [row["score"] for row in expected], atol=SAME)
        assert counted(client, 'groundingdino_batch_size_bucket{le="1.0"}') == 1
        assert (
            counted(client, "groundingdino_batch_size_sum") == 5
            and counted(client, "groundingdino_batch_size_count") == 2
        )


def test_a_full_queue_and_a_slow_model_are_503_and_the_others_are_answered(predictor, photo, held):
    app = build_app(predictor, Limits(batch=1, queue=2, seconds=3))
    with TestClient(app) as client, ThreadPoolExecutor() as threads:
        inside = [threads.submit(client.post, "/predict", json=question(photo)) for _ in range(2)]
        wait_until(lambda: counted(client, "groundingdino_waiting") == 1)
        refused = client.post("/predict", json=question(photo))
        assert refused.status_code == 503 and "2 requests are inside" in refused.json()["detail"]
        assert refused.headers["Retry-After"] == "1" and client.get("/health").status_code == 200
        late = [answer.result() for answer in inside]
        assert [answer.status_code for answer in late] == [503, 503]
        assert "not answered within 3 s" in late[0].json()["detail"]
        held.set()
        assert client.post("/predict", json=question(photo)).status_code == 200


def test_a_request_that_breaks_a_batch_fails_alone(predictor, photo, held, monkeypatch):
    answer_together = batching.answer_together

    def no_memory_for_dogs(predictor, questions):
        found = answer_together(predictor, questions)
        if any("dog" in one.prompt.names for one in questions):
            raise MemoryError("too large")
        return found

    monkeypatch.setattr(batching, "answer_together", no_memory_for_dogs)
    app = build_app(predictor, Limits(batch=3))
    with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor() as threads:
        names = [["man"], ["a cat"], ["dog"], ["person"]]
        answers = []
        for number, own in enumerate(names):
            answers.append(threads.submit(client.post, "/predict", json=question(photo, categories=own)))
            wait_until(lambda: counted(client, "groundingdino_batch_size_sum") == 1)  # the first is with the model
            wait_until(lambda n=number: counted(client, "groundingdino_waiting") == n)
        held.set()
        assert [answer.result().status_code for answer in answers] == [200, 200, 500, 200]


@contextlib.contextmanager
def serving(folder):
    """`groundingdino serve` as a program: the process and its port."""
    save_detector(folder / "tiny.safetensors", tiny_model(), {SCALE_KEY: "[96, 160]"})
    port = free_port()
    command = [sys.executable, "-m", "groundingdino", "serve", "--checkpoint", str(folder / "tiny.safetensors")]
    process = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], env=environment())
    try:
        wait_until(lambda: process.poll() is not None or is_listening(port), seconds=100)
        assert process.poll() is None
        yield process, port
    finally:
        process.kill()
        process.wait()


def is_listening(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def raw_request(photo):
    """Head and body. The server says "100 Continue" when it begins to read the body."""
    body = json.dumps(question(photo)).encode()
    lines = ["POST /predict HTTP/1.1", "Host: x", "Content-Type: application/json", "Expect: 100-continue"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode(), body


def test_the_program_survives_clients_that_break_off_and_answers_what_is_in_flight_before_sigterm_ends_it(
    tmp_path, photo
):
    head, body = raw_request(photo)
    with serving(tmp_path) as (process, port):
        for part in (head, head + body[:1000], head + body):  # gone before, in and after the body
            with socket.create_connection(("127.0.0.1", port)) as broken:
                broken.sendall(part)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(30)
            connection.sendall(head + body[:1000])
            assert connection.recv(65536).startswith(b"HTTP/1.1 100")  # the request is in flight
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not is_listening(port))
            connection.sendall(body[1000:])
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 200") and b'"detections"' in answer
        assert process.wait(20) in (0, -signal.SIGTERM)
