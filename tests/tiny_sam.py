"""SAMs of random weights so small that a mask takes milliseconds, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

DECODER = {"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 32, "num_hidden_layers": 1}
PROMPT_ENCODER = {"hidden_size": 32, "image_size": 64, "patch_size": 16}


def write_sam(path: Path, family: str = "Sam") -> Path:
    """Model and processor of "Sam", "SamHQ" or "Sam2" in the folder `path`."""
    import transformers

    torch.manual_seed(0)

    def make(part: str, **options: Any) -> Any:
        return getattr(transformers, family + part)(**options)

    if family == "Sam2":
        fast = "" if hasattr(transformers, "Sam2ImageProcessor") else "Fast"  # before transformers 5
        vision, images = _sam2_vision(make), make(f"ImageProcessor{fast}", size=_square(64), mask_size=_square(16))
    else:
        vision = make(
            "VisionConfig", hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=64, patch_size=16, mlp_dim=32, window_size=2, global_attn_indexes=[1], num_pos_feats=16,
        )  # fmt: skip
        images = transformers.SamImageProcessor(
            size={"longest_edge": 64}, pad_size=_square(64), mask_size={"longest_edge": 16}, mask_pad_size=_square(16)
        )
    config = make(
        "Config",
        vision_config=vision,
        prompt_encoder_config=make("PromptEncoderConfig", **PROMPT_ENCODER),
        mask_decoder_config=make("MaskDecoderConfig", **DECODER, **({"vit_dim": 32} if family == "SamHQ" else {})),
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(path)
    getattr(transformers, f"{family}Processor")(images).save_pretrained(path)
    return path


def _sam2_vision(make: Any) -> Any:
    backbone = make(
        "HieraDetConfig", hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[4, 4, 4, 4], global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    sizes = [[16, 16], [8, 8], [4, 4]]
    return make(
        "VisionConfig", backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=sizes,
        fpn_hidden_size=32,
    )  # fmt: skip


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}
