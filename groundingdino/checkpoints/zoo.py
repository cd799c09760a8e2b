"""The released checkpoints: where they are, what they were trained on, and what was published about them.

A release can have several published values of one benchmark, each under its source. Releases without a URL are figures
only: their weights were never published.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PRECISION = ("P@1", "P@5", "P@10")
RECALL = ("R@1", "R@5", "R@10")
FIXED_AP = ("AP", "APr", "APc", "APf")
SPLITS = {"refcoco": ("val", "testA", "testB"), "refcoco+": ("val", "testA", "testB"), "refcocog": ("val", "test")}
# What the numbers of a figure are, all in percent, and how they were measured.
BENCHMARKS: dict[str, tuple[tuple[str, ...], str]] = {
    "coco val2017": (("AP",), "box AP, the 80 names as one prompt, best 300 boxes"),
    "lvis minival": (FIXED_AP, "fixed AP, `chunk_sizes` names in a prompt, best 300 boxes of each"),
    "lvis val1.0": (FIXED_AP, "fixed AP, `chunk_sizes` names in a prompt, best 300 boxes of each"),
    "odinw13": (("AP",), "mean box AP over 13 data sets"),
    "odinw35": (("AP",), "mean box AP over 35 data sets"),
    "flickr30k val": (RECALL, "any-box recall at IoU 0.5"),
    "flickr30k test": (RECALL, "any-box recall at IoU 0.5"),
    **{
        f"{data} {split}": (PRECISION, "IoU 0.5, the score of a box is that of its best token")
        for data, splits in SPLITS.items()
        for split in splits
    },
    **{f"grefcoco {split}": (("Pr@(F1=1)", "N-acc"), "score threshold 0.7") for split in ("val", "testA", "testB")},
    "dod full": (("AP concat", "AP parallel"), "Described Object Detection, all descriptions"),
    "dod presence": (("AP concat", "AP parallel"), "Described Object Detection, descriptions of what is there"),
    "dod absence": (("AP concat", "AP parallel"), "Described Object Detection, descriptions of what is missing"),
    "coco 48/17": (
        ("AP", "AP base", "AP novel", "AP50", "AP50 base", "AP50 novel"),
        "box AP over 48 names that were trained on and 17 that were not",
    ),
    "rtts": (("AP",), "box AP, traffic in haze"),
    "ruod": (("AP",), "box AP, under water"),
    "brain tumor": (("AP",), "box AP"),
    "cityscapes": (("AP",), "box AP"),
    "people in painting": (("AP",), "box AP"),
}

# Sources
MMDET = "mmdetection configs/mm_grounding_dino/README.md (commit df45dbe2)"
MMDET_FIRST = "mmdetection configs/mm_grounding_dino/README.md, first release"
MMDET_GROUNDING_DINO = "mmdetection configs/grounding_dino/README.md"
LLMDET = "LLMDet README"
LLMDET_80 = "LLMDet README, 80 names in a prompt"
PAPER = "Grounding DINO (arXiv 2303.05499)"

# Columns: the benchmarks from coco val2017 to flickr30k test
DETECTION = """
mm-gdino-t-o365  | 48.5
mm-gdino-t       | 50.4 | 35.7/28.1/30.2/42.0 | 27.0/17.1/22.4/36.5 | 45.3 | 20.2 | 85.5/95.6/97.2 | 86.2/95.7/97.4
mm-gdino-t-grit  | 50.5 | 36.5/26.6/32.4/41.8 | 27.1/17.3/22.6/36.4 | 51.1 | 22.8 | 86.7/95.8/97.6 | 87.0/96.2/97.7
mm-gdino-t-v3det | 50.6 | 40.5/33.0/36.0/45.9 | 30.6/21.5/25.5/40.2 | 51.6 | 21.4 | 85.9/95.7/97.4 | 86.3/95.7/97.4
mm-gdino-t-all   | 50.4 | 41.4/34.2/37.4/46.2 | 31.9/23.6/27.6/40.5 | 53.3 | 23.2 | 86.7/96.0/97.6 | 87.2/96.2/97.7
mm-gdino-b       | 52.5
mm-gdino-b-all   | 60.1 | 63.4/65.6/62.6/63.7 | 57.0/54.4/55.9/59.2 | 54.5 | 23.3 | 87.1/96.2/97.7 | 87.8/96.5/97.9
mm-gdino-l       | 53.0
mm-gdino-l-all   | 61.1 | 65.2/65.3/65.1/65.4 | 59.1/56.0/58.6/60.9 | 56.5 | 25.2 | 87.3/96.0/97.6 | 87.8/96.3/97.8
groundingdino-t  | 48.4 | 28.8/18.8/24.2/34.7 | 20.1/10.1/15.3/29.9 | 51.4 | 22.7 | 87.8/96.6/98.0 | 88.1/96.9/98.2
groundingdino-b  | 56.9 | 34.7/27.9/33.4/37.2 | 26.7/19.0/24.1/32.9 | 62.1 | 49.2 | 87.5/96.5/98.1 | 87.7/96.8/98.2
mm-gdino-t-coco  | 58.2
mm-gdino-t-coco-open | 54.7
mm-gdino-t-lvis  |      | 58.7/50.7/58.8/60.1 | 51.7/45.2/50.2/56.1
mm-gdino-t-lvis-866 |   | 57.1/43.2/57.4/59.3
"""
# Columns: the benchmarks from refcoco val to dod absence
REFERRING = """
mm-gdino-t | 53.1/89.9/94.7 | 59.7/91.5/95.9 | 46.4/86.9/92.2 | 53.1/87.0/92.8 | 58.9/87.3/92.9 | 47.9/84.3/91.0 \
| 61.2/92.6/96.1 | 61.1/93.3/96.7 | 39.8/84.7 | 26.3/89.0 | 31.3/84.8 | 15.6/21.7 | 16.4/21.3 | 13.4/22.8
mm-gdino-t-grit | 53.4/90.3/95.5 | 58.8/91.7/96.2 | 46.8/87.7/93.3 | 53.5/88.0/93.7 | 59.0/88.1/93.7 | 47.9/85.5/92.7 \
| 62.7/93.3/97.0 | 62.6/94.9/97.1 | 40.7/89.7 | 26.0/91.9 | 30.6/90.2 | 17.0/22.5 | 17.9/21.5 | 14.5/25.6
mm-gdino-t-v3det | 52.1/89.8/95.0 | 58.4/86.8/95.6 | 45.4/86.2/92.6 | 52.5/86.8/93.2 | 58.1/86.7/93.5 | 46.9/83.7/91.5 \
| 61.7/92.9/96.6 | 61.0/93.1/96.8 | 40.3/88.8 | 25.4/91.8 | 30.7/89.9 | 16.2/22.3 | 16.6/21.6 | 14.8/24.1
mm-gdino-t-all | 53.1/89.7/95.1 | 59.1/91.0/95.5 | 46.8/87.8/93.6 | 52.7/87.7/93.5 | 58.7/87.2/93.1 | 48.4/85.8/92.1 \
| 62.9/93.3/97.2 | 62.9/93.9/97.4 | 41.0/91.3 | 26.1/93.0 | 30.4/92.3 | 17.5/22.9 | 18.0/21.9 | 15.9/26.0
mm-gdino-b-all | 80.3/98.6/99.5 | 85.3/99.5/99.7 | 73.6/98.3/99.4 | 83.5/98.3/99.4 | 89.3/99.3/99.7 | 76.8/97.5/99.0 \
| 85.2/98.6/99.2 | 86.2/98.9/99.4 | 46.1/76.6 | 38.6/74.1 | 36.8/76.7 | 19.8/24.0
mm-gdino-l-all | 79.1/98.7/99.4 | 85.1/99.3/99.8 | 72.6/98.0/99.4 | 82.3/98.3/99.4 | 88.4/99.3/99.8 | 74.5/97.6/99.2 \
| 84.4/98.5/99.3 | 84.3/98.9/99.4 | 45.3/79.9 | 37.6/76.0 | 35.5/80.8 | 20.9/26.1
groundingdino-t | 50.8/89.5/94.9 | 57.4/91.3/95.6 | 45.0/86.5/92.9 | 51.6/86.4/92.6 | 57.3/86.7/92.7 | 46.4/84.1/90.7 \
| 60.4/92.1/96.2 | 59.7/92.1/96.3 | 41.3/91.8 | 27.2/90.2 | 29.7/93.5 | 17.2/22.3 | 17.8/21.0 | 15.4/26.0
groundingdino-b | 84.6/97.9/99.1 | 88.7/98.9/99.6 | 80.5/96.6/98.5 | 73.7/96.6/98.7 | 82.2/97.9/99.1 | 64.1/94.3/97.5 \
| 78.3/97.3/98.6 | 78.1/97.1/98.7 | 46.2/81.4 | 38.6/76.2 | 35.9/80.6 | 20.2/25.0
mm-gdino-t-refcoco | 89.5/98.6/99.4 | 91.4/99.2/99.8 | 86.6/97.9/99.1 | 82.1/97.8/99.2 | 87.5/99.2/99.7 \
| 74.0/96.3/96.4 | 85.5/98.4/99.4 | 85.8/98.6/99.4 | 45.1/64.7 | 42.5/65.5 | 40.3/63.2
mm-gdino-l-refcoco | 91.2/98.6/99.3 | 92.9/99.5/99.8 | 88.0/98.0/99.0
"""
# Beside the tables above: other values of the same, and other sources. {name: {source: {benchmark: figure}}}
FURTHER = {
    "mm-gdino-t-all": {
        # "MM-GDINO (zero-shot)" of the fine-tuning tables; their configs start from this one.
        MMDET: {
            "coco 48/17": "51.1/48.4/58.9/66.7/64.0/74.2",
            "rtts": "49.8",
            "ruod": "29.8",
            "cityscapes": "34.2",
            "people in painting": "23.1",
        },
        MMDET_FIRST: {"odinw35": "28.4"},
    },
    "mm-gdino-t-coco-48": {MMDET: {"coco 48/17": "57.2/56.1/60.4/73.6/73.0/75.3"}},
    "mm-gdino-t-rtts": {MMDET: {"rtts": "69.1"}},
    "mm-gdino-t-ruod": {MMDET: {"ruod": "65.5"}},
    "mm-gdino-t-brain-tumor": {MMDET: {"brain tumor": "47.5"}},
    "mm-gdino-t-cityscapes": {MMDET: {"cityscapes": "51.5"}},
    "mm-gdino-t-people-in-painting": {MMDET: {"people in painting": "38.9"}},
    "mm-gdino-b-all": {MMDET_FIRST: {"coco val2017": "59.5"}},
    "mm-gdino-l-all": {MMDET_FIRST: {"coco val2017": "60.3"}},
    "groundingdino-t": {MMDET_GROUNDING_DINO: {"coco val2017": "48.5"}},
    "groundingdino-t-coco": {MMDET_GROUNDING_DINO: {"coco val2017": "58.1"}},
    "groundingdino-b-coco": {MMDET_GROUNDING_DINO: {"coco val2017": "59.7"}},
    "groundingdino-t-refcoco": {
        PAPER: dict(
            zip(
                (f"{data} {split}" for data, splits in SPLITS.items() for split in splits),
                ("89.2", "91.9", "86.0", "81.1", "87.4", "74.7", "84.2", "84.9"),
                strict=True,
            )
        )
    },
    "groundingdino-l-refcoco": {
        PAPER: dict(
            zip(
                (f"{data} {split}" for data, splits in SPLITS.items() for split in splits),
                ("90.6", "93.2", "88.2", "82.8", "89.0", "75.9", "86.1", "87.0"),
                strict=True,
            )
        )
    },
    "llmdet-t": {LLMDET: {"lvis minival": "44.7/37.3/39.5/50.7", "lvis val1.0": "34.9/26.0/30.1/44.3"}},
    "llmdet-b": {LLMDET: {"lvis minival": "48.3/40.8/43.1/54.3", "lvis val1.0": "38.5/28.2/34.3/47.8"}},
    "llmdet-l": {
        LLMDET: {"lvis minival": "51.1/45.1/46.1/56.6", "lvis val1.0": "42.0/31.6/38.8/50.2"},
        LLMDET_80: {"lvis minival": "52.4/44.3/48.8/57.1", "lvis val1.0": "43.2/32.8/40.5/50.8"},
    },
}


@dataclass(frozen=True)
class Release:
    """One released checkpoint."""

    name: str  # what `load_model` takes
    title: str  # as reports show it
    preset: str  # its size
    trained_on: str
    url: str = ""  # empty where only figures were published
    sha256: str = ""  # of the file, hexadecimal; only the beginning where no more is known, empty where nothing is
    hub: tuple[str, ...] = ()  # repositories of the Hugging Face hub with the same weights in transformers' naming
    tensors: str = ""  # SHA-256 over the tensors in our naming (`convert.tensor_digest`); empty where it is not known
    chunk_sizes: tuple[int, ...] = (40,)  # names in a prompt of LVIS, for each of which figures may have been published
    same_as: str = ""  # the release with these weights in another format, whose figures are this one's too

    @property
    def file(self) -> str:
        """The name of the released file, empty where there is none."""
        return self.url.rpartition("/")[2]

    @property
    def published(self) -> Mapping[str, Mapping[str, tuple[float, ...]]]:
        """{source: {benchmark: numbers in percent}}, the latest source first; see `BENCHMARKS`."""
        return PUBLISHED.get(self.same_as or self.name, {})


def _published() -> dict[str, dict[str, dict[str, tuple[float, ...]]]]:
    names = list(BENCHMARKS)
    first = names.index("refcoco val")
    published: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    for table, columns in ((DETECTION, names[:first]), (REFERRING, names[first:])):
        for line in table.strip().splitlines():
            name, *cells = (cell.strip() for cell in line.split("|"))
            figures = {column: _numbers(cell) for column, cell in zip(columns, cells, strict=False) if cell}
            published.setdefault(name, {}).setdefault(MMDET, {}).update(figures)
    for name, sources in FURTHER.items():
        for source, rows in sources.items():
            figures = {column: _numbers(cell) for column, cell in rows.items()}
            published.setdefault(name, {}).setdefault(source, {}).update(figures)
    return published


def _numbers(cell: str) -> tuple[float, ...]:
    return tuple(map(float, cell.split("/")))


PUBLISHED = _published()
MMDET_URL = "https://download.openmmlab.com/mmdetection/v3.0"
IDEA_URL = "https://github.com/IDEA-Research/GroundingDINO/releases/download"
LLMDET_URL = "https://huggingface.co/fushh7/LLMDet/resolve/main"
SEEN = ", so not zero-shot on these"
EVERYTHING = f"V3Det, COCO, LVIS, RefCOCO/+/g and more{SEEN}"
CAP4M = "Objects365, GoldG, Cap4M"
COGCOOR = f"COCO, Objects365, GoldG, Cap4M, Open Images, ODinW-35, RefCOCO{SEEN}"


def _mm_gdino(name: str, title: str, trained_on: str, file: str, hub: str) -> Release:
    """A file of mmdetection's model zoo, which lies in a folder named after its config; "{}" in `file` is the folder.

    Such a file's name ends with the beginning of its SHA-256.
    """
    folder, _, rest = file.partition(" ")
    url = f"{MMDET_URL}/mm_grounding_dino/{folder}/{rest.format(folder)}"
    owners = ("openmmlab-community", "rziga")
    return Release(
        name,
        title,
        f"swin_{name.split('-')[2]}",
        trained_on,
        url,
        url.removesuffix(".pth").rpartition("-")[2],
        tuple(f"{owner}/mm_grounding_dino_{hub}" for owner in owners),
    )


RELEASES = (
    _mm_gdino(
        "mm-gdino-t",
        "MM-GDINO-T, O365+GoldG",
        "Objects365, GoldG",
        "grounding_dino_swin-t_pretrain_obj365_goldg {}_20231122_132602-4ea751ce.pth",
        "tiny_o365v1_goldg",
    ),
    _mm_gdino(
        "mm-gdino-t-grit",
        "MM-GDINO-T, O365+GoldG+GRIT9M",
        "Objects365, GoldG, GRIT-9M",
        "grounding_dino_swin-t_pretrain_obj365_goldg_grit9m {}_20231128_200818-169cc352.pth",
        "tiny_o365v1_goldg_grit",
    ),
    _mm_gdino(
        "mm-gdino-t-v3det",
        "MM-GDINO-T, O365+GoldG+V3Det",
        "Objects365, GoldG, V3Det",
        "grounding_dino_swin-t_pretrain_obj365_goldg_v3det {}_20231218_095741-e316e297.pth",
        "tiny_o365v1_goldg_v3det",
    ),
    _mm_gdino(
        "mm-gdino-t-all",
        "MM-GDINO-T, O365+GoldG+GRIT9M+V3Det",
        "Objects365, GoldG, GRIT-9M, V3Det",
        "grounding_dino_swin-t_pretrain_obj365_goldg_grit9m_v3det {}_20231204_095047-b448804b.pth",
        "tiny_o365v1_goldg_grit_v3det",
    ),
    _mm_gdino(
        "mm-gdino-b",
        "MM-GDINO-B, O365+GoldG+V3Det",
        "Objects365, GoldG, V3Det",
        "grounding_dino_swin-b_pretrain_obj365_goldg_v3det "
        "grounding_dino_swin-b_pretrain_obj365_goldg_v3de-f83eef00.pth",
        "base_o365v1_goldg_v3det",
    ),
    _mm_gdino(
        "mm-gdino-b-all",
        "MM-GDINO-B, all",
        f"Objects365, GoldG, {EVERYTHING}",
        "grounding_dino_swin-b_pretrain_all {}-f9818a7c.pth",
        "base_all",
    ),
    _mm_gdino(
        "mm-gdino-l",
        "MM-GDINO-L, O365V2+OpenImageV6+GoldG",
        "Objects365 v2, Open Images v6, GoldG",
        "grounding_dino_swin-l_pretrain_obj365_goldg {}-34dcdc53.pth",
        "large_o365v2_oiv6_goldg",
    ),
    _mm_gdino(
        "mm-gdino-l-all",
        "MM-GDINO-L, all",
        f"Objects365 v2, Open Images v6, GoldG, {EVERYTHING}",
        "grounding_dino_swin-l_pretrain_all {}-56d69e78.pth",
        "large_all",
    ),
    Release(
        "groundingdino-t",
        "Grounding DINO-T (IDEA)",
        "swin_t",
        CAP4M,
        f"{IDEA_URL}/v0.1.0-alpha/groundingdino_swint_ogc.pth",
        "3b3ca2563c77c69f651d7bd133e97139c186df06231157a64c507099c52bc799",
        ("IDEA-Research/grounding-dino-tiny",),
    ),
    Release(
        "groundingdino-b",
        "Grounding DINO-B (IDEA)",
        "swin_b",
        COGCOOR,
        f"{IDEA_URL}/v0.1.0-alpha2/groundingdino_swinb_cogcoor.pth",
        "46270f7a822e6906b655b729c90613e48929d0f2bb8b9b76fd10a856f3ac6ab7",
        ("IDEA-Research/grounding-dino-base",),
    ),
    Release(
        "groundingdino-t-mmdet",
        "Grounding DINO-T (IDEA), as mmdet has it",
        "swin_t",
        CAP4M,
        f"{MMDET_URL}/grounding_dino/groundingdino_swint_ogc_mmdet-822d7e9d.pth",
        "822d7e9d",
        same_as="groundingdino-t",
    ),
    Release(
        "groundingdino-b-mmdet",
        "Grounding DINO-B (IDEA), as mmdet has it",
        "swin_b",
        COGCOOR,
        f"{MMDET_URL}/grounding_dino/groundingdino_swinb_cogcoor_mmdet-55949c9c.pth",
        "55949c9c",
        same_as="groundingdino-b",
    ),
    *(
        Release(
            f"groundingdino-{size}-coco",
            f"Grounding DINO-{size.upper()}, fine-tuned on COCO by mmdet",
            f"swin_{size}",
            f"{data}, then COCO",
            f"{MMDET_URL}/grounding_dino/{config}/{config}_{run}.pth",
            run.rpartition("-")[2],
        )
        for size, data, run in (
            ("t", CAP4M, "20230921_152544-5f234b20"),
            ("b", COGCOOR.removesuffix(SEEN), "20230921_153201-f219e0c0"),
        )
        for config in (f"grounding_dino_swin-{size}_finetune_16xb2_1x_coco",)
    ),
    *(
        Release(
            f"llmdet-{size[0]}",
            f"LLMDet-{size[0].upper()}",
            f"swin_{size[0]}",
            "GroundingCap-1M, from MM-GDINO",
            f"{LLMDET_URL}/{size}.pth",
            hub=(f"iSEE-Laboratory/llmdet_{size}",),
            chunk_sizes=(40, 80),
        )
        for size in ("tiny", "base", "large")
    ),
    Release("mm-gdino-t-o365", "MM-GDINO-T, O365", "swin_t", "Objects365"),
    Release(
        "mm-gdino-t-refcoco",
        "MM-GDINO-T, fine-tuned on each RefCOCO",
        "swin_t",
        "RefCOCO, + and g and gRefCOCO, each alone",
    ),
    Release("mm-gdino-l-refcoco", "MM-GDINO-L, fine-tuned on RefCOCO", "swin_l", "RefCOCO"),
    Release("mm-gdino-t-coco", "MM-GDINO-T, fine-tuned on COCO", "swin_t", "COCO"),
    Release("mm-gdino-t-coco-open", "MM-GDINO-T, trained on with COCO", "swin_t", "COCO, with its names as text"),
    Release("mm-gdino-t-coco-48", "MM-GDINO-T, fine-tuned on 48 names of COCO", "swin_t", "COCO, 48 names"),
    Release("mm-gdino-t-lvis", "MM-GDINO-T, fine-tuned on LVIS", "swin_t", "LVIS"),
    Release("mm-gdino-t-lvis-866", "MM-GDINO-T, fine-tuned on 866 names of LVIS", "swin_t", "LVIS, 866 names"),
    Release("mm-gdino-t-rtts", "MM-GDINO-T, fine-tuned on RTTS", "swin_t", "RTTS"),
    Release("mm-gdino-t-ruod", "MM-GDINO-T, fine-tuned on RUOD", "swin_t", "RUOD"),
    Release("mm-gdino-t-brain-tumor", "MM-GDINO-T, fine-tuned on Brain Tumor", "swin_t", "Brain Tumor"),
    Release("mm-gdino-t-cityscapes", "MM-GDINO-T, fine-tuned on Cityscapes", "swin_t", "Cityscapes"),
    Release(
        "mm-gdino-t-people-in-painting", "MM-GDINO-T, fine-tuned on People in Painting", "swin_t", "People in Painting"
    ),
    Release("groundingdino-t-refcoco", "Grounding DINO-T, fine-tuned on each RefCOCO", "swin_t", "RefCOCO, + and g"),
    Release("groundingdino-l-refcoco", "Grounding DINO-L, fine-tuned on each RefCOCO", "swin_l", "RefCOCO, + and g"),
)
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
BY_NAME = {release.name: release for release in RELEASES}
RECIPE_START = BY_NAME["mm-gdino-b"]  # the weights that the RefCOCO recipe starts from


def is_repository(path: Path) -> bool:
    """Whether a path that does not exist reads as `owner/name`, a repository of the Hugging Face hub."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path))
    return named is not None and path.suffix not in FILE_SUFFIXES and not path.parent.is_dir()


def identify(sha256: str = "", hub: str = "", tensors: str = "") -> Release | None:
    """The release with this SHA-256 of its file, hub repository, or digest of its tensors; None for other weights."""
    for release in RELEASES:
        by_file = release.sha256 and sha256.startswith(release.sha256)
        if by_file or hub in release.hub or (release.tensors and tensors == release.tensors):
            return release
    return None


def by_title(title: str | None) -> Release | None:
    """The release of this title; None without one."""
    return next((release for release in RELEASES if release.title == title), None)


def published(title: str | None, benchmark: str) -> tuple[float, ...] | None:
    """What was published last for the release of this title, in percent (see `BENCHMARKS`); None without a figure."""
    release = by_title(title)
    sources = release.published.values() if release else ()
    return next((rows[benchmark] for rows in sources if benchmark in rows), None)
