"""The page's fields, and the page itself in a headless Chromium."""

import html
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from PIL import Image

from groundingdino.cli import demo_page
from groundingdino.cli.demo_page import Answerer, as_text, bracketed, build_page, prompt_of
from groundingdino.inference.predictor import DetectionFilter, Predictor
from groundingdino.inference.prompts import Categories, Phrases, Referring, Spans
from groundingdino.inference.results import to_json
from groundingdino.inference.visualize import draw_detections
from groundingdino.inference.vocabulary import Name, Vocabulary, read_vocabulary

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1300,1400"
)
SECONDS = 60  # for the slowest step of the page on a busy machine


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_model(), scale=(96, 160))


@pytest.fixture(scope="module")
def photo(golden):
    return golden / "photos" / "train2014" / "COCO_train2014_000000000001.jpg"


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        ("categories", " cat, remote control,", Categories(["cat", "remote control"])),
        ("referring", "the man ", Referring("the man")),
        ("phrases", "a man", Phrases("a man")),
        ("spans", "[a dog] next to [a bench]", Spans("a dog next to a bench", [[(0, 5)], [(14, 21)]])),
    ],
)
def test_the_fields_mean_the_prompt_of_their_mode(mode, text, expected):
    assert prompt_of(mode, text) == expected


def test_fields_that_name_nothing_are_refused_with_a_hint():
    assert prompt_of("referring", "a man", subject_scoring=True).scoring == "subject"
    vocabulary = Vocabulary((Name("cat", ("cat", "kitten")),))
    assert prompt_of("categories", "cat, dog", vocabulary=vocabulary) == Vocabulary((*vocabulary.names, Name("dog")))
    with pytest.raises(ValueError, match="type what to look for: names"):
        prompt_of("categories", "  ")
    with pytest.raises(ValueError, match="no brackets"):
        bracketed("a dog")


def test_the_image_half_runs_once_for_questions_about_one_image(predictor, photo, monkeypatch):
    encoded = []
    original = predictor.encode_image
    monkeypatch.setattr(predictor, "encode_image", lambda image: encoded.append(image) or original(image))
    answer = Answerer(predictor)
    image = Image.open(photo).convert("RGB")
    first = answer(image, Referring("a man"), DetectionFilter())
    again = answer(image.copy(), Referring("a man"), DetectionFilter())
    assert len(encoded) == 1 and np.array_equal(first.boxes, again.boxes)
    answer(image.resize((50, 40)), Referring("a man"), DetectionFilter())
    assert len(encoded) == 2
    other = image.resize((50, 40)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # of the same size
    found = answer(other, Referring("a man"), DetectionFilter())
    assert len(encoded) == 3 and torch.equal(found.boxes, predictor.predict(other, Referring("a man")).boxes)
    answer(Image.frombytes("RGB", (40, 50), other.tobytes()), Referring("a man"), DetectionFilter())
    assert len(encoded) == 4


def test_without_gradio_the_error_says_what_to_install(predictor, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install \"groundingdino\[demo\]\""):
        build_page(predictor)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "names.yaml"
    path.write_text("- {name: hat, prompts: [helmet, cap], negatives: [flag], threshold: 0.1}\n- woman\n")
    return read_vocabulary(path)


@pytest.fixture(scope="module")
def address(predictor, photo, vocabulary):
    pytest.importorskip("gradio")
    page = build_page(predictor, photo.parent, vocabulary)
    _, url, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, max_file_size=demo_page.LARGEST_UPLOAD
    )
    yield url
    page.close()


def get(address: str) -> int:
    """The status of a request."""
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_outside_of_the_pages_own_is_served(address, photo, tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[2]
    for path in ("/etc/passwd", tmp_path / "secret.txt", "secret.txt", "../etc/passwd", root / "pyproject.toml"):
        for prefix in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/../../"):
            assert get(f"{address}{prefix}{path}") >= 400, (prefix, path)
    assert get(address) == 200


def upload(address: str, content: bytes) -> int:
    """The status of an upload."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return get(urllib.request.Request(f"{address}gradio_api/upload", body, headers))


def test_a_big_upload_is_refused(address, photo):
    assert upload(address, photo.read_bytes()) == 200
    assert upload(address, bytes(demo_page.LARGEST_UPLOAD + 1)) == 413


def test_questions_wait_for_each_other_and_not_too_many_do(predictor):
    pytest.importorskip("gradio")
    page = build_page(predictor)
    assert page._queue.max_size == demo_page.MOST_WAITING and page._queue.default_concurrency_limit == 1


def test_texts_of_others_are_shown_as_text():
    evil = "<img src=x onerror=alert(1)> [a](javascript:b) `c` **d** | # ~e~ $f$"
    shown = as_text(evil)
    assert not set("<>[]`*|~$_") & set(shown) and html.unescape(shown) == evil


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:")  # gradio's own
def test_in_a_browser_load_type_click_and_see_boxes(browser, address, predictor, photo, vocabulary, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def one(selector):
        return WebDriverWait(browser, SECONDS).until(lambda b: b.find_element(By.CSS_SELECTOR, selector))

    def fill(selector, text):
        field = one(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    browser.get(address)
    WebDriverWait(browser, SECONDS).until(lambda b: demo_page.TITLE in b.title)

    assert one("#text textarea").get_attribute("value") == "hat, woman"
    fill("#text textarea", "cat")
    one("#find").click()  # no image yet: a message, not a crash
    WebDriverWait(browser, SECONDS).until(
        lambda b: "upload an image or pick a sample" in one("[data-testid=toast-body]").text
    )

    one("#image input[type=file]").send_keys(str(photo))
    one("#image img")
    fill("#threshold input[type=number]", "0.01" + Keys.TAB)
    fill("#top_k input[type=number]", "5" + Keys.TAB)

    def download():
        WebDriverWait(browser, SECONDS).until(lambda b: one("#download").is_enabled())
        one("#download").click()
        text = WebDriverWait(browser, SECONDS).until(lambda b: "".join(f.read_text() for f in tmp_path.glob("*.json")))
        for file in tmp_path.glob("*.json"):  # Chromium makes an empty file first, and moves the whole one over it
            file.unlink()
        return json.loads(text)

    fill("#text textarea", "hat, woman")  # names of the page's names.yaml, which stand for what it says
    one("#find").click()
    before = one("#picture img").get_attribute("src")
    assert download() == to_json(predictor.predict(photo, vocabulary, threshold=0.01, top_k=5)) != []
    fill("#text textarea", "helmet, flag")
    one("#find").click()
    WebDriverWait(browser, SECONDS).until(lambda b: one("#picture img").get_attribute("src") != before)
    picture = one("#picture img")
    rows = download()
    assert len(rows) == 5 and {row["name"] for row in rows} <= {"helmet", "flag"}
    with urllib.request.urlopen(picture.get_attribute("src")) as response:
        shown = np.array(Image.open(response).convert("RGB"))
    found = predictor.predict(photo, categories=["helmet", "flag"], threshold=0.01, top_k=5)
    assert rows == to_json(found)
    assert np.array_equal(shown, np.array(draw_detections(Image.open(photo).convert("RGB"), found, enlarge=2)))

    one("[data-testid=referring-radio-label]").click()
    WebDriverWait(browser, SECONDS).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#subject input"))
    fill("#text textarea", "the woman in the orange suit")
    before = picture.get_attribute("src")
    one("#find").click()
    WebDriverWait(browser, SECONDS).until(lambda b: one("#picture img").get_attribute("src") != before)
    WebDriverWait(browser, SECONDS).until(lambda b: "the woman in the orange suit" in one("#rows").text)
