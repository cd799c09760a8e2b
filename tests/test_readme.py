"""The README stays short, names every file, and shows what the table of releases says."""

from pathlib import Path

import pytest

from groundingdino.checkpoints import zoo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLUMNS = {"COCO": "coco val2017", "LVIS minival": "lvis minival", "RefCOCO val P@1": "refcoco val"}


def models_table() -> str:
    """The released weights with their last published figures, as Markdown."""
    lines = [f"| Name | Trained on | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for release in zoo.RELEASES:
        if release.url and not release.same_as:
            figures = [zoo.published(release.title, benchmark) for benchmark in COLUMNS.values()]
            cells = " | ".join(str(row[0]) if row else "" for row in figures)
            lines.append(f"| `{release.name}` | {release.trained_on} | {cells} |")
    return "\n".join(lines)


def test_the_models_table_is_the_zoos():
    assert models_table() in README


def test_the_code_map_names_every_file():
    code_map = README.split("## Code map")[1].replace("/", " ").replace("{", " ").replace("}", " ")
    words = set(
        code_map.replace(":", " ").replace(",", " ").replace(";", " ").replace("(", " ").replace(")", " ").split()
    )
    files = [path for path in (ROOT / "groundingdino").rglob("*.py") if not path.name.startswith("__")]
    assert not [str(path.relative_to(ROOT)) for path in files if path.stem not in words]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_pages_have_no_line_over_160_characters(page: Path):
    assert not [n for n, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 160]


def test_the_readme_has_at_most_130_lines():
    assert len(README.splitlines()) <= 130
