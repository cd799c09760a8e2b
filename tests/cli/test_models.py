"""The list of released checkpoints."""

import json

from groundingdino.checkpoints import zoo
from groundingdino.cli.models import main


def test_every_release_with_weights_is_listed_with_its_figures(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [release.name for release in zoo.RELEASES if release.url]
    assert any(line.split()[:6] == ["mm-gdino-b-all", "swin_b", "no", "60.1", "63.4", "80.3"] for line in lines)


def test_all_that_is_known_comes_as_json(capsys):
    assert main(["--json", "--all"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == zoo.BY_NAME.keys()
    published = rows["mm-gdino-b-all"]["published"]
    assert [source["coco val2017"] for source in published.values()] == [[60.1], [59.5]]
    assert rows["mm-gdino-t-lvis"]["cached"] is False and rows["mm-gdino-t"]["url"].endswith("4ea751ce.pth")
