"""Label files and the server, by X-AnyLabeling's own classes."""

import json
import threading

import pytest
from detections import FOUND, NOTHING, SIZE
from golden_cases import tiny_model
from PIL import Image
from training_runs import free_port

from groundingdino.integrations.x_anylabeling import WIDGETS, to_x_anylabeling


@pytest.fixture
def label_file(tmp_path):
    """The file of FOUND beside its image."""
    Image.new("RGB", SIZE).save(tmp_path / "photo.png")
    path = tmp_path / "photo.json"
    path.write_text(json.dumps(to_x_anylabeling(FOUND, "photo.png", SIZE)))
    return path


def test_our_own_reader_of_such_files_reads_it(label_file):
    from groundingdino.data.formats.registry import read

    (entry,) = read(label_file.parent).entries()
    assert [o.name for o in entry.objects] == ["dog", "cat"]
    assert list(entry.objects[0].box) == [1.0, 2.0, 11.0, 22.0]
    assert to_x_anylabeling(NOTHING, "photo.jpg", SIZE)["shapes"] == []


@pytest.fixture
def client_package(tmp_path, monkeypatch):
    """X-AnyLabeling with its settings in a folder of the test; its classes need Qt, but no window."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    return pytest.importorskip("anylabeling.views.labeling.label_file")


def test_its_own_reader_takes_a_label_file_and_writes_it_as_ours(client_package, label_file):
    read = client_package.LabelFile(str(label_file))
    assert (read.image_path, read.image_data) == ("photo.png", (label_file.parent / "photo.png").read_bytes())
    dog, cat = read.shapes
    assert (dog.label, dog.score, dog.shape_type, cat.label) == ("dog", 0.75, "rectangle", "cat")
    assert [(p.x(), p.y()) for p in dog.points] == [(1.0, 2.0), (11.0, 2.0), (11.0, 22.0), (1.0, 22.0)]
    again = label_file.with_name("again.json")
    read.save(str(again), [shape.to_dict() for shape in read.shapes], "photo.png", SIZE[1], SIZE[0])
    ours, theirs = json.loads(label_file.read_text()), json.loads(again.read_text())
    assert ours.keys() <= theirs.keys() and {**theirs, "shapes": 0} == {**theirs, **ours, "shapes": 0}
    for our, their in zip(ours["shapes"], theirs["shapes"], strict=True):
        assert {**their, **our} == their


def test_its_own_remote_client_finds_the_model_and_gets_shapes_from_the_server(
    client_package, golden, tmp_path, monkeypatch
):
    pytest.importorskip("fastapi_offline")
    import uvicorn
    from anylabeling.services.auto_labeling.remote_server import RemoteServer
    from anylabeling.views.labeling.widgets.auto_labeling.auto_labeling import AutoLabelingWidget

    from groundingdino.inference.predictor import Predictor
    from groundingdino.integrations.server import build_app

    predictor = Predictor(tiny_model(), scale=(96, 160))
    photo = golden / "photos/train2014/COCO_train2014_000000000001.jpg"
    port, complaints = free_port(), []
    settings = tmp_path / "settings.yaml"  # what its dialog "Remote Server Settings" writes
    settings.write_text(f"remote_server_settings: {{server_url: 'http://127.0.0.1:{port}'}}")
    monkeypatch.setattr("anylabeling.config.current_config_file", str(settings))
    server = uvicorn.Server(uvicorn.Config(build_app(predictor), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.05)
        client = RemoteServer({"type": "remote_server", "display_name": "Remote-Server"}, complaints.append)
        ((name, entry),) = client.get_available_models().items()
        assert name == "tiny" and WIDGETS.keys() <= set(AutoLabelingWidget.supported_remote_widgets)
        client.set_model_id(name)
        client.set_auto_labeling_conf(0.02)
        answer = client.predict_shapes(object(), str(photo), text_prompt="a cat, person.")
        client.predict_shapes(object(), str(photo), text_prompt="(a)")
    finally:
        server.should_exit = True
        thread.join()
    expected = predictor.predict(photo, categories=["a cat", "person"], threshold=0.02)
    assert [shape.label for shape in answer.shapes] == list(expected.names) and len(answer.shapes) > 3
    corners = [[shape.points[0].x(), shape.points[0].y(), shape.points[2].x(), shape.points[2].y()]
               for shape in answer.shapes]  # fmt: skip
    assert corners == [pytest.approx(box, abs=0.01) for box in expected.boxes.tolist()]
    assert len(complaints) == 1 and "422" in complaints[0] and entry["batch_processing_mode"] == "text_prompt"
