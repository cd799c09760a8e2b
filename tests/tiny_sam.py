"""A SAM of random weights so small that a mask takes milliseconds, as transformers saves it."""

from pathlib import Path

import torch


def write_sam(path: Path) -> Path:
    """Model and processor in the folder `path`."""
    import transformers

    torch.manual_seed(0)
    vision = transformers.SamVisionConfig(
        hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16,
        mlp_dim=32, window_size=2, global_attn_indexes=[1], num_pos_feats=16,
    )  # fmt: skip
    prompt = transformers.SamPromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16)
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=32, mlp_dim=32, num_attention_heads=2, num_hidden_layers=1, iou_head_hidden_dim=32
    )
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    processor = transformers.SamProcessor(
        transformers.SamImageProcessor(
            size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
            mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
        )
    )  # fmt: skip
    transformers.SamModel(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path
