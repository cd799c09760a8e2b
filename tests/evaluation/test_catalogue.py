"""Every protocol from files in its real layout to figures, with a tiny model."""

import json
import math
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from protocol_data import LAYOUTS

from groundingdino.evaluation import EvaluationOptions, coco, dod, evaluate, lvis, odinw
from groundingdino.evaluation.answer_file import AnswerStore, read_answers
from groundingdino.evaluation.answers import ImageAnswer
from groundingdino.evaluation.catalogue import CATALOGUE, Request, combine
from groundingdino.evaluation.detection_misses import save_detection_misses
from groundingdino.evaluation.report import Figures
from groundingdino.inference.prompts import Spans, resolve
from groundingdino.inference.vocabulary import Name, Vocabulary, plain_names
from groundingdino.inputs.text import default_tokenizer
from groundingdino.runtime import distributed

OPTIONS = EvaluationOptions(scale=(48, 64), workers=0)
CASES = [
    ("coco", "val2017"),
    ("lvis", "minival"),
    ("grefcoco", "val"),
    ("flickr30k", "val"),
    ("odinw", "13"),
    ("dod", "concat"),
    ("dod", "parallel"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, layout in LAYOUTS.items():
        layout(root / name)
    return root


def figures_of(data: Path, name: str, split: str, folder: Path | None = None) -> Figures:
    figures, missing = {}, []
    for part in CATALOGUE[name].parts(Request(data / name, split)):
        try:
            protocol = part.load()
        except ValueError:
            missing.append(part.name)
            continue
        store = AnswerStore(folder and folder / part.name)
        figures[part.name] = evaluate(tiny_model(), protocol, OPTIONS, store=store).figures
    return combine(name, split, figures, missing)


def protocol_of(data: Path, name: str, split: str):
    return CATALOGUE[name].parts(Request(data / name, split))[0].load()


def perfect(protocol) -> list[ImageAnswer]:
    """The annotated boxes themselves as the answer to every prompt."""
    answers = []
    for question in protocol.questions():
        for image_id in question.ids:
            _, boxes, labels, _ = protocol.picture(image_id)
            answers.append(ImageAnswer(image_id, boxes, np.linspace(0.99, 0.9, len(boxes)), labels))
    return answers


@pytest.mark.parametrize(("name", "split"), CASES)
def test_a_tiny_model_gets_figures_from_files_in_the_real_layout(data, name, split):
    figures = figures_of(data, name, split)
    assert figures.values and all(math.isnan(value) or 0 <= value <= 1 for value in figures.values.values())
    assert not math.isnan(next(iter(figures.values.values())))


@pytest.mark.parametrize(("name", "split"), [case for case in CASES if case[0] != "odinw"])
def test_annotations_given_as_the_answer_score_perfectly(data, name, split):
    protocol = protocol_of(data, name, split)
    headline = next(iter(protocol.score(perfect(protocol)).values.values()))
    assert headline == pytest.approx(1)
    nothing = np.zeros(0)
    empty = [ImageAnswer(a.image_id, np.zeros((0, 4)), nothing, nothing.astype(int)) for a in perfect(protocol)]
    expected = 1 / 5 if name == "grefcoco" else 0  # one of five expressions describes nothing
    assert next(iter(protocol.score(empty).values.values())) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "split"), CASES)
