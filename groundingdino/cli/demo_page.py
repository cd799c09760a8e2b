"""The page of `groundingdino demo`: try a model in the browser (gradio, extra `demo`).

Works without internet access: no fonts or statistics from elsewhere (gradio's own page asks for one script, and does
without it).
"""

import html
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from groundingdino.inference.predictor import DetectionFilter, EncodedImage, Predictor
from groundingdino.inference.prompts import Categories, Phrases, Prompt, Referring, Spans
from groundingdino.inference.results import to_json
from groundingdino.inference.visualize import comfortable_factor, draw_detections
from groundingdino.inference.vocabulary import Vocabulary
from groundingdino.inputs.images import image_files, open_image
from groundingdino.structures import Detections

HINTS = {
    "categories": "names, separated by commas: cat, remote control",
    "referring": "a sentence about one object: the man on the left",
    "phrases": "a caption, its noun phrases are looked for: a man with a small dog",
    "spans": "a caption with brackets around what to look for: [a dog] next to [a bench]",
}
MODES = tuple(HINTS)
TITLE = "Grounding DINO"
CACHE = (3600, 86400)  # seconds: how often uploads and pictures are looked through, how old they may get
LARGEST_UPLOAD = 64 * 2**20  # bytes
MOST_WAITING = 20  # questions; one is answered at a time
COLUMNS = ["name", "score", "left", "top", "right", "bottom"]


def prompt_of(mode: str, text: str, subject_scoring: bool = False, vocabulary: Vocabulary | None = None) -> Prompt:
    """The prompt that the page's fields mean; names of `vocabulary` have its prompts.

    ValueError where there is nothing to look for.
    """
    if not text.strip():
        raise ValueError(f"type what to look for: {HINTS[mode]}")
    if mode == "categories":
        names = [name.strip() for name in text.split(",") if name.strip()]
        return Categories(names) if vocabulary is None else vocabulary.select(names)
    if mode == "referring":
        return Referring(text.strip(), "subject" if subject_scoring else "max")
    if mode == "phrases":
        return Phrases(text.strip())
    return bracketed(text)


def bracketed(text: str) -> Spans:
    """'[a dog] next to [a bench]' -> the caption without brackets and a span for each pair. ValueError without any."""
    caption, spans = "", []
    for outside, inside in re.findall(r"([^\[\]]*)(?:\[([^\[\]]+)\])?", text):
        caption += outside
        if inside:
            spans.append([(len(caption), len(caption) + len(inside))])
            caption += inside
    if not spans:
        raise ValueError(f"no brackets in {text!r}: {HINTS['spans']}")
    return Spans(caption, spans)


class Answerer:
    """Detections for the page's fields; the image half of the last image is kept for the next question."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._last: tuple[bytes, EncodedImage] | None = None

    def __call__(self, image: Image.Image, prompt: Prompt, limits: DetectionFilter) -> Detections:
        """One image, one prompt."""
        content = image.tobytes() + str(image.size).encode()
        last = self._last
        if last is None or last[0] != content:
            last = self._last = (content, self._predictor.encode_image(image))
        (found,) = self._predictor.stream([last[1]], prompt, limits)
        return found


def as_text(text: object) -> str:
    """What shows as this text in a message or a title of the page, which take HTML and Markdown."""
    return re.sub(r"([\\`*_\[\]#!|~$])", lambda found: f"&#{ord(found[1])};", html.escape(str(text)))


def as_rows(found: Detections, folder: str) -> tuple[list[list[Any]], str]:
    """The page's table of detections, and the JSON file of them that is left in `folder`."""
    rows = to_json(found)
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=folder, delete=False) as file:
        json.dump(rows, file, indent=1)
    return [[row["name"], round(row["score"], 3), *(round(x) for x in row["box"])] for row in rows], file.name


def build_page(predictor: Predictor, samples: Path | None = None, vocabulary: Vocabulary | None = None) -> Any:
    """The page as a `gradio.Blocks`, to be launched.

    Args:
        predictor: answers the questions.
        samples: folder of pictures to choose from.
        vocabulary: names to begin with, and their prompts.
    Raises:
        ValueError: gradio is not installed, or no image in the folder.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError('the demo needs gradio: pip install "groundingdino[demo]"') from error

    answer = Answerer(predictor)
    folder = tempfile.TemporaryDirectory(prefix="groundingdino-demo-")  # removed with the page

    def find(
        path: str | None, mode: str, text: str, subject: bool, threshold: float, top_k: float
    ) -> tuple[Image.Image, list[list[Any]], Any]:
        try:
            if path is None:
                raise ValueError("upload an image or pick a sample")
            prompt = prompt_of(mode, text, subject, vocabulary)
            image = open_image(path)
            one = mode == "referring"
            found = answer(image, prompt, DetectionFilter(0.0 if one else threshold, 1 if one else int(top_k)))
        except ValueError as error:
            raise gr.Error(as_text(error), print_exception=False) from error
        picture = draw_detections(image, found, enlarge=comfortable_factor(image.size))
        table, file = as_rows(found, folder.name)
        return picture, table, gr.DownloadButton(value=file, interactive=True)

    def show_mode(mode: str) -> tuple[Any, Any, Any, Any]:
        many = mode != "referring"
        slider = gr.Slider(visible=many)
        return gr.Textbox(info=HINTS[mode]), gr.Checkbox(visible=not many), slider, slider

    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["monospace"])
    with gr.Blocks(title=TITLE, theme=theme, analytics_enabled=False, delete_cache=CACHE) as page:
        page.files = folder  # lives as long as the page
        gr.Markdown(f"# {TITLE}\n{as_text(predictor.model.config.name)} on {predictor.device}")
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    type="filepath", image_mode=None, label="image", elem_id="image", sources=["upload", "clipboard"]
                )
                if samples is not None:
                    gr.Examples([[str(path)] for path in image_files(samples)], [image], label="samples")
                mode = gr.Radio(MODES, value=MODES[0], label="mode", elem_id="mode")
                names = "" if vocabulary is None else ", ".join(vocabulary.shown)
                text = gr.Textbox(names, label="look for", info=HINTS[MODES[0]], elem_id="text")
                subject = gr.Checkbox(label="score the subject phrase only", visible=False, elem_id="subject")
                threshold = gr.Slider(0, 1, value=0.3, step=0.01, label="threshold", elem_id="threshold")
                top_k = gr.Slider(1, 300, value=50, step=1, label="at most", elem_id="top_k")
                button = gr.Button("Find", variant="primary", elem_id="find")
            with gr.Column():
                picture = gr.Image(type="pil", format="png", label="found", interactive=False, elem_id="picture")
                rows = gr.Dataframe(headers=COLUMNS, label="detections", interactive=False, elem_id="rows")
                download = gr.DownloadButton("Download JSON", interactive=False, elem_id="download")
        mode.change(show_mode, mode, [text, subject, threshold, top_k])
        fields = [image, mode, text, subject, threshold, top_k]
        gr.on([button.click, text.submit], find, fields, [picture, rows, download])
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)
