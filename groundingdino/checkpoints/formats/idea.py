"""Grounding DINO as IDEA-Research/GroundingDINO names it: key table, what is dropped, and the way back.

Its patch merging is in our order. The head is a special case of ours, see `original_head`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from groundingdino.checkpoints.formats import mmdet, original_head
from groundingdino.checkpoints.formats.key_table import KeyTable, pack, plain_levels, rename, split_levels, thirds
from groundingdino.config import ModelConfig

BLOCK, OUR_BLOCK = "backbone.0.layers.{i}.blocks.{j}", "backbone.stages.{i}.blocks.{j}"
TRANSFORMER, ENHANCER, DECODER = "transformer", "feature_enhancer.layers.{i}", "decoder.layers.{i}"
FUSION = f"{TRANSFORMER}.encoder.fusion_layers.{{i}}"
LEVELS = "input_proj"  # numbered through: first the backbone's maps, then the further levels


def _rows() -> dict[str, str]:
    """{theirs: ours}, in the order of the model."""
    rows = {f"backbone.0.patch_embed.{part}.{{p}}": f"backbone.patch_embed.{part}.{{p}}" for part in ("proj", "norm")}
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        rows[f"{BLOCK}.{part}.{{p}}"] = f"{OUR_BLOCK}.{part}.{{p}}"
    rows |= {
        f"{BLOCK}.attn.relative_position_bias_table": f"{OUR_BLOCK}.attn.relative_position_bias_table",
        "backbone.0.layers.{i}.downsample.norm.{p}": "backbone.stages.{i}.downsample.norm.{p}",
        "backbone.0.layers.{i}.downsample.reduction.weight": "backbone.stages.{i}.downsample.reduction.weight",
        "backbone.0.norm{i}.{p}": "backbone.norms.{i}.{p}",
        f"{LEVELS}.{{i}}.0.{{p}}": "neck.projections.{i}.conv.{p}",
        f"{LEVELS}.{{i}}.1.{{p}}": "neck.projections.{i}.norm.{p}",
        f"{LEVELS}.extra.{{i}}.0.{{p}}": "neck.extra.{i}.conv.{p}",
        f"{LEVELS}.extra.{{i}}.1.{{p}}": "neck.extra.{i}.norm.{p}",
        "feat_map.{p}": "text_encoder.projection.{p}",
        f"{TRANSFORMER}.level_embed": "level_embedding",
        f"{FUSION}.gamma_v": f"{ENHANCER}.fusion.image_scale",
        f"{FUSION}.gamma_l": f"{ENHANCER}.fusion.text_scale",
        f"{TRANSFORMER}.enc_output.{{p}}": "query_selection.fc.{p}",
        f"{TRANSFORMER}.enc_output_norm.{{p}}": "query_selection.norm.{p}",
        f"{TRANSFORMER}.tgt_embed.weight": "query_embedding.weight",
        f"{TRANSFORMER}.decoder.ref_point_head.layers.0.{{p}}": "decoder.position_fc1.{p}",
        f"{TRANSFORMER}.decoder.ref_point_head.layers.1.{{p}}": "decoder.position_fc2.{p}",
        f"{TRANSFORMER}.decoder.norm.{{p}}": "decoder.norm.{p}",
    }
    for theirs, ours in {
        "layer_norm_v": "image_norm",
        "layer_norm_l": "text_norm",
        "attn.v_proj": "image_query",
        "attn.l_proj": "text_key",
        "attn.values_v_proj": "image_value",
        "attn.values_l_proj": "text_value",
        "attn.out_v_proj": "image_out",
        "attn.out_l_proj": "text_out",
    }.items():
        rows[f"{FUSION}.{theirs}.{{p}}"] = f"{ENHANCER}.fusion.{ours}.{{p}}"
    rows |= mmdet.bert_rows("bert") | _layer_rows()
    for fc in (1, 2, 3):
        rows[f"bbox_embed.{{i}}.layers.{fc - 1}.{{p}}"] = f"decoder.box_heads.{{i}}.fc{fc}.{{p}}"
        rows[f"{TRANSFORMER}.enc_out_bbox_embed.layers.{fc - 1}.{{p}}"] = f"query_selection.box_head.fc{fc}.{{p}}"
    return rows


def _layer_rows() -> dict[str, str]:
    text, image = f"{TRANSFORMER}.encoder.text_layers.{{i}}", f"{TRANSFORMER}.encoder.layers.{{i}}"
    decoder = f"{TRANSFORMER}.decoder.layers.{{i}}"
    rows = _attention_rows(f"{text}.self_attn", f"{ENHANCER}.text_layer.attention")
    rows |= mmdet.deformable_rows(f"{image}.self_attn", f"{ENHANCER}.image_layer.attention")
    rows |= _attention_rows(f"{decoder}.self_attn", f"{DECODER}.self_attention")
    rows |= _attention_rows(f"{decoder}.ca_text", f"{DECODER}.text_attention")
    rows |= mmdet.deformable_rows(f"{decoder}.cross_attn", f"{DECODER}.image_attention")
    for theirs, ours, norms in (
        (text, f"{ENHANCER}.text_layer", {"norm1": "attention_norm", "norm2": "ffn_norm"}),
        (image, f"{ENHANCER}.image_layer", {"norm1": "attention_norm", "norm2": "ffn_norm"}),
        (
            decoder,
            DECODER,
            {
                "norm1": "image_attention_norm",
                "norm2": "self_attention_norm",
                "catext_norm": "text_attention_norm",
                "norm3": "ffn_norm",
            },
        ),
    ):
        rows |= {f"{theirs}.{their_norm}.{{p}}": f"{ours}.{our_norm}.{{p}}" for their_norm, our_norm in norms.items()}
        rows |= {f"{theirs}.linear{fc}.{{p}}": f"{ours}.ffn.fc{fc}.{{p}}" for fc in (1, 2)}
    return rows


def _attention_rows(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ours}.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.{p}")}


ALIAS = f"{TRANSFORMER}.decoder."  # the decoder's box heads stand under a second name, too
DROPPED = {
    re.compile(r"backbone\.0\.layers\.\d+\.blocks\.\d+\.attn\.relative_position_index"): mmdet.INDEX_REASON,
    re.compile(r"bert\.embeddings\.position_ids"): "position_ids: counts 0, 1, 2, ..., written by older versions only",
    re.compile(r"bert\.pooler\.dense\.(weight|bias)"): mmdet.POOLER_REASON,
    re.compile(r"label_enc\.weight"): "label_enc: stored, not used",
}
TABLE = KeyTable(_rows(), DROPPED)


def to_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """IDEA's tensors (without `module.`) under our names, without the denoising label embedding.

    Their head is the original one, see `original_head.from_original`.

    Raises:
        ValueError: names that are in no table, or two that mean the same and differ.
    """
    maps = len({name for name in state if re.fullmatch(r"backbone\.0\.norm\d+\.weight", name)})

    def ours(name: str) -> str | None:
        return TABLE.ours(split_levels(re.sub(rf"^{re.escape(ALIAS)}(?=bbox_embed\.)", "", name), LEVELS, maps))

    return pack(rename(TABLE.kept(state), ours, "Grounding DINO"))


def to_idea(native: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_native`, with the box heads under both their names. What IDEA's code never uses is made up.

    Raises:
        ValueError: a head that the original cannot express, see `original_head.to_original`.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in original_head.to_original(native).items():
        if name == original_head.LABEL_EMBEDDING:
            continue
        packed = TABLE.theirs(thirds(name)[0]) is not None
        for ours, part in zip(thirds(name), tensor.chunk(3), strict=True) if packed else ((name, tensor),):
            theirs = TABLE.theirs(ours)
            if theirs is None:
                raise ValueError(f"IDEA's GroundingDINO has no place for {name!r}")
            theirs = plain_levels(theirs, LEVELS, len(config.backbone.out_stages))
            state[theirs] = part
            if theirs.startswith("bbox_embed."):
                state[ALIAS + theirs] = part
    for name, index in mmdet.mmdet_buffers(config).items():
        stage, block = re.findall(r"\d+", name)
        state[f"{BLOCK.format(i=stage, j=block)}.attn.relative_position_index"] = index
    width = config.text.width
    return state | {"bert.pooler.dense.weight": torch.zeros(width, width), "bert.pooler.dense.bias": torch.zeros(width)}
