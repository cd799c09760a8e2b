"""The recipes: functions that each return a full config. Imports nothing heavy.

mmdetection's are in its `configs/mm_grounding_dino`; each names its file. Where a number differs, a comment says why.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from groundingdino.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Part,
    ScheduleConfig,
    TrainConfig,
    quickstart_model,
    small_model,
    swin_b,
    swin_t,
)

MM_GDINO_B = Path("weights/grounding_dino_swin-b_pretrain_obj365_goldg_v3de-f83eef00.pth")
MM_GDINO_T = Path("weights/grounding_dino_swin-t_pretrain_obj365_goldg_grit9m_v3det_20231204_095047-b448804b.pth")


def _referring(name: str, splits: tuple[str, ...]) -> TrainConfig:
    """mmdet `refcoco/grounding_dino_swin-t_finetune_8xb4_5e_*`, on Swin-B as the main recipe."""
    files = {split: f"mdetr_annotations/finetune_{name}_{split}.json" for split in ("train", *splits)}
    data = DataConfig(train_files=(files.pop("train"),), evaluation=tuple(files.items()))
    return TrainConfig(swin_b(), data, run_dir=Path(f"runs/{name}"), init_from=MM_GDINO_B)


def refcoco() -> TrainConfig:
    """The main recipe: MM-Grounding-DINO-B on RefCOCO, for 8 devices (mmdet `refcoco/..._finetune_8xb4_5e_refcoco`)."""
    return _referring("refcoco", ("val", "testA", "testB"))


def refcoco_plus() -> TrainConfig:
    """RefCOCO+ (mmdet `refcoco/..._finetune_8xb4_5e_refcoco_plus`)."""
    return _referring("refcoco+", ("val", "testA", "testB"))


def refcocog() -> TrainConfig:
    """RefCOCOg (mmdet `refcoco/..._finetune_8xb4_5e_refcocog`)."""
    return _referring("refcocog", ("val", "test"))


def grefcoco() -> TrainConfig:
    """gRefCOCO: none, one or several objects per expression (mmdet `refcoco/..._finetune_8xb4_5e_grefcoco`)."""
    return _referring("grefcoco", ("val", "testA", "testB"))


def coco() -> TrainConfig:
    """MM-Grounding-DINO-T on COCO, 16 devices with 4 images (mmdet `coco/..._finetune_16xb4_1x_coco`).

    mmdet shows every image all 80 names; here negatives are drawn as in its other recipes, which keeps captions short.
    Its learning rate, 2e-4, is for 16 x 4 images.
    """
    data = DataConfig(
        root=Path("coco"),
        train_files=("annotations/instances_train2017.json",),
        image_dirs=("train2017",),
        evaluation=(("val2017", "annotations/instances_val2017.json"),),
        evaluation_image_dirs=("val2017",),
        batch_size=4,
        flip_probability=0.5,
    )
    return TrainConfig(
        swin_t(),
        data,
        OptimizerConfig(base_batch=64),
        ScheduleConfig(milestones=(8, 11)),
        run_dir=Path("runs/coco"),
        init_from=MM_GDINO_T,
        epochs=12,
    )


def lvis() -> TrainConfig:
    """MM-Grounding-DINO-T on LVIS v1, 16 devices with 4 images (mmdet `lvis/..._finetune_16xb4_1x_lvis`).

    Images of rare categories are repeated (threshold 0.001); evaluated on minival every third epoch.
    """
    recipe = coco()
    data = replace(
        recipe.data,
        train_files=("annotations/lvis_v1_train.json",),
        image_dirs=(".",),
        repeat_threshold=1e-3,
        evaluation=(("minival", "annotations/lvis_v1_minival_inserted_image_name.json"),),
        evaluation_image_dirs=(".",),
    )
    return replace(
        recipe, data=data, schedule=ScheduleConfig(milestones=(11,)), run_dir=Path("runs/lvis"), evaluate_every=3
    )


def pretrain() -> TrainConfig:
    """MM-Grounding-DINO-T from Objects365, Flickr30k, GQA and V3Det, 16 x 4 (mmdet `..._pretrain_obj365_goldg_v3det`).

    ODVG files as mmdet's converters write them. mmdet starts from Swin's ImageNet weights and BERT; name weights with
    `--init-from`, or a BERT with `--text-from`.
    """
    data = DataConfig(
        root=Path("data"),
        train_files=(
            "objects365v1/o365v1_train_odvg.json",
            "flickr30k_entities/final_flickr_separateGT_train_vg.json",
            "gqa/final_mixed_train_no_coco_vg.json",
            "V3Det/annotations/v3det_2023_v1_train_od.json",
        ),
        image_dirs=("objects365v1/train", "flickr30k_entities/flickr30k_images", "gqa/images", "V3Det"),
        label_maps=(
            "objects365v1/o365v1_label_map.json",
            "",
            "",
            "V3Det/annotations/v3det_2023_v1_label_map.json",
        ),
        evaluation=(("val2017", "coco/annotations/instances_val2017.json"),),
        evaluation_image_dirs=("coco/val2017",),
        batch_size=4,
        flip_probability=0.5,
    )
    return TrainConfig(
        swin_t(),
        data,
        OptimizerConfig(lr=4e-4, base_batch=64),
        ScheduleConfig(milestones=(19, 26), warmup_steps=1000),
        run_dir=Path("runs/pretrain"),
        epochs=30,
    )


def quickstart() -> TrainConfig:
    """A small model that learns rendered scenes (`data.synthetic`) from fresh weights on two CPU cores."""
    data = DataConfig(
        root=Path("runs/quickstart-data"),
        evaluation=(("val", "mdetr_annotations/finetune_refcoco_val.json"),),
        batch_size=8,
        workers=1,
        train_sides=(96,),
        crop_probability=0.0,
        evaluation_side=96,
        evaluation_batch_size=4,
    )
    return TrainConfig(
        quickstart_model(),
        data,
        OptimizerConfig(lr=5e-4, scale_lr=False, betas=(0.9, 0.99), lr_multipliers=()),
        ScheduleConfig(kind="cosine", warmup_steps=50, warmup_start=0.01, final=0.02),
        run_dir=Path("runs/quickstart"),
        activation_checkpointing=False,
        epochs=3,  # after two, Precision@1 was 0.82 to 0.91 by the luck of rounding; after three, 0.92 to 0.93
        class_weight=4.0,  # boxes of plain shapes are easy; which of them is meant is what has to be learned
        ema_decay=0.995,
        pictures=12,
    )


@dataclass(frozen=True)
class DataSize:
    """What the fine-tuning recipe depends on."""

    images: int  # to train on
    categories: int
    captions: bool = False  # grounding data: captions in place of categories


# BERT without the map from its width to the model's, which mmdet trains where it freezes its `language_model`, too.
BERT: tuple[Part, ...] = ("text_encoder.embeddings", "text_encoder.layers")
BATCH = 4  # images per device
STEPS_BETWEEN_EVALUATIONS = 50  # at least; a small data set's epochs are shorter
LONG_TAIL = 100  # categories; from here on, images of rare ones are repeated as in LVIS
PATIENCE = 10  # evaluations without a better AP


def finetune_epochs(images: int) -> int:
    """50 epochs for 1,000 images or fewer, 12 for 10,000 or more: mmdet's own range (cat, brain_tumor, rtts, coco)."""
    return max(12, min(50, round(50 * (1000 / max(images, 1)) ** 0.62)))