def test_stored_answers_give_the_same_figures_without_the_model(data, name, split, tmp_path):
    figures = figures_of(data, name, split, tmp_path)
    scored = {}
    for part in CATALOGUE[name].parts(Request(data / name, split)):
        if (tmp_path / part.name).exists():
            scored[part.name] = part.load().score(read_answers(tmp_path / part.name)[1])
    again = combine(
        name,
        split,
        scored,
        [part.name for part in CATALOGUE[name].parts(Request(data / name, split)) if part.name not in scored],
    )
    np.testing.assert_equal(dict(again.values), dict(figures.values))
    assert again.notes == figures.notes


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(data, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=evaluate_as_rank, args=(rank, data, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    for case in CASES:
        alone = figures_of(data, *case).values
        for rank in range(2):
            shared = json.loads((tmp_path / f"{'_'.join(case)}.{rank}.json").read_text())
            assert shared == pytest.approx(dict(alone), abs=1e-12, nan_ok=True)


def evaluate_as_rank(rank: int, data: Path, out: Path) -> None:
    """What a process of `test_two_processes_give_the_figures_of_one` does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=2)
    for case in CASES:
        name = "_".join(case)
        values = figures_of(data, *case, out / name).values
        (out / f"{name}.{rank}.json").write_text(json.dumps(dict(values)))
    distributed.shutdown()


def test_lvis_prompts_forty_names_a_caption_unless_told_otherwise(data):
    assert protocol_of(data, "lvis", "minival").questions()[0].prompts[0].names_per_caption == 40
    for asked, expected in ((0, None), (2, 2)):
        request = Request(data / "lvis", "minival", names_per_caption=asked)
        (prompt,) = CATALOGUE["lvis"].parts(request)[0].load().questions()[0].prompts
        assert prompt.names_per_caption == expected


def test_lvis_images_are_where_their_url_says(data):
    folders = [question.image.path.parent.name for question in protocol_of(data, "lvis", "minival").questions()]
    assert folders == ["val2017", "train2017", "val2017"]


def test_captions_about_one_image_file_are_one_question(data):
    questions = protocol_of(data, "flickr30k", "val").questions()
    assert [(question.image.path.name, question.ids) for question in questions] == [("0.jpg", (0, 1)), ("1.jpg", (2,))]
    assert isinstance(questions[0].prompts[0], Spans)


def test_dcube_asks_each_image_the_sentences_of_its_group(data):
    for split, most in (("concat", None), ("parallel", 1)):
        questions = protocol_of(data, "dod", split).questions()
        assert [question.prompts[0].names for question in questions] == [
            ["dog on a leash", "dog without a leash"],
            ["dog on a leash", "dog without a leash"],
            ["a person who holds a very large red umbrella up"],
        ]
        assert {question.prompts[0].names_per_caption for question in questions} == {most}
        assert questions[0].prompts is questions[1].prompts  # so that its captions are encoded once


def test_dcube_counts_presence_absence_and_length_apart(data):
    protocol = protocol_of(data, "dod", "concat")
    found = [
        a if a.image_id != 1 else ImageAnswer(1, a.boxes[:0], a.scores[:0], a.labels[:0]) for a in perfect(protocol)
    ]
    values = protocol.score(found).values
    names = ("full AP", "presence AP", "absence AP", "full AP, middle", "full AP, very long")
    assert [values[name] for name in names] == pytest.approx([2 / 3, 1, 0, 1 / 2, 1])
    assert math.isnan(values["full AP, short"])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "groups.pkl").write_bytes(pickle.dumps({0: Evil()}))
    with pytest.raises(ValueError, match=r"groups.pkl: not a pickle of plain data \(it holds builtins.exec"):
        dod.read_plain_pickle(tmp_path / "groups.pkl")
    (tmp_path / "groups.pkl").write_bytes(pickle.dumps({np.int64(3): np.array([1.5])}))
    assert dod.read_plain_pickle(tmp_path / "groups.pkl") == {3: np.array([1.5])}


def test_coco_categories_may_have_other_prompts(data):
    vocabulary = Vocabulary((Name("cat", ("cat", "kitten"), ("toy",)),))
    (part,) = CATALOGUE["coco"].parts(Request(data / "coco", "val2017", vocabulary=vocabulary))
    protocol = part.load()
    (prompt,) = protocol.questions()[0].prompts
    assert prompt == vocabulary.select(protocol.truth.names) and prompt.shown == protocol.truth.names
    figures = evaluate(tiny_model(), protocol, OPTIONS).figures
    assert 0 <= figures.values["AP"] <= 1
    assert protocol.description()["prompt"] != protocol_of(data, "coco", "val2017").description()["prompt"]


def test_missing_odinw_sets_are_listed_and_left_out_of_the_average(data):
    figures = figures_of(data, "odinw", "13")
    assert list(figures.values) == ["average AP", "pothole", "thermalDogsAndPeople"]
    assert figures.values["average AP"] == np.mean([figures.values["pothole"], figures.values["thermalDogsAndPeople"]])
    assert figures.notes[0].startswith(
        "average of 2 of 13 data sets, not comparable with a published one; missing: Aerial"
    )


def test_odinw_prompts_are_as_published(data):
    suites = {split: {d.name: d for d in odinw.SUITES[split]} for split in ("13", "35")}
    assert [len(suite) for suite in suites.values()] == [13, 35]
    plain = odinw.OdinwDetection.load(suites["13"]["pothole"], data / "odinw")
    words = odinw.OdinwDetection.load(suites["35"]["pothole"], data / "odinw")
    assert plain.prompt == plain_names(["pothole"])
    asked = resolve(words.prompt, default_tokenizer())
    published = resolve(Spans("there are some holes on the road", [[(15, 20)]]), default_tokenizer())
    assert asked.chunks[0].caption == published.chunks[0].caption
    assert torch.equal(asked.chunks[0].positive_map, published.chunks[0].positive_map)
    assert plain.truth.category_ids == (1,)  # the file also has a category that is not asked for


def test_an_odinw_report_says_what_was_asked(data):
    def asked(split: str, name: str) -> str:
        (data_set,) = (one for one in odinw.SUITES[split] if one.name == name)
        return odinw.OdinwDetection.load(data_set, data / "odinw").description()["prompt"]

    assert asked("13", "pothole").startswith("1 category name")
    assert asked("13", "thermalDogsAndPeople") == "2 category names"
    assert asked("35", "pothole") == '"there are some [holes] on the road", of it what is in brackets'


def test_an_odinw_file_without_a_category_says_which_it_has(data):
    with pytest.raises(ValueError, match="no category 'cheetah', 'human'; it has 'things', 'dog', 'person'"):
        folder = "thermalDogsAndPeople/valid"
        odinw.OdinwDetection.load(odinw.DataSet("ThermalCheetah", folder), data / "odinw")


def test_the_images_with_most_misses_are_drawn_first(data, tmp_path):
    protocol = protocol_of(data, "coco", "val2017")
    assert [len(protocol.picture(n)[1]) for n in range(3)] == [2, 1, 1]
    found = [
        ImageAnswer(a.image_id, a.boxes, np.full_like(a.scores, 0.3), a.labels)  # as low as is shown
        if a.image_id == 2
        else ImageAnswer(a.image_id, a.boxes[:0], a.scores[:0], a.labels[:0])
        for a in perfect(protocol)
    ]
    with AnswerStore(tmp_path / "answers") as store:
        store.write(found)
        list(store.gathered())
    saved = save_detection_misses(protocol, tmp_path / "answers", tmp_path / "misses", 5)
    assert [path.name for path in saved] == ["001_missed2_image0.png", "002_missed1_image1.png"]


@pytest.mark.parametrize("loader", [coco.CocoDetection.load, lvis.Lvis.load])
def test_a_file_that_is_no_annotation_file_is_named(loader, tmp_path):
    (tmp_path / "a.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"a.json: expected an object with lists .* annotations, categories missing"):
        loader(tmp_path / "a.json", tmp_path)
    with pytest.raises(ValueError, match=r"b.json: no such file"):
        loader(tmp_path / "b.json", tmp_path)


def test_dcube_puts_every_length_into_one_class():
    from groundingdino.evaluation.dod import LENGTHS

    classes = {words: [name for name, lengths in LENGTHS.items() if words in lengths] for words in range(1, 100)}
    assert all(len(names) == 1 for names in classes.values())
    edges = {3: "short", 4: "middle", 6: "middle", 7: "long", 9: "long", 10: "very long"}
    assert {words: classes[words][0] for words in edges} == edges


def test_a_dcube_sentence_that_no_image_shows_does_not_count_in_the_figure_of_its_length():
    sentences = [("a dog", math.nan), ("a cat", 0.5), ("a red cat", 0.25), ("a cat on a mat", math.nan)]
    figures = dod.length_figures(sentences)
    assert figures["full AP, short"] == 0.375
    assert math.isnan(figures["full AP, middle"]) and math.isnan(figures["full AP, long"])
