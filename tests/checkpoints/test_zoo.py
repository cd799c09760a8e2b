"""The records of the releases hang together, and say what was published."""

import json

import pytest

from groundingdino.checkpoints import zoo
from groundingdino.config import MODEL_PRESETS
from groundingdino.training.recipes import refcoco


def test_names_titles_and_files_are_unique():
    for field in ("name", "title", "url", "sha256"):
        values = [getattr(release, field) for release in zoo.RELEASES if getattr(release, field)]
        assert len(values) == len(set(values)), field


def test_every_release_has_a_preset_and_figures_or_weights():
    for release in zoo.RELEASES:
        assert release.preset in MODEL_PRESETS and (release.url or release.published), release.name
        assert not release.same_as or release.same_as in zoo.BY_NAME


@pytest.mark.parametrize("name", zoo.PUBLISHED)
def test_figures_belong_to_a_release_and_have_the_numbers_of_their_benchmark(name):
    assert name in zoo.BY_NAME
    for rows in zoo.PUBLISHED[name].values():
        for benchmark, numbers in rows.items():
            assert len(numbers) in (1, len(zoo.BENCHMARKS[benchmark][0])), benchmark
            assert all(0 < number <= 100 for number in numbers)
            if benchmark.startswith(("refcoco", "flickr30k")):
                assert list(numbers) == sorted(numbers)  # at 1, 5, 10


def test_mmdetections_files_end_with_the_beginning_of_their_hash():
    for release in zoo.RELEASES:
        if "openmmlab" in release.url:
            assert release.file.endswith(f"-{release.sha256}.pth")


def test_figures_are_found_by_title_and_benchmark():
    assert zoo.published("MM-GDINO-B, all", "refcoco testA") == (85.3, 99.5, 99.7)
    assert zoo.published("MM-GDINO-B, all", "refcoco+ testA") == (89.3, 99.3, 99.7)
    assert zoo.published("MM-GDINO-B, all", "refcoco train") is None
    assert zoo.published(None, "refcoco val") is None


def test_both_published_values_of_one_benchmark_are_kept_with_their_sources():
    for name, later, earlier in (("mm-gdino-b-all", 60.1, 59.5), ("mm-gdino-l-all", 61.1, 60.3)):
        published = zoo.BY_NAME[name].published
        assert published[zoo.MMDET]["coco val2017"] == (later,)
        assert published[zoo.MMDET_FIRST]["coco val2017"] == (earlier,)


def test_a_release_is_known_by_its_hash_or_its_repository():
    assert zoo.identify(sha256="f9818a7c" + "0" * 56) is zoo.BY_NAME["mm-gdino-b-all"]
    assert zoo.identify(hub="rziga/mm_grounding_dino_large_all") is zoo.BY_NAME["mm-gdino-l-all"]
    assert zoo.identify(sha256="0" * 64, hub="someone/else", tensors="1" * 64) is None
    assert zoo.identify() is None


def test_the_recipe_starts_from_the_file_of_the_zoo():
    assert refcoco().init_from.name == zoo.RECIPE_START.file


def test_the_records_can_be_written_as_json():
    assert json.loads(json.dumps(zoo.PUBLISHED))


def test_llmdets_figures_name_the_sizes_of_their_prompts():
    assert zoo.BY_NAME["llmdet-l"].chunk_sizes == (40, 80)
    published = zoo.BY_NAME["llmdet-l"].published
    assert published[zoo.LLMDET]["lvis minival"][0] == 51.1 and published[zoo.LLMDET_80]["lvis minival"][0] == 52.4


def test_fine_tunes_of_mm_grounding_dino_have_figures_and_no_weights():
    """None was ever released."""
    tuned = [
        release for release in zoo.RELEASES if release.title.startswith("MM-GDINO") and "fine-tuned" in release.title
    ]
    assert len(tuned) == 11 and all(release.published and not release.url and not release.hub for release in tuned)
