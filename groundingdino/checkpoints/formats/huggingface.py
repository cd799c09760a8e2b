"""MM-Grounding-DINO as transformers names it (MMGroundingDinoForObjectDetection): key table, rewrites, config.

Same model, other storage: queries, keys and values are three matrices there and one here, a head's bias is a scalar,
Swin's patch merging is in our order already. The label embedding of the denoising queries has no place there: weights
that went through transformers start fine-tuning with a fresh one.

Where its forward differs from mmdet's and so from ours (version 4.57, by reading): reference boxes between the decoder
layers go through logit(eps=1e-5) instead of inverse_sigmoid(eps=1e-3), seen only by boxes within 1e-3 of the border;
fusion scores are shifted by the maximum over the whole batch, seen only in float16; `topk` fails where an image has
fewer tokens than there are queries.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from groundingdino.checkpoints.formats import mmdet
from groundingdino.checkpoints.formats.key_table import KeyTable, pack, plain_levels, rename, split_levels, thirds
from groundingdino.checkpoints.formats.original_head import LABEL_EMBEDDING
from groundingdino.config import ModelConfig

SWIN = "model.backbone.conv_encoder.model"
BLOCK = f"{SWIN}.encoder.layers.{{i}}.blocks.{{j}}"
OUR_BLOCK = "backbone.stages.{i}.blocks.{j}"
BERT = "model.text_backbone"
ENHANCER, OUR_ENHANCER = "model.encoder.layers.{i}", "feature_enhancer.layers.{i}"
FUSION, OUR_FUSION = f"{ENHANCER}.fusion_layer", f"{OUR_ENHANCER}.fusion"
DECODER, OUR_DECODER = "model.decoder.layers.{i}", "decoder.layers.{i}"
NUM_STAGES = 4
LEVELS = "model.input_proj_vision"  # numbered through: first the backbone's maps, then the further levels
QKV = ("query", "key", "value")  # stored here as one matrix, in this order
PACKED = re.compile(r".*\.(qkv\.(weight|bias)|in_proj_(weight|bias))")


def _image_rows() -> dict[str, str]:
    rows = {
        f"{SWIN}.embeddings.patch_embeddings.projection.{{p}}": "backbone.patch_embed.proj.{p}",
        f"{SWIN}.embeddings.norm.{{p}}": "backbone.patch_embed.norm.{p}",
        f"{BLOCK}.layernorm_before.{{p}}": f"{OUR_BLOCK}.norm1.{{p}}",
        f"{BLOCK}.attention.self.relative_position_bias_table": f"{OUR_BLOCK}.attn.relative_position_bias_table",
        f"{BLOCK}.attention.output.dense.{{p}}": f"{OUR_BLOCK}.attn.proj.{{p}}",
        f"{BLOCK}.layernorm_after.{{p}}": f"{OUR_BLOCK}.norm2.{{p}}",
        f"{BLOCK}.intermediate.dense.{{p}}": f"{OUR_BLOCK}.mlp.fc1.{{p}}",
        f"{BLOCK}.output.dense.{{p}}": f"{OUR_BLOCK}.mlp.fc2.{{p}}",
        f"{SWIN}.encoder.layers.{{i}}.downsample.norm.{{p}}": "backbone.stages.{i}.downsample.norm.{p}",
        f"{SWIN}.encoder.layers.{{i}}.downsample.reduction.weight": "backbone.stages.{i}.downsample.reduction.weight",
        "model.input_proj_vision.{i}.0.{p}": "neck.projections.{i}.conv.{p}",
        "model.input_proj_vision.{i}.1.{p}": "neck.projections.{i}.norm.{p}",
        "model.input_proj_vision.extra.{i}.0.{p}": "neck.extra.{i}.conv.{p}",
        "model.input_proj_vision.extra.{i}.1.{p}": "neck.extra.{i}.norm.{p}",
        "model.level_embed": "level_embedding",
    }
    for third, part in enumerate(QKV):
        rows[f"{BLOCK}.attention.self.{part}.{{p}}"] = f"{OUR_BLOCK}.attn.qkv.{{p}}[{third}]"
    for stage in range(NUM_STAGES):
        rows[f"{SWIN}.hidden_states_norms.stage{stage + 1}.{{p}}"] = f"backbone.norms.{stage}.{{p}}"
    return rows


def _enhancer_rows() -> dict[str, str]:
    rows = {
        f"{FUSION}.vision_param": f"{OUR_FUSION}.image_scale",
        f"{FUSION}.text_param": f"{OUR_FUSION}.text_scale",
        f"{FUSION}.layer_norm_vision.{{p}}": f"{OUR_FUSION}.image_norm.{{p}}",
        f"{FUSION}.layer_norm_text.{{p}}": f"{OUR_FUSION}.text_norm.{{p}}",
        f"{FUSION}.attn.vision_proj.{{p}}": f"{OUR_FUSION}.image_query.{{p}}",
        f"{FUSION}.attn.text_proj.{{p}}": f"{OUR_FUSION}.text_key.{{p}}",
        f"{FUSION}.attn.values_vision_proj.{{p}}": f"{OUR_FUSION}.image_value.{{p}}",
        f"{FUSION}.attn.values_text_proj.{{p}}": f"{OUR_FUSION}.text_value.{{p}}",
        f"{FUSION}.attn.out_vision_proj.{{p}}": f"{OUR_FUSION}.image_out.{{p}}",
        f"{FUSION}.attn.out_text_proj.{{p}}": f"{OUR_FUSION}.text_out.{{p}}",
        f"{ENHANCER}.text_enhancer_layer.layer_norm_before.{{p}}": f"{OUR_ENHANCER}.text_layer.attention_norm.{{p}}",
        f"{ENHANCER}.text_enhancer_layer.layer_norm_after.{{p}}": f"{OUR_ENHANCER}.text_layer.ffn_norm.{{p}}",
        f"{ENHANCER}.deformable_layer.self_attn_layer_norm.{{p}}": f"{OUR_ENHANCER}.image_layer.attention_norm.{{p}}",
        f"{ENHANCER}.deformable_layer.final_layer_norm.{{p}}": f"{OUR_ENHANCER}.image_layer.ffn_norm.{{p}}",
    }
    rows |= _attention_rows(f"{ENHANCER}.text_enhancer_layer.self_attn", f"{OUR_ENHANCER}.text_layer.attention")
    rows |= _ffn_rows(f"{ENHANCER}.text_enhancer_layer", f"{OUR_ENHANCER}.text_layer")
    attention = (f"{ENHANCER}.deformable_layer.self_attn", f"{OUR_ENHANCER}.image_layer.attention")
    rows |= mmdet.deformable_rows(*attention)
    return rows | _ffn_rows(f"{ENHANCER}.deformable_layer", f"{OUR_ENHANCER}.image_layer")


def _decoder_rows() -> dict[str, str]:
    rows = {
        "model.enc_output.{p}": "query_selection.fc.{p}",
        "model.enc_output_norm.{p}": "query_selection.norm.{p}",
        "model.encoder_output_class_embed.bias": "query_selection.contrastive_head.bias",
        "model.query_position_embeddings.weight": "query_embedding.weight",
        f"{DECODER}.self_attn_layer_norm.{{p}}": f"{OUR_DECODER}.self_attention_norm.{{p}}",
        f"{DECODER}.encoder_attn_text_layer_norm.{{p}}": f"{OUR_DECODER}.text_attention_norm.{{p}}",
        f"{DECODER}.encoder_attn_layer_norm.{{p}}": f"{OUR_DECODER}.image_attention_norm.{{p}}",
        f"{DECODER}.final_layer_norm.{{p}}": f"{OUR_DECODER}.ffn_norm.{{p}}",
        "model.decoder.reference_points_head.layers.0.{p}": "decoder.position_fc1.{p}",
        "model.decoder.reference_points_head.layers.1.{p}": "decoder.position_fc2.{p}",
        "model.decoder.layer_norm.{p}": "decoder.norm.{p}",
        "class_embed.{i}.bias": "decoder.contrastive_heads.{i}.bias",
    }
    for fc in (1, 2, 3):
        rows[f"model.encoder_output_bbox_embed.layers.{fc - 1}.{{p}}"] = f"query_selection.box_head.fc{fc}.{{p}}"
        rows[f"bbox_embed.{{i}}.layers.{fc - 1}.{{p}}"] = f"decoder.box_heads.{{i}}.fc{fc}.{{p}}"
    rows |= _attention_rows(f"{DECODER}.self_attn", f"{OUR_DECODER}.self_attention")
    rows |= _attention_rows(f"{DECODER}.encoder_attn_text", f"{OUR_DECODER}.text_attention")
    rows |= mmdet.deformable_rows(f"{DECODER}.encoder_attn", f"{OUR_DECODER}.image_attention")
    return rows | _ffn_rows(DECODER, OUR_DECODER)


def _attention_rows(theirs: str, ours: str) -> dict[str, str]:
    rows = {f"{theirs}.{part}.{{p}}": f"{ours}.in_proj_{{p}}[{third}]" for third, part in enumerate(QKV)}
    return rows | {f"{theirs}.out_proj.{{p}}": f"{ours}.out_proj.{{p}}"}


def _ffn_rows(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.fc{fc}.{{p}}": f"{ours}.ffn.fc{fc}.{{p}}" for fc in (1, 2)}


DROPPED = {
    mmdet.LLMDET: mmdet.LLMDET_REASON,
    re.compile(r".*\.relative_position_index"): mmdet.INDEX_REASON,
    re.compile(
        re.escape(SWIN) + r"\.swin\.layernorm\.(weight|bias)"
    ): "Swin's own last norm: unused, from transformers 5",
    re.compile(re.escape(BERT) + r"\.embeddings\.(position_ids|token_type_ids)"): "buffers of BERT: counts and zeros",
}
# {theirs: ours}. `[0]` to `[2]` are thirds of a packed tensor; `extra` stands for the neck's further levels.
TABLE = KeyTable(
    _image_rows()
    | mmdet.bert_rows(BERT)
    | {"model.text_projection.{p}": "text_encoder.projection.{p}"}
    | _enhancer_rows()
    | _decoder_rows(),
    DROPPED,
)
ALIAS = "model.decoder."  # transformers keeps the decoder's heads under two names and saves either


def to_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under our names, packed as ours are. The denoising label embedding is not among them.

    Raises:
        ValueError: names that are in no table, or two that mean the same and differ.
    """
    num_maps = len({name for name in state if re.fullmatch(rf"{re.escape(SWIN)}\.hidden_states_norms\..*weight", name)})

    def ours(name: str) -> str | None:
        plain = re.sub(rf"^{re.escape(ALIAS)}(?=(bbox|class)_embed\.)", "", name)
        return TABLE.ours(split_levels(plain, LEVELS, num_maps))

    parts = rename(TABLE.kept(state), ours, "MM-Grounding-DINO")
    return pack({name: part.reshape(1) if "contrastive_head" in name else part for name, part in parts.items()})