def finetune(size: DataSize) -> TrainConfig:
    """Fine-tune a pre-trained model on your own data. Its sizes come with the weights; BERT is frozen.

    Base rate 1e-4 for 32 images and a tenth of it for the backbone, as in mmdet's recipes for small data sets
    (`grounding_dino_swin-t_finetune_8xb4_20e_cat`, `brain_tumor/...`). Paths and evaluation are for the caller to fill.
    """
    epochs, batch = finetune_epochs(size.images), max(1, min(BATCH, size.images))
    steps = -(-size.images // batch)
    data = DataConfig(
        evaluation=(),
        batch_size=batch,
        flip_probability=0.5,
        repeat_threshold=1e-3 if size.categories >= LONG_TAIL else 0.0,
        on_bad_sample="skip",
    )
    return TrainConfig(
        swin_t(),
        data,
        OptimizerConfig(lr=1e-4, lr_multipliers=(("backbone", 0.1),)),
        ScheduleConfig(
            milestones=(max(1, epochs * 2 // 3), max(1, epochs * 11 // 12)),
            warmup_steps=min(500, steps * epochs // 20),
        ),
        run_dir=Path("runs/finetune"),
        epochs=epochs,
        freeze=BERT,
        ema_decay=0.999,
        evaluate_every=max(1, STEPS_BETWEEN_EVALUATIONS // steps),
        early_stopping=PATIENCE,
    )


def from_scratch(size: DataSize, model: ModelConfig | None = None, text_from: Path | None = None) -> TrainConfig:
    """A small model from fresh weights on your own data, for two CPU cores: images of 320 pixels, no crops.

    For data that look alike, such as micrographs, where nothing pre-trained is at hand. A trained BERT is frozen.
    """
    recipe = finetune(size)
    steps = -(-size.images // recipe.data.batch_size)
    data = replace(
        recipe.data,
        workers=1,
        train_sides=(288, 320, 352),
        train_long_side=640,
        crop_probability=0.0,
        evaluation_side=320,
        evaluation_long_side=640,
        evaluation_batch_size=4,
    )
    return replace(
        recipe,
        model=model or small_model(),
        data=data,
        optimizer=OptimizerConfig(lr=5e-4, scale_lr=False, betas=(0.9, 0.99), lr_multipliers=()),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=min(100, steps), warmup_start=0.01, final=0.02),
        activation_checkpointing=False,
        text_from=text_from,
        freeze=() if text_from is None else BERT,
        ema_decay=0.998,
        early_stopping=0,  # AP may be 0 for many epochs before it rises
    )


TRAIN_PRESETS = {
    "refcoco": refcoco,
    "refcoco+": refcoco_plus,
    "refcocog": refcocog,
    "grefcoco": grefcoco,
    "coco": coco,
    "lvis": lvis,
    "pretrain": pretrain,
    "quickstart": quickstart,
}
