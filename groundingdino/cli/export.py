"""Write a model as an ONNX file, and compare onnxruntime's answers with the model's own.

    groundingdino export model.safetensors out/ --size 800 1333
    groundingdino export model.safetensors out/ --images photo.jpg --caption "a cat. remote control."
    groundingdino export model.safetensors out/ --categories names.txt
    groundingdino export model.safetensors out/ --dynamic          for images of any size
    groundingdino export model.safetensors out/ --to atc           for Ascend's ATC, on a machine with CANN

The folder gets model.onnx (or, with --halves, three graphs), tokenizer.json and example.py, which runs them without
this package. Needs the extra: pip install "groundingdino[export]". Exit code 1: an answer differs by more than
0.001 (in float16 0.02), given the same proposals, or the graph chose proposals that score less by so much.
"""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from groundingdino.cli import console, loading

if TYPE_CHECKING:
    from groundingdino.inference import export, export_check
    from groundingdino.model.detector import GroundingDINO


@dataclass(frozen=True)
class Arguments:
    """What to export, in which form, and what to compare on."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """a .safetensors file"""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """a new or empty folder"""
    to: Literal["onnx", "atc"] = "onnx"
    """onnx, or atc: ONNX in the form that Ascend's compiler takes, with its commands in atc.sh"""
    form: Literal["text", "x-anylabeling"] = "text"
    """names of the inputs: ours, or those that X-AnyLabeling feeds (with its .yaml)"""
    categories: str | None = None
    """names that become part of the graph, with a score for each and no logits: names.txt, names.yaml or coco, ..."""
    halves: bool = False
    """three graphs: image.onnx once for each image, text.onnx once for each caption, detect.onnx for each pair"""
    size: tuple[int, int] = (800, 1333)
    """height and width of the image that the graph takes; a smaller one is padded with zeros"""
    dynamic: bool = False
    """any height and width from 65 pixels; --size is then what a landscape image is fitted into to compare on it"""
    opset: int = 20
    """version of ONNX's operators; 20 or later"""
    fp16: bool = False
    """weights and arithmetic in half precision"""
    images: tuple[Path, ...] = ()
    """images to compare on; default is a drawn scene"""
    caption: str = "a red circle. the largest square."
    """caption to compare with"""


def export_model(arguments: Arguments) -> int:
    """Export, compare, report. The exit code."""
    checkpoint = loading.regular_file(arguments.checkpoint)
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{" and ".join(missing)} missing: pip install "groundingdino[export]"')
    if arguments.opset < 20:
        raise ValueError(f"opset {arguments.opset}: 20 is the first with GridSample and Gelu as they are needed here")
    wanted = (arguments.form != "text", arguments.categories is not None, arguments.halves)
    options_asked = ("--form x-anylabeling", "--categories", "--halves")
    chosen = [name for name, asked in zip(options_asked, wanted, strict=True) if asked]
    if arguments.to == "atc" and arguments.fp16:
        raise ValueError("--to atc and --fp16 exclude each other: ATC itself chooses the precision")
    if arguments.to == "atc" and arguments.dynamic:
        raise ValueError("--to atc and --dynamic exclude each other: ATC compiles for one size")
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other: export twice")

    from groundingdino.checkpoints.model_file import load_detector
    from groundingdino.inference import atc, export, export_check
    from groundingdino.inputs.images import open_image
    from groundingdino.runtime.files import atomic_folder, write_text

    # They tell of every operator that they leave as it is, and of every size that they cannot compare.
    for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.fx.experimental.symbolic_shapes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pictures = [open_image(path) for path in arguments.images] or [_scene()]
    model = load_detector(checkpoint).eval()
    forms = export.halves(model) if arguments.halves else {"model.onnx": _form(arguments, model)}
    options = export.Options(arguments.size, arguments.opset, arguments.fp16, arguments.dynamic)
    text = export.encode_caption(arguments.caption)
    given = [(export.fitted_image(picture, options), text) for picture in pictures]
    with atomic_folder(arguments.folder) as folder:
        export.write_onnx(forms, folder, options)
        if arguments.form == "x-anylabeling":
            write_text(folder / "x-anylabeling.yaml", _settings(arguments, model.config.name))
        if arguments.to == "atc":
            commands = [atc.rewrite(folder / file, model.config.max_tokens) for file in forms]
            write_text(folder / "atc.sh", "\n".join(commands) + "\n")
    print(f"wrote {arguments.folder}: {', '.join(sorted(path.name for path in arguments.folder.iterdir()))}")
    graphs = export_check.Graphs(forms, arguments.folder)
    found = [graphs.answer(*each) for each in given]
    del graphs
    tolerance = export_check.HALF_TOLERANCE if arguments.fp16 else export_check.TOLERANCE
    whole = export_check.Model(next(iter(forms.values())), tolerance)
    names = [str(path) for path in arguments.images] or ["a drawn scene"]
    parities = [whole.parity(answer, *each) for answer, each in zip(found, given, strict=True)]
    print("\n".join(f"{name}: {_line(parity)}" for name, parity in zip(names, parities, strict=True)))
    return 0 if all(parity.within for parity in parities) else 1


def _scene():
    from random import Random

    from groundingdino.data.synthetic import make_scene, render

    return render(make_scene(Random(0), size=384))


def _form(arguments: Arguments, model: "GroundingDINO") -> "export.Form":
    from groundingdino.inference import export
    from groundingdino.inference.prompts import resolve
    from groundingdino.inference.vocabulary import read_vocabulary
    from groundingdino.inputs.text import default_tokenizer

    if arguments.categories is not None:
        names = read_vocabulary(arguments.categories)
        return export.CategoryForm(model, resolve(names, default_tokenizer(), model.config.max_tokens))
    return (export.XAnyLabelingForm if arguments.form == "x-anylabeling" else export.TextForm)(model)


def _settings(arguments: Arguments, name: str) -> str:
    """X-AnyLabeling's settings of a custom model."""
    height, width = arguments.size
    rows = {
        "type": "grounding_dino",
        "name": f"mm_groundingdino_{name}",
        "display_name": f"MM-Grounding-DINO ({name})",
        "model_type": "groundingdino_swint_ogc",  # chooses the tokenizer and the longest text; the same for all sizes
        "model_path": "model.onnx",
        "input_width": width,
        "input_height": height,
        "box_threshold": 0.3,
        "text_threshold": 0.25,
    }
    return "".join(f"{key}: {value}\n" for key, value in rows.items())


def _line(parity: "export_check.Parity") -> str:
    from groundingdino.inference.export_check import BEST

    others = (
        f"; {parity.other_proposals} proposals are others, and score" if parity.other_proposals else ", which score"
    )
    return (
        f"largest difference {parity.scores:.1e} (logits or scores), {parity.boxes:.1e} (boxes); "
        f"{parity.rows - parity.rows_apart} of {parity.rows} rows equal with the graph's proposals{others} "
        f"{parity.selection:.0e} less at the most; {parity.same_detections} of the {BEST} "
        f"best detections the same; onnxruntime {parity.seconds:.2f} s, torch {parity.seconds_here:.2f} s"
    )


def main(arguments: Sequence[str], prog: str = "groundingdino export") -> int:
    """The exit code."""
    return console.run(prog, lambda: export_model(console.parse(Arguments, arguments, prog, description=__doc__)))