def to_huggingface(native: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_native`, with the relative position indices that transformers stores."""
    num_maps = len(config.backbone.out_stages)
    state: dict[str, Tensor] = {}
    for name, tensor in native.items():
        if name == LABEL_EMBEDDING:
            continue
        packed = PACKED.fullmatch(name) is not None
        parts = dict(zip(thirds(name), tensor.chunk(3), strict=True)) if packed else {name: tensor}
        for ours, part in parts.items():
            theirs = TABLE.theirs(ours)
            if theirs is None:
                raise ValueError(f"transformers has no place for {name!r}")
            state[plain_levels(theirs, LEVELS, num_maps)] = part.reshape(()) if "contrastive_head" in ours else part
    for name, index in mmdet.mmdet_buffers(config).items():
        stage, block = re.findall(r"\d+", name)
        state[f"{SWIN}.encoder.layers.{stage}.blocks.{block}.attention.self.relative_position_index"] = index
    return state


def infer_config(native: Mapping[str, Tensor], text_heads: int | None = None) -> ModelConfig:
    """As `mmdet.infer_config`, from tensors that `to_native` gave."""
    layers = len({name for name in native if re.fullmatch(r"decoder\.layers\.\d+\.ffn_norm\.bias", name)})
    shapes = {mmdet.mmdet_name(name, layers) or name: tuple(tensor.shape) for name, tensor in native.items()}
    return mmdet.infer_config(shapes, text_heads)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The content of transformers' config.json.

    Raises:
        ValueError: a size that MMGroundingDinoConfig cannot express.
    """
    if not config.num_heads == 2 * config.fusion_heads == 2 * config.text_layer_heads:
        raise ValueError("transformers ties the heads of fusion and text layers to half of the others'")
    if not config.ffn_width == 2 * config.fusion_width == 2 * config.text_layer_ffn_width:
        raise ValueError(
            f"transformers ties the fusion width ({config.fusion_width}) and the text layers' FFN "
            f"({config.text_layer_ffn_width}) to half the FFN width ({config.ffn_width}): this size cannot be written"
        )
    swin, text = config.backbone, config.text
    return {
        "architectures": ["MMGroundingDinoForObjectDetection"],
        "model_type": "mm-grounding-dino",
        "backbone_config": {
            "model_type": "swin",
            **{key: asdict(swin)[key] for key in ("embed_dim", "depths", "num_heads", "window_size", "drop_path_rate")},
            "image_size": 224,  # only the sizes of unused position embeddings depend on it
            "out_indices": [stage + 1 for stage in swin.out_stages],
            "out_features": [f"stage{stage + 1}" for stage in swin.out_stages],
        },
        "text_config": {
            "model_type": "bert",
            "hidden_size": text.width,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "intermediate_size": text.ffn_width,
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.max_positions,
        },
        "d_model": config.width,
        "encoder_layers": config.enhancer_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.ffn_width,
        "decoder_ffn_dim": config.ffn_width,
        "encoder_n_points": config.num_points,
        "decoder_n_points": config.num_points,
        "num_feature_levels": config.num_levels,
        "num_queries": config.num_queries,
        "max_text_len": config.max_tokens,
        # Version 5 would give the decoder's layers one head; 4 has heads of their own and does not read this.
        "decoder_bbox_embed_share": False,
        "decoder_cls_embed_share": False,
        "dropout": 0.0,
        "fusion_dropout": config.fusion_dropout,
        "fusion_droppath": 0.0,
    }


def settings(config: ModelConfig, original: bool = False) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder for transformers, by name: the model's config and those of its processor.

    `original` names the class of the original Grounding DINO.
    """
    model = config_json(config)
    if original:
        model |= {
            "architectures": ["GroundingDinoForObjectDetection"],
            "model_type": "grounding-dino",
            "decoder_bbox_embed_share": True,
        }
        del model["decoder_cls_embed_share"]
    return {
        "config.json": model,
        "preprocessor_config.json": {
            "image_processor_type": "GroundingDinoImageProcessor",
            "processor_class": "GroundingDinoProcessor",
            "size": {"shortest_edge": 800, "longest_edge": 1333},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "processor_class": "GroundingDinoProcessor",
            "do_lower_case": True,
            "model_max_length": config.text.max_positions,
        },
    }
