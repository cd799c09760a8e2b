"""A checkpoint of ours to the Hugging Face hub, with a model card: what it is, its licence, figures and provenance."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from groundingdino.checkpoints import zoo
from groundingdino.checkpoints.model_file import SOURCE_KEY, checked_config, read_metadata
from groundingdino.checkpoints.safetensors_file import TensorFile
from groundingdino.runtime.cache import is_offline
from groundingdino.runtime.files import write_text

RELEASES_LICENSE = "apache-2.0"  # of all in the zoo: IDEA's, mmdetection's and LLMDet's


@dataclass(frozen=True)
class PushOptions:
    """How a repository is to look."""

    license: str = ""  # as the hub names it; empty: of a release, what it was released under
    private: bool = False
    to: Literal["native", "huggingface"] = "native"  # see `convert.convert_file`
    reports: Sequence[Mapping[str, Any]] = ()  # of `evaluate`, for the card


def push(checkpoint: Path, repository: str, options: PushOptions) -> str:
    """Upload a checkpoint of ours to `owner/name`, which is made if it is not there. Returns its URL.

    Token and endpoint are those of huggingface_hub.

    Raises:
        ValueError: one line: no licence, no network, no such owner, no permission, huggingface_hub is not installed.
    """
    release = zoo.by_title(_source(checkpoint).get("release"))
    named_license = options.license or (RELEASES_LICENSE if release else "")
    if not named_license:
        raise ValueError(f"{checkpoint}: weights of your own: name their licence, e.g. --license apache-2.0")
    if is_offline():
        raise ValueError(f"{repository}: the environment forbids the network")
    try:
        from huggingface_hub import HfApi, ModelCard, ModelCardData
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ValueError('huggingface_hub is not installed: pip install "groundingdino[hub]"') from None
    with tempfile.TemporaryDirectory(prefix="groundingdino-push-") as place:
        folder = Path(place) / "repository"
        _write(checkpoint, folder, options.to)
        header = ModelCardData(
            license=named_license,
            library_name="groundingdino" if options.to == "native" else "transformers",
            pipeline_tag="zero-shot-object-detection",
            base_model=release.hub[0] if release and release.hub else None,
        )
        body = "\n".join(_card(checkpoint, repository, release, options))
        write_text(folder / "README.md", str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n")))
        try:
            api = HfApi()
            url = api.create_repo(repository, private=options.private or None, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by groundingdino push")
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"{repository}: the hub does not take it ({reason})") from error
    return str(url)


def _write(checkpoint: Path, folder: Path, to: Literal["native", "huggingface"]) -> None:
    if to == "huggingface":
        from groundingdino.checkpoints.convert import convert_file

        convert_file(checkpoint, folder, to)
        return
    folder.mkdir()
    shutil.copyfile(checkpoint, folder / "model.safetensors")


def _source(checkpoint: Path) -> dict[str, Any]:
    source = json.loads(read_metadata(checkpoint).get(SOURCE_KEY, "{}"))
    return source if isinstance(source, dict) else {}


def _card(checkpoint: Path, repository: str, release: zoo.Release | None, options: PushOptions) -> Iterator[str]:
    """The card's Markdown, without its header."""
    with TensorFile(checkpoint) as file:
        parameters = sum(math.prod(entry.shape) for entry in file.entries.values())
        config = checked_config(file.path, file.metadata)
    yield f"# {repository.rpartition('/')[2]}"
    yield ""
    yield f"Grounding DINO, {config.name}, {parameters:,} parameters: finds in images what words describe."
    yield ""
    yield "```python"
    if options.to == "native":
        yield "import groundingdino as gd"
        yield ""
        yield f'model = gd.load_model("{repository}")'
        yield 'found = model.predict("photo.jpg", categories=["cat", "remote control"])'
    else:
        yield "from transformers import pipeline"
        yield ""
        yield f'detector = pipeline("zero-shot-object-detection", model="{repository}")'
        yield 'found = detector("photo.jpg", candidate_labels=["a cat", "a remote control"])'
    yield "```"
    yield from _measured(options.reports)
    if release is not None:
        yield from _published(release)
    yield from ("", "## Provenance", "")
    yield from (f"- {key}: {json.dumps(value)}" for key, value in (_source(checkpoint) or {"source": None}).items())


def _measured(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not reports:
        return
    yield from ("", "## Measured", "", "| Data | Figure | Percent |", "|---|---|---|")
    for report in reports:
        data = f"{report.get('protocol_name', '')} {report.get('split', '')}".strip()
        shown = {name: value for name, value in report["figures"].items() if value is not None}
        yield from (f"| {data} | {name} | {100 * value:.2f} |" for name, value in shown.items())
    for text in dict.fromkeys(str(report.get("protocol", {}).get("scoring", "")) for report in reports):
        if text:
            yield from ("", f"Scores of expressions: {text}.")


def _published(release: zoo.Release) -> Iterator[str]:
    yield from ("", f"## Published for {release.title}", "", "Not measured here.", "")
    yield from ("| Benchmark | Figures | Percent | Source |", "|---|---|---|---|")
    for source, rows in release.published.items():
        for benchmark, numbers in rows.items():
            names = " / ".join(zoo.BENCHMARKS[benchmark][0][: len(numbers)])
            yield f"| {benchmark} | {names} | {' / '.join(map(str, numbers))} | {source} |"
