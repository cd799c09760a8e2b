"""Pre-annotations as Label Studio's own checks take them, and the ML backend under Label Studio's own server."""

import json

import pytest
from detections import FOUND, NOTHING, SIZE
from golden_cases import tiny_model

from groundingdino.inference.predictor import Predictor
from groundingdino.integrations.label_studio import to_label_studio

CONFIG = """
<View>
  <Image name="image" value="$photo"/>
  <TextArea name="prompt" toName="image"/>
  <RectangleLabels name="label" toName="image">
    <Label value="dog"/><Label value="cat"/><Label value="Pet" predicted_values="hamster, gold fish"/>
  </RectangleLabels>
</View>"""


def test_a_prediction_is_in_percent_of_the_image():
    prediction = json.loads(json.dumps(to_label_studio(FOUND, SIZE)))
    dog = prediction["result"][0]
    assert dog["value"] == {"x": 2.5, "y": 4, "width": 25, "height": 40, "rotation": 0, "rectanglelabels": ["dog"]}
    assert (dog["original_width"], dog["original_height"], dog["score"]) == (40, 50, 0.75)
    assert prediction["score"] == 0.625 and to_label_studio(NOTHING, SIZE)["result"] == []


def test_label_studios_own_validation_accepts_it_and_refuses_a_label_that_the_project_lacks():
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface(CONFIG)
    assert interface.validate_prediction(to_label_studio(FOUND, SIZE), return_errors=True) == []
    assert interface.validate_prediction(to_label_studio(FOUND, SIZE, labels=["Pet", "rock"]), return_errors=True)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Label Studio's Flask application with our backend."""
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    pytest.importorskip("label_studio_ml.response")  # version 2; version 1 is another interface
    from label_studio_ml import api

    from groundingdino.integrations.label_studio_backend import backend

    return api.init_app(backend(Predictor(tiny_model(), scale=(96, 160)), threshold=0.0)).test_client()


def predicted(server, photo, context=None):
    request = {"tasks": [{"id": 1, "data": {"photo": str(photo)}}], "project": "7.1", "label_config": CONFIG}
    answer = server.post("/predict", json=request | {"params": {"context": context}})
    return answer.status_code, answer.get_json()


def typed(text):
    return {"result": [{"from_name": "prompt", "type": "textarea", "value": {"text": [text]}}]}


def test_the_backend_keeps_the_prompt_and_maps_names_to_labels(server, golden, monkeypatch):
    photo = golden / "photos/train2014/COCO_train2014_000000000001.jpg"
    from label_studio_ml.model import LabelStudioMLBase

    monkeypatch.setattr(LabelStudioMLBase, "get_local_path", lambda self, url, **options: url)  # asks a server
    assert server.get("/health").get_json()["status"] == "UP"

    def labels(answer):
        return {region["value"]["rectanglelabels"][0] for region in answer[1]["results"][0]["result"]}

    assert labels(predicted(server, photo)) == {"dog", "cat", "Pet"}  # nothing was typed: the labels
    assert labels(predicted(server, photo, typed("Gold fish, cat"))) == {"Pet", "cat"}
    assert labels(predicted(server, photo)) == {"Pet", "cat"}  # kept
    assert predicted(server, photo, typed("rock"))[0] == 500  # no label: refused, and not kept
    assert labels(predicted(server, photo)) == {"Pet", "cat"}
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface(CONFIG)
    assert interface.validate_prediction(predicted(server, photo)[1]["results"][0], return_errors=True) == []
