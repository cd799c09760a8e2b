"""Published figures of released checkpoints, to be shown beside measured ones.

Source: mmdetection `configs/mm_grounding_dino/README.md` (commit df45dbe2). Protocol: Precision@1/5/10 in percent, IoU
0.5, the score of a box is that of its best token. The "all" checkpoints have seen RefCOCO in training.
"""

Row = tuple[float, ...]  # Precision@1, or @1, @5, @10, in percent

PUBLISHED: dict[str, dict[tuple[str, str], Row]] = {
    "MM-GDINO-T, O365+GoldG": {
        ("refcoco", "val"): (53.1,),
        ("refcoco", "testA"): (59.7,),
        ("refcoco", "testB"): (46.4,),
    },
    "MM-GDINO-T, O365+GoldG+GRIT9M": {
        ("refcoco", "val"): (53.4,),
        ("refcoco", "testA"): (58.8,),
        ("refcoco", "testB"): (46.8,),
    },
    "MM-GDINO-T, O365+GoldG+V3Det": {
        ("refcoco", "val"): (52.1,),
        ("refcoco", "testA"): (58.4,),
        ("refcoco", "testB"): (45.4,),
    },
    "MM-GDINO-T, O365+GoldG+GRIT9M+V3Det": {
        ("refcoco", "val"): (53.1, 89.7, 95.1),
        ("refcoco", "testA"): (59.1, 91.0, 95.5),
        ("refcoco", "testB"): (46.8, 87.8, 93.6),
        ("refcoco+", "val"): (52.7, 87.7, 93.5),
        ("refcoco+", "testA"): (58.7, 87.2, 93.1),
        ("refcoco+", "testB"): (48.4, 85.8, 92.1),
        ("refcocog", "val"): (62.9, 93.3, 97.2),
        ("refcocog", "test"): (62.9, 93.9, 97.4),
    },
    "MM-GDINO-B, all": {
        ("refcoco", "val"): (80.3, 98.6, 99.5),
        ("refcoco", "testA"): (85.3, 99.5, 99.7),
        ("refcoco", "testB"): (73.6, 98.3, 99.4),
        ("refcoco+", "val"): (83.5, 98.3, 99.4),
        ("refcoco+", "testA"): (89.3, 99.3, 99.8),
        ("refcoco+", "testB"): (76.8, 97.5, 99.0),
        ("refcocog", "val"): (85.2, 98.6, 99.2),
        ("refcocog", "test"): (86.2, 98.9, 99.4),
    },
    "MM-GDINO-L, all": {
        ("refcoco", "val"): (79.1, 98.7, 99.4),
        ("refcoco", "testA"): (85.1, 99.3, 99.8),
        ("refcoco", "testB"): (72.6, 98.0, 99.4),
        ("refcoco+", "val"): (82.3, 98.3, 99.4),
        ("refcoco+", "testA"): (88.4, 99.3, 99.8),
        ("refcoco+", "testB"): (74.5, 97.6, 99.2),
        ("refcocog", "val"): (84.4, 98.5, 99.3),
        ("refcocog", "test"): (84.3, 98.9, 99.4),
    },
}


def published(release: str | None, data_set: str, split: str) -> Row | None:
    """The published row of a release (a name of `converter.RELEASES`), or None where there is none."""
    return PUBLISHED.get(release or "", {}).get((data_set, split))
