"""From annotation files and images to batches.

Training:

    annotations = load_training(path, label_map=None, on_bad_sample="stop")      MDETR RefCOCO json or ODVG json lines
    source = TrainingSource(annotations, images=folder, name="refcoco", weight=1.0)
    dataset = GroundingDataset([source], Augmentation(), seed, on_bad_sample, SampleLimits(max_tokens, max_objects))
    loader = build_train_loader(dataset, LoaderOptions(batch_size, workers), rank=, world_size=)
    for epoch in range(loader.epoch, epochs):
        for batch in loader:            # the rest of this epoch; len(loader) is the whole one, loader.done what is over
            ...                         # batch.images, .text, .targets, .info, .problems (to be counted and shown)
            state = loader.state_dict() # load_state_dict: continues behind this batch, bit-equal

`structures.to_device(batch, device)` moves a batch. Everything random about a sample follows from
(seed, epoch, index, copy), whatever the number of workers. Flip and crop are fields of `Augmentation`.

Evaluation reads `load_expressions`; see `groundingdino.evaluation`. Other images: `inputs.images`.
"""

from groundingdino.data.annotations import (
    Annotations,
    OnBadSample,
    ReferringExpression,
    load_expressions,
    load_label_map,
    load_odvg,
    load_refcoco,
    load_training,
)
from groundingdino.data.augmentation import Augmentation
from groundingdino.data.batch import Batch, Padding, Sample, SampleInfo, collate, padding_for
from groundingdino.data.dataset import BadSampleError, GroundingDataset, SampleLimits, TrainingSource
from groundingdino.data.loader import LoaderOptions, TrainLoader, affordable_workers, build_train_loader
from groundingdino.data.sampler import BatchPlan, Draw

__all__ = [
    "Annotations",
    "Augmentation",
    "BadSampleError",
    "Batch",
    "BatchPlan",
    "Draw",
    "ReferringExpression",
    "GroundingDataset",
    "LoaderOptions",
    "SampleLimits",
    "OnBadSample",
    "Sample",
    "SampleInfo",
    "TrainingSource",
    "TrainLoader",
    "affordable_workers",
    "build_train_loader",
    "Padding",
    "collate",
    "padding_for",
    "load_expressions",
    "load_label_map",
    "load_odvg",
    "load_refcoco",
    "load_training",
]
