"""Pre-annotations as Label Studio's own checks take them, and the ML backend under Label Studio's own server."""

import json

import pytest
import torch
from detections import FOUND, NOTHING, SIZE
from golden_cases import tiny_model

from groundingdino.inference.learned_prompt import LearnedPrompt
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


def predicted(server, photo, context=None, config=CONFIG, project="7.1"):
    request = {"tasks": [{"id": 1, "data": {"photo": str(photo)}}], "project": project, "label_config": config}
    answer = server.post("/predict", json=request | {"params": {"context": context}})
    return answer.status_code, answer.get_json()


def typed(text):
    return {"result": [{"from_name": "prompt", "type": "textarea", "value": {"text": [text]}}]}


def labels(answer):
    return {region["value"]["rectanglelabels"][0] for region in answer[1]["results"][0]["result"]}


@pytest.fixture
def photo(golden, monkeypatch):
    """A photograph that the backend opens where it lies; Label Studio's own method asks a server."""
    from label_studio_ml.model import LabelStudioMLBase

    monkeypatch.setattr(LabelStudioMLBase, "get_local_path", lambda self, url, **options: url)
    return golden / "photos/train2014/COCO_train2014_000000000001.jpg"


def test_a_learned_prompt_is_typed_where_there_is_one_label_and_listed_where_there_are_several(
    server, photo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    LearnedPrompt("cat", torch.full((1, 256), 0.5), "tiny").save("My cat.prompt")
    one = CONFIG.replace('<Label value="cat"/><Label value="Pet" predicted_values="hamster, gold fish"/>', "")
    listed = CONFIG.replace("hamster, gold fish", "My cat.prompt")
    assert labels(predicted(server, photo, typed("My cat.prompt"), one, "8.1")) == {"dog"}
    assert labels(predicted(server, photo, typed("My cat.prompt"), listed, "9.1")) == {"Pet"}
    refused = predicted(server, photo, typed("gone.prompt"), one, "8.1")
    assert refused[0] == 500 and labels(predicted(server, photo, None, one, "8.1")) == {"dog"}  # and not kept


def test_the_backend_keeps_the_prompt_and_maps_names_to_labels(server, photo):
    assert server.get("/health").get_json()["status"] == "UP"
    assert labels(predicted(server, photo)) == {"dog", "cat", "Pet"}  # nothing was typed: the labels
    assert labels(predicted(server, photo, typed("Gold fish, cat"))) == {"Pet", "cat"}
    assert labels(predicted(server, photo)) == {"Pet", "cat"}  # kept
    assert predicted(server, photo, typed("rock"))[0] == 500  # no label: refused, and not kept
    assert labels(predicted(server, photo)) == {"Pet", "cat"}
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface(CONFIG)
    assert interface.validate_prediction(predicted(server, photo)[1]["results"][0], return_errors=True) == []
