"""`groundingdino export`, run as a user would, on a small detector with random weights."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_cases import TINY
from PIL import Image

from benchmarks.random_checkpoint import random_model
from groundingdino.boxes import cxcywh_to_xyxy
from groundingdino.checkpoints.model_file import save_detector
from groundingdino.cli import main as command_line
from groundingdino.config import BackboneConfig
from groundingdino.inference import export, export_check, onnx_example, postprocess, vocabulary
from groundingdino.inference.atc import atc_problems
from groundingdino.inference.learned_prompt import LearnedPrompt
from groundingdino.inference.prompts import Categories, resolve
from groundingdino.inputs.text import collate_text, default_tokenizer
from groundingdino.structures import ImageBatch

onnx = pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxscript", reason="needs the extra export")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")

BACKBONE = BackboneConfig(16, (2, 1, 1, 1), (1, 2, 4, 8), 7, drop_path_rate=0.0)
SMALL = replace(TINY, name="small", backbone=BACKBONE, enhancer_layers=1, decoder_layers=1)
HEIGHT, WIDTH = 96, 136  # no multiple of the windows' or the last stage's strides
NAMES = ["cat", "remote control", "television set"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_detector(path, random_model(SMALL))
    return path


@pytest.fixture(scope="module")
def photos(golden):
    names = ("cat_150x225", "tall_398x60", "wide_40x420")  # nearly the graph's shape, and padded a lot
    return [golden / "data" / "images" / f"{name}.png" for name in names]


def fitted(photo):
    return export.fitted_image(Image.open(photo).convert("RGB"), export.Options((HEIGHT, WIDTH)))


def run(*arguments):
    return command_line.main([str(argument) for argument in ("export", *arguments)])


def exported(folder, checkpoint, photos, *options):
    sizes = ["--size", HEIGHT, WIDTH, "--images", *photos, "--caption", "the cat on the left. a dog"]
    assert run(checkpoint, folder, *sizes, *options) == 0
    return folder


@pytest.fixture(scope="module")
def text_folder(checkpoint, photos, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("onnx") / "text", checkpoint, photos)


@pytest.mark.slow
def test_the_graph_holds_operators_of_onnx_alone_and_no_loop(text_folder):
    model = onnx.load(text_folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    operators = [node.op_type for node in model.graph.node]
    assert not {"Loop", "Scan", "If", "SequenceAt"} & set(operators)
    assert operators.count("GridSample") == SMALL.num_levels * (SMALL.enhancer_layers + SMALL.decoder_layers)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]


@pytest.mark.slow
def test_onnxruntime_gives_the_models_answers_for_any_caption_and_padding(text_folder, photos, checkpoint):
    form = export.TextForm(random_model(SMALL))
    graphs, whole = export_check.Graphs({"model.onnx": form}, text_folder), export_check.Model(form)
    for photo, caption in zip(photos, ("dog", "the tall tower, lit from behind", "cat. " * 60), strict=True):
        given = fitted(photo), export.encode_caption(caption)
        parity = whole.parity(graphs.answer(*given), *given)
        assert parity.within and parity.same_detections == export_check.BEST, parity


@pytest.mark.slow
def test_the_example_beside_the_model_finds_what_the_model_finds(text_folder, photos):
    caption = "a cat. remote control."
    program = [sys.executable, "example.py", str(photos[0].absolute()), caption]
    done = subprocess.run(program, cwd=text_folder, capture_output=True, text=True, check=True)
    assert done.stdout == "" or done.stdout.split()[0] in caption
    image, form = Image.open(photos[0]).convert("RGB"), export.TextForm(random_model(SMALL))
    answer = export_check.Model(form).answer(fitted(photos[0]), export.encode_caption(caption))
    chances = torch.from_numpy(answer.scores).sigmoid()
    onnx_example.FOLDER = text_folder
    found = onnx_example.detect(image, caption, threshold=0.0)
    assert len(found) == 2 * SMALL.num_queries
    best = {name: max(score for each, score, _ in found if each == name) for name in ("a cat", "remote control")}
    expected = [chances[:, 1:3].mean(dim=1).max().item(), chances[:, 4:6].mean(dim=1).max().item()]
    assert list(best.values()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_names_in_the_graph_give_one_score_each_also_those_of_several_tokens(checkpoint, photos, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    folder = exported(tmp_path / "out", checkpoint, photos[:1], "--categories", tmp_path / "names.txt")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["pixels"]
    assert [entry.shape for entry in session.get_outputs()] == [[1, 60, 3], [1, 60, 4]]
    assert json.loads(session.get_modelmeta().custom_metadata_map["names"]) == NAMES
    assert not any("text_encoder" in tensor.name for tensor in onnx.load(folder / "model.onnx").graph.initializer)


@pytest.mark.slow
def test_x_anylabeling_finds_the_inputs_that_it_feeds_and_its_settings(checkpoint, photos, tmp_path):
    folder = exported(tmp_path / "out", checkpoint, photos[:1], "--form", "x-anylabeling")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    named = ["img", "input_ids", "token_type_ids", "position_ids", "attention_mask", "text_token_mask"]
    assert [entry.name for entry in session.get_inputs()] == named
    assert [entry.name for entry in session.get_outputs()] == ["logits", "boxes"]
    assert not (folder / "example.py").exists()  # it feeds other names
    settings = dict(line.split(": ") for line in (folder / "x-anylabeling.yaml").read_text().splitlines())
    required = "type name display_name model_type model_path input_width input_height box_threshold text_threshold"
    assert list(settings) == required.split()  # of X-AnyLabeling's Grounding_DINO.Meta
    assert settings["type"] == "grounding_dino"
    assert (settings["input_height"], settings["input_width"]) == (str(HEIGHT), str(WIDTH))


@pytest.mark.slow
def test_half_precision_answers_as_the_model_in_float32_within_its_own_tolerance(checkpoint, photos, tmp_path):
    folder = exported(tmp_path / "out", checkpoint, photos[:1], "--fp16")
    weights = onnx.load(folder / "model.onnx").graph.initializer
    assert {tensor.data_type for tensor in weights if "weight" in tensor.name} == {onnx.TensorProto.FLOAT16}
    form, given = export.TextForm(random_model(SMALL)), (fitted(photos[0]), export.encode_caption("dog"))
    found = export_check.Graphs({"model.onnx": form}, folder).answer(*given)
    assert found.scores.dtype == found.boxes.dtype == np.float32
    assert export_check.Model(form, export_check.HALF_TOLERANCE).parity(found, *given).within
    assert not export_check.Model(form).parity(found, *given).within  # it is half precision indeed


@pytest.mark.slow
def test_answers_that_differ_end_with_exit_code_1(text_folder, photos, tmp_path, monkeypatch, capsys):
    def write_another(forms, folder, options):
        shutil.copytree(text_folder, folder, dirs_exist_ok=True)

    save_detector(tmp_path / "other.safetensors", random_model(SMALL, seed=1))
    monkeypatch.setattr(export, "write_onnx", write_another)
    size = ("--size", HEIGHT, WIDTH, "--images", photos[0])
    assert run(tmp_path / "other.safetensors", tmp_path / "out", *size) == 1
    assert "0 of the 10 best detections" in capsys.readouterr().out


@pytest.mark.parametrize("caption", ["cat. ", "the man, left of it? a dog. ", "a. b.. c", "no separator ", "."])
def test_the_example_makes_the_masks_of_the_packaged_tokenizer(caption, tmp_path, monkeypatch):
    default_tokenizer().save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(onnx_example, "FOLDER", tmp_path)
    given, _ = onnx_example.text_of(caption)
    expected = collate_text([default_tokenizer().encode(caption)])
    for name, array in given.items():
        assert np.array_equal(array, getattr(expected, name).numpy()), name


def test_the_example_reads_images_as_the_package_does(photos):
    for photo in photos:
        image = Image.open(photo).convert("RGB")
        expected = fitted(photo).pixels.numpy()
        assert np.abs(onnx_example.pixels_of(image, [HEIGHT, WIDTH]) - expected).max() < 1e-5


def test_padding_is_found_in_the_pixels(photos):
    form = export.TextForm(random_model(SMALL))
    for photo in photos:
        given = fitted(photo)
        assert torch.equal(form.images(given.pixels).valid, given.valid)


def answer(scores, boxes, chosen=(3, 7)):
    return export_check.Answer(np.array(scores, np.float32), np.array(boxes, np.float32), np.array(chosen), 0.0)


def test_rows_are_compared_with_the_same_proposals_and_detections_with_the_models_own():
    rows = [[0.9, -np.inf], [0.5, -np.inf]], [[0.1] * 4, [0.2] * 4]
    same = export_check.compare(answer(*rows), answer(*rows), (answer(*rows), 0.0))
    assert same.within and same.scores == 0 and same.other_proposals == 0
    swapped = answer(rows[0][::-1], rows[1][::-1], (7, 3))
    parity = export_check.compare(swapped, answer(*rows), (swapped, 1e-6))
    assert parity.within and (parity.other_proposals, parity.same_detections) == (2, 2)
    worse = export_check.compare(swapped, answer(*rows), (swapped, 0.01))
    assert not worse.within
    moved = answer(rows[0], [[0.1] * 4, [0.2, 0.2, 0.2, 0.21]])
    parity = export_check.compare(moved, answer(*rows), (answer(*rows), 0.0))
    assert (parity.rows_apart, parity.same_detections, parity.within) == (1, 1, False)
    assert parity.boxes == pytest.approx(0.01)
    broken = answer([[np.nan, 0.0], [0.5, -np.inf]], rows[1])
    assert export_check.compare(broken, answer(*rows), (answer(*rows), 0.0)).rows_apart == 1


def test_the_detections_that_are_compared_are_the_best():
    rows = [[score] for score in np.linspace(0.1, 0.9, export_check.BEST + 2)], np.full((export_check.BEST + 2, 4), 0.5)
    wrong_boxes = rows[1].copy()
    wrong_boxes[:2] = 0.7  # of the worst two
    parity = export_check.compare(answer(rows[0], wrong_boxes), answer(*rows), (answer(*rows), 0.0))
    assert parity.same_detections == export_check.BEST and parity.rows_apart == 2


def test_the_model_decodes_the_proposals_that_it_is_given(photos):
    whole = export_check.Model(export.TextForm(random_model(SMALL)))
    given = fitted(photos[0]), export.encode_caption("dog")
    own = whole.answer(*given)
    again, less = whole.answer_with(own.chosen, *given)
    assert np.array_equal(again.boxes, own.boxes) and less == 0
    swapped = own.chosen.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    other, less = whole.answer_with(swapped, *given)
    assert not np.array_equal(other.boxes, own.boxes) and less > 0


@pytest.fixture(scope="module")
def dynamic_halves(checkpoint, photos, tmp_path_factory):
    """A folder with three graphs for any size, and the exported programs that they were made of."""
    folder, programs = tmp_path_factory.mktemp("onnx") / "halves", {}
    program_of = export.export_program

    def keep(form, values, dynamic):
        programs[type(form)] = program_of(form, values, dynamic)
        return programs[type(form)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_program", keep)
        return exported(folder, checkpoint, photos[:1], "--halves", "--dynamic"), programs


def inputs_of_another_size(size, caption):
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    images = ImageBatch(pixels, torch.ones(1, *size, dtype=torch.bool), padded=False)
    return images, export.encode_caption(caption)


# Odd ones, one whose last maps are smaller than a window, and one around whole windows.
OTHER_SIZES = [
    ((70, 201), "a dog"),
    ((160, 97), "the tall tower, lit from behind. " * 4),
    ((65, 65), "cat. " * 60),
    ((66, 300), "a"),
    ((225, 224), "a cat. remote control."),
]


@pytest.mark.slow
def test_three_graphs_answer_as_the_model_for_any_size_and_caption(dynamic_halves, photos, monkeypatch):
    folder, _ = dynamic_halves
    model = random_model(SMALL)
    graphs, whole = export_check.Graphs(export.halves(model), folder), export_check.Model(export.TextForm(model))
    for size, caption in OTHER_SIZES:
        given = inputs_of_another_size(size, caption)
        parity = whole.parity(graphs.answer(*given), *given)
        assert parity.within and parity.same_detections == export_check.BEST, (size, parity)
    monkeypatch.setattr(onnx_example, "FOLDER", folder)
    image = Image.open(photos[0]).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    found = onnx_example.detect(image, "a cat.", threshold=0.0)
    assert len(found) == SMALL.num_queries
    given = export.fitted_image(image, export.Options((HEIGHT, WIDTH), dynamic=True)), export.encode_caption("a cat")
    chances = torch.from_numpy(whole.answer(*given).scores).sigmoid()
    assert given[0].pixels.shape[2:] == onnx_example.pixels_of(image, [HEIGHT, WIDTH], dynamic=True).shape[2:]
    assert found[0][1] == pytest.approx(chances[:, 1:3].mean(dim=1).max().item(), abs=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_exported_programs_of_the_halves_answer_as_the_model_once_loaded_again(dynamic_halves, tmp_path):
    _, programs = dynamic_halves
    model = random_model(SMALL)
    parts = {}
    for part in export.halves(model).values():
        torch.export.save(programs[type(part)], tmp_path / "part.pt2")
        parts[part] = torch.export.load(tmp_path / "part.pt2").module()
    for size, caption in OTHER_SIZES:
        images, text = inputs_of_another_size(size, caption)
        values = export.first_values(images.pixels, text)
        for part, loaded in parts.items():
            values.update(zip(part.outputs, loaded(*(values[name] for name in part.inputs)), strict=True))
        prediction = model(images, text).layers[-1]
        torch.testing.assert_close(values["logits"], prediction.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values["boxes"], prediction.boxes, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_three_parts_of_a_model_do_not_look_at_the_padding(photos):
    model, images, text = random_model(SMALL), fitted(photos[1]), export.encode_caption("a cat.")
    assert images.padded
    values = export.first_values(images.pixels, text)
    for part in export.halves(model).values():
        values.update(zip(part.outputs, part(*(values[name] for name in part.inputs)), strict=True))
    prediction = model(images, text).layers[-1]
    torch.testing.assert_close(values["logits"], prediction.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values["boxes"], prediction.boxes, atol=1e-4, rtol=1e-4)


def test_a_name_with_several_prompts_has_the_score_of_the_best(photos):
    model, given = random_model(SMALL), fitted(photos[0])
    cat, both = vocabulary.Name("cat", ("cat", "kitten")), vocabulary.Name("dog")
    form = export.CategoryForm(model, resolve(vocabulary.Vocabulary((cat, both)), default_tokenizer()))
    plain = export.CategoryForm(model, resolve(Categories(["cat", "kitten", "dog"]), default_tokenizer()))
    with torch.no_grad():
        (scores, _), (each, _) = form(given.pixels), plain(given.pixels)
    checked = export_check.Model(form).answer(given, export.encode_caption("whatever"))
    torch.testing.assert_close(torch.from_numpy(checked.scores), scores[0])
    torch.testing.assert_close(scores, torch.stack([each[..., :2].amax(-1), each[..., 2]], dim=-1))


def test_a_box_with_a_better_one_of_a_negative_scores_0_as_in_the_predictor(photos):
    model, given = random_model(SMALL), fitted(photos[0])
    names = (vocabulary.Name("cat", negatives=("dog", "toy")), vocabulary.Name("bus", negatives=("toy",)))
    rivals = vocabulary.Vocabulary((*names, vocabulary.Name("boat")))
    form = export.CategoryForm(model, resolve(rivals, default_tokenizer()))
    plain = export.CategoryForm(model, resolve(Categories(rivals.texts), default_tokenizer()))
    with torch.no_grad():
        (scores, _), (each, boxes) = form(given.pixels), plain(given.pixels)
    values, place = each[0].flatten().sort(descending=True, stable=True)
    queries, texts = place // len(rivals.texts), place % len(rivals.texts)
    kept, owners = postprocess.fold(cxcywh_to_xyxy(boxes[0])[queries], values, texts, rivals.roles)
    expected = torch.zeros_like(scores[0])
    expected[queries[kept], owners] = values[kept]
    torch.testing.assert_close(scores[0], expected)
    gone = (expected == 0).sum(dim=0)
    assert gone[0] > 0 and gone[1] > 0 and gone[2] == 0


def test_a_learned_prompt_is_part_of_the_graph(photos, tmp_path):
    model, given = random_model(SMALL), fitted(photos[0])
    path, own = str(tmp_path / "cat.prompt"), SMALL.name

    def scores(*names):
        form = export.CategoryForm(model, resolve(Categories(names), default_tokenizer()))
        with torch.no_grad():
            return form, form(given.pixels)[0]

    plain, expected = scores("dog", "cat")
    tokens = plain.tokens[0, plain.positive_map[1]]
    LearnedPrompt("cat", tokens, own).save(path)
    torch.testing.assert_close(scores("dog", path)[1], expected)
    LearnedPrompt("cat", -tokens, own).save(path)
    assert (scores("dog", path)[1] - expected)[..., 1].abs().max() > 1e-3
    LearnedPrompt("cat", tokens, "another").save(path)
    with pytest.raises(ValueError, match="was learned with another"):
        scores("dog", path)


def test_names_that_need_two_captions_are_refused_with_the_number_that_fits():
    names = [f"name {number}" for number in range(100)]
    prompt = resolve(Categories(names), default_tokenizer())
    with pytest.raises(ValueError, match="100 names need 2 captions.*the first [1-9]"):
        export.CategoryForm(random_model(SMALL), prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--opset", "17"), "opset 17: 20 is the first"),
        (("--form", "x-anylabeling", "--categories", "names.txt"), "exclude each other"),
        (("--halves", "--categories", "names.txt"), "exclude each other"),
        (("--to", "atc", "--dynamic"), "ATC compiles for one size"),
        (("--images", "gone.jpg"), "gone.jpg: no such file"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(options, message, checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_form_for_atc_gives_the_models_answers(checkpoint, photos, tmp_path):
    folder = tmp_path / "atc"
    assert run(checkpoint, folder, "--size", HEIGHT, WIDTH, "--to", "atc") == 0
    written = onnx.load(folder / "model.onnx")
    assert atc_problems(written, sized=[value.name for value in written.graph.input]) == []
    assert "Gelu" not in {node.op_type for node in written.graph.node}
    command = (folder / "atc.sh").read_text()
    assert f"pixels:1,3,{HEIGHT},{WIDTH};token_ids:1,{SMALL.max_tokens};" in command
