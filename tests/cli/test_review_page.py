"""The page that reviews labels: what it answers, what it refuses, and itself in a headless Chromium."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from training_runs import environment, free_port, obey_ctrl_c

from groundingdino.cli.console import INTERRUPTED
from groundingdino.cli.label import Arguments, choice_record, understood
from groundingdino.cli.review_page import build_server
from groundingdino.data.formats import registry
from groundingdino.inference.image_source import list_images
from groundingdino.inference.label_store import LabelRun, Record

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1300,1400"
)
SECONDS = 60  # for the slowest step of the page on a busy machine
HOSTILE = "<img src=x onerror=document.title='hacked'>"


@pytest.fixture
def folder(tmp_path):
    """A finished run over 14 images; each has a cat that scores more from image to image, and a hostile name."""
    (tmp_path / "photos").mkdir()
    for number in range(14):
        Image.new("RGB", (60, 40), (10 * number, 90, 90)).save(tmp_path / "photos" / f"{number:02d}.png")
    (tmp_path / "photos" / "00.png").rename(tmp_path / "photos" / "00<b>.png")
    (tmp_path / "names.yaml").write_text(json.dumps(["cat", HOSTILE]))
    out = tmp_path / "out"
    job = understood(Arguments((tmp_path / "photos",), names=str(tmp_path / "names.yaml"), out=out, nms=1))
    asked = {"images": [str(tmp_path / "photos")], "prompts": ["cat", HOSTILE], "least score": 0.05}
    run = LabelRun.create(out, asked, lambda: list_images(job.sources))
    for shard in run.claimed([0]):
        for position, _ in shard.waiting:
            boxes = np.array([[5, 5, 30, 30], [20, 10, 50, 39]], "<f4").tobytes()
            scores = np.array([0.9 - 0.02 * position, 0.35], "<f4").tobytes()
            shard.claim.append(Record(position, 60, 40, boxes, scores, np.array([0, 1], "<i4").tobytes()))
        run.finish(shard)
    (out / "choice.json").write_text(json.dumps({**choice_record(job), "written": []}))
    return out


@pytest.fixture
def address(folder):
    server = build_server(folder, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def get(address, path, **headers):
    with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers)) as answer:
        return answer.read()


def post(address, path, body, **headers):
    token = get(address, "/").decode().partition('data-token="')[2].partition('"')[0]
    content = json.dumps(body).encode()
    request = urllib.request.Request(address + path, content, {"X-Token": token, **headers})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def refused(call, *arguments, **headers) -> int:
    with pytest.raises(urllib.error.HTTPError) as caught:
        call(*arguments, **headers)
    assert "problem" in json.loads(caught.value.read())
    return caught.value.code


def test_images_are_filtered_by_name_and_score_page_by_page(address):
    first = json.loads(get(address, "/api/images?name=cat"))
    assert len(first["images"]) == 12 and first["next"] == 12
    rest = json.loads(get(address, "/api/images?name=cat&start=12"))
    assert [image["name"] for image in rest["images"]] == ["12.png", "13.png"] and rest["next"] is None
    few = json.loads(get(address, "/api/images?name=cat&low=0.85&high=0.89"))
    assert [box["score"] for image in few["images"] for box in image["boxes"]] == pytest.approx([0.88, 0.86])
    with Image.open(BytesIO(get(address, "/image/3"))) as picture:
        assert picture.size == (60, 40) and picture.format == "JPEG"


def test_verdicts_are_kept_and_the_accepted_set_is_written(address, folder):
    boxes = [{"name": "cat", "box": [5.0, 5.0, 30.0, 30.0]}]
    post(address, "/api/verdict", {"position": 0, "boxes": boxes, "accepted": True})
    post(address, "/api/verdict", {"position": 1, "boxes": boxes, "accepted": False})
    post(address, "/api/verdict", {"position": 2, "boxes": boxes, "accepted": True})
    post(address, "/api/verdict", {"position": 2, "boxes": boxes, "accepted": None})
    again = build_server(folder, "127.0.0.1", 0)
    again.server_close()
    assert len((folder / "verdicts.jsonl").read_text().splitlines()) == 4
    done = post(address, "/api/write", {"format": "coco"})
    assert (done["images"], done["boxes"]) == (3, 1)
    entries = list(registry.read(folder / "accepted" / "coco.json"))
    assert [len(entry.objects) for entry in entries] == [1, 0, 0] and entries[0].objects[0].name == "cat"
    left = json.loads(get(address, "/api/images?name=cat&open=1"))
    assert left["images"][0]["position"] == 2


def test_only_the_page_can_change_something_and_no_file_is_served(address, folder):
    verdict = {"position": 0, "boxes": [], "accepted": True}
    assert refused(post, address, "/api/verdict", verdict, **{"X-Token": "guessed"}) == 403
    assert refused(get, address, "/", Host="evil.example") == 403
    for path in ("/../../etc/passwd", "/choice.json", "/image/../choice.json", "/image/99", "/image/-1", "/image/1e9"):
        assert refused(get, address, path) == 404
    assert refused(get, address, "/api/images?low=x") == 400
    assert refused(post, address, "/api/write", {"format": "../../x"}) == 400
    assert refused(post, address, "/api/verdict", {"position": "x"}) == 400
    assert not (folder / "verdicts.jsonl").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no labelling run"):
        build_server(tmp_path, "127.0.0.1", 0)


@pytest.mark.slow
def test_ctrl_c_stops_it_in_one_line(folder):
    command = [sys.executable, "-m", "groundingdino", "label", "--review", folder, "--port", str(free_port())]
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=obey_ctrl_c,
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "(Ctrl-C stops it)" in first and process.returncode == INTERRUPTED
    assert errors == "groundingdino label: interrupted\n"


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_in_a_browser_filter_accept_reject_and_write(browser, address, folder):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def wait(condition):
        return WebDriverWait(browser, SECONDS).until(lambda b: condition())

    def every(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    browser.get(address)
    wait(lambda: len(every("article")) == 12 and len(every("rect")) == 24)
    assert every("article h2")[0].text == "00<b>.png" and not every("article b")
    assert HOSTILE in every("li span")[1].text and browser.title == "Review of labels"
    assert every("article img")[0].get_attribute("naturalWidth") == "60"

    Select(browser.find_element(By.ID, "name")).select_by_visible_text("cat")
    browser.find_element(By.ID, "show").click()
    wait(lambda: len(every("article")) == 12 and len(every("rect")) == 12)
    every("li button")[0].click()
    wait(lambda: every("li.accepted") and every("rect.accepted"))
    every("li button")[3].click()
    wait(lambda: every("li.rejected") and every("rect.rejected"))
    browser.find_element(By.ID, "more").click()
    wait(lambda: len(every("article")) == 14)

    Select(browser.find_element(By.ID, "format")).select_by_visible_text("jsonl")
    browser.find_element(By.ID, "write").click()
    wait(lambda: "1 boxes in 2 images" in browser.find_element(By.ID, "status").text)
    rows = [json.loads(line) for line in (folder / "accepted" / "labels.jsonl").read_text().splitlines()]
    assert [(row["image"], len(row["detections"])) for row in rows] == [("00<b>.png", 1), ("01.png", 0)]
    assert browser.title == "Review of labels"  # nothing in a name was run
