"""MM-Grounding-DINO as mmdet 3.x names it: the key table, the one rewrite, and the model size read off the tensors."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from groundingdino.checkpoints.formats.key_table import KeyTable, pack, rename, thirds, whole_name
from groundingdino.config import MODEL_PRESETS, BackboneConfig, ModelConfig, TextConfig

QKV = ("query", "key", "value")  # one tensor here, in this order
BLOCK = "backbone.stages.{i}.blocks.{j}"
BERT = "language_model.language_backbone.body.model"
ENHANCER = "feature_enhancer.layers.{i}"
FUSION = "encoder.fusion_layers.{i}"
DECODER = "decoder.layers.{i}"
PROPOSALS = "proposals"  # stands in the table for the last branch of mmdet's head, number `decoder_layers`


def _rows() -> dict[str, str]:
    """{theirs: ours}, in the order of the model."""
    rows = {
        "level_embed": "level_embedding",
        "backbone.patch_embed.projection.{p}": "backbone.patch_embed.proj.{p}",
        "backbone.patch_embed.norm.{p}": "backbone.patch_embed.norm.{p}",
        f"{BLOCK}.norm1.{{p}}": f"{BLOCK}.norm1.{{p}}",
        f"{BLOCK}.attn.w_msa.relative_position_bias_table": f"{BLOCK}.attn.relative_position_bias_table",
        f"{BLOCK}.attn.w_msa.qkv.{{p}}": f"{BLOCK}.attn.qkv.{{p}}",
        f"{BLOCK}.attn.w_msa.proj.{{p}}": f"{BLOCK}.attn.proj.{{p}}",
        f"{BLOCK}.norm2.{{p}}": f"{BLOCK}.norm2.{{p}}",
        f"{BLOCK}.ffn.layers.0.0.{{p}}": f"{BLOCK}.mlp.fc1.{{p}}",
        f"{BLOCK}.ffn.layers.1.{{p}}": f"{BLOCK}.mlp.fc2.{{p}}",
        "backbone.stages.{i}.downsample.norm.{p}": "backbone.stages.{i}.downsample.norm.{p}",
        "backbone.stages.{i}.downsample.reduction.weight": "backbone.stages.{i}.downsample.reduction.weight",
        "backbone.norm{i}.{p}": "backbone.norms.{i}.{p}",
        "neck.convs.{i}.conv.{p}": "neck.projections.{i}.conv.{p}",
        "neck.convs.{i}.gn.{p}": "neck.projections.{i}.norm.{p}",
        "neck.extra_convs.{i}.conv.{p}": "neck.extra.{i}.conv.{p}",
        "neck.extra_convs.{i}.gn.{p}": "neck.extra.{i}.norm.{p}",
        "text_feat_map.{p}": "text_encoder.projection.{p}",
        f"{FUSION}.gamma_v": f"{ENHANCER}.fusion.image_scale",
        f"{FUSION}.gamma_l": f"{ENHANCER}.fusion.text_scale",
        f"{FUSION}.layer_norm_v.{{p}}": f"{ENHANCER}.fusion.image_norm.{{p}}",
        f"{FUSION}.layer_norm_l.{{p}}": f"{ENHANCER}.fusion.text_norm.{{p}}",
        f"{FUSION}.attn.v_proj.{{p}}": f"{ENHANCER}.fusion.image_query.{{p}}",
        f"{FUSION}.attn.l_proj.{{p}}": f"{ENHANCER}.fusion.text_key.{{p}}",
        f"{FUSION}.attn.values_v_proj.{{p}}": f"{ENHANCER}.fusion.image_value.{{p}}",
        f"{FUSION}.attn.values_l_proj.{{p}}": f"{ENHANCER}.fusion.text_value.{{p}}",
        f"{FUSION}.attn.out_v_proj.{{p}}": f"{ENHANCER}.fusion.image_out.{{p}}",
        f"{FUSION}.attn.out_l_proj.{{p}}": f"{ENHANCER}.fusion.text_out.{{p}}",
    }
    rows |= bert_rows(BERT)
    rows |= _attention_rows("encoder.text_layers.{i}.self_attn", f"{ENHANCER}.text_layer.attention")
    rows |= _ffn_rows("encoder.text_layers.{i}", f"{ENHANCER}.text_layer", ("attention_norm", "ffn_norm"))
    rows |= deformable_rows("encoder.layers.{i}.self_attn", f"{ENHANCER}.image_layer.attention")
    rows |= _ffn_rows("encoder.layers.{i}", f"{ENHANCER}.image_layer", ("attention_norm", "ffn_norm"))
    rows |= {
        "memory_trans_fc.{p}": "query_selection.fc.{p}",
        "memory_trans_norm.{p}": "query_selection.norm.{p}",
        "query_embedding.weight": "query_embedding.weight",
        "dn_query_generator.label_embedding.weight": "denoising.label_embedding.weight",
        "decoder.ref_point_head.layers.0.{p}": "decoder.position_fc1.{p}",
        "decoder.ref_point_head.layers.1.{p}": "decoder.position_fc2.{p}",
    }
    rows |= _attention_rows(f"{DECODER}.self_attn", f"{DECODER}.self_attention")
    rows |= _attention_rows(f"{DECODER}.cross_attn_text", f"{DECODER}.text_attention")
    rows |= deformable_rows(f"{DECODER}.cross_attn", f"{DECODER}.image_attention")
    norms = ("self_attention_norm", "text_attention_norm", "image_attention_norm", "ffn_norm")
    rows |= _ffn_rows(DECODER, DECODER, norms)
    rows["decoder.norm.{p}"] = "decoder.norm.{p}"
    rows |= _head_rows("{i}", "decoder.contrastive_heads.{i}", "decoder.box_heads.{i}")
    return rows | _head_rows(PROPOSALS, "query_selection.contrastive_head", "query_selection.box_head")


def bert_rows(bert: str) -> dict[str, str]:
    """Rows of a BERT of transformers' that lies under the name `bert`."""
    layer, ours = f"{bert}.encoder.layer.{{i}}", "text_encoder.layers.{i}"
    return {
        f"{bert}.embeddings.word_embeddings.weight": "text_encoder.embeddings.word.weight",
        f"{bert}.embeddings.position_embeddings.weight": "text_encoder.embeddings.position.weight",
        f"{bert}.embeddings.token_type_embeddings.weight": "text_encoder.embeddings.token_type.weight",
        f"{bert}.embeddings.LayerNorm.{{p}}": "text_encoder.embeddings.norm.{p}",
        **{
            f"{layer}.attention.self.{part}.{{p}}": f"{ours}.attention.in_proj_{{p}}[{i}]" for i, part in enumerate(QKV)
        },
        f"{layer}.attention.output.dense.{{p}}": f"{ours}.attention.out_proj.{{p}}",
        f"{layer}.attention.output.LayerNorm.{{p}}": f"{ours}.attention_norm.{{p}}",
        f"{layer}.intermediate.dense.{{p}}": f"{ours}.ffn.fc1.{{p}}",
        f"{layer}.output.dense.{{p}}": f"{ours}.ffn.fc2.{{p}}",
        f"{layer}.output.LayerNorm.{{p}}": f"{ours}.ffn_norm.{{p}}",
    }


def _attention_rows(theirs: str, ours: str) -> dict[str, str]:
    parameters = ("in_proj_weight", "in_proj_bias", "out_proj.{p}")
    return {f"{theirs}.attn.{parameter}": f"{ours}.{parameter}" for parameter in parameters}


def deformable_rows(theirs: str, ours: str) -> dict[str, str]:
    """Rows of a deformable attention, whose parts have the same names everywhere."""
    layers = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return {f"{theirs}.{layer}.{{p}}": f"{ours}.{layer}.{{p}}" for layer in layers}


def _ffn_rows(theirs: str, ours: str, norms: tuple[str, ...]) -> dict[str, str]:
    ffn = {
        f"{theirs}.ffn.layers.0.0.{{p}}": f"{ours}.ffn.fc1.{{p}}",
        f"{theirs}.ffn.layers.1.{{p}}": f"{ours}.ffn.fc2.{{p}}",
    }
    return ffn | {f"{theirs}.norms.{index}.{{p}}": f"{ours}.{norm}.{{p}}" for index, norm in enumerate(norms)}


def _head_rows(branch: str, contrastive_head: str, box_head: str) -> dict[str, str]:
    boxes = {f"bbox_head.reg_branches.{branch}.{2 * i}.{{p}}": f"{box_head}.fc{i + 1}.{{p}}" for i in range(3)}
    scores = {f"bbox_head.cls_branches.{branch}.{part}": f"{contrastive_head}.{part}" for part in ("bias", "log_scale")}
    return scores | boxes


# Buffers of theirs that we compute instead of storing.
POSITION_IDS = f"{BERT}.embeddings.position_ids"
POOLER_REASON = "BERT's pooler: stored, not used"
INDEX_REASON = "relative_position_index: follows from the window size"
# LLMDet trains with a language model beside the detector, which predicting does without. (`ref_point_head` tells that
# model where a region is; the decoder has its own, `decoder.ref_point_head`.)
LLMDET = re.compile(r"(lmm|connector|region_connector|ref_point_head|image_seperate|img_sep)(\..*)?")
LLMDET_REASON = "LLMDet's language model and what connects it: used in its training only"
DROPPED = {
    LLMDET: LLMDET_REASON,
    re.compile(r"backbone\.stages\.\d+\.blocks\.\d+\.attn\.w_msa\.relative_position_index"): INDEX_REASON,
    re.compile(re.escape(POSITION_IDS)): "position_ids: counts 0, 1, 2, ..., written by older transformers only",
    re.compile(re.escape(BERT) + r"\.pooler\.dense\.(weight|bias)"): POOLER_REASON,
}
TABLE = KeyTable(_rows(), DROPPED)
# Patch merging: mmdet unfolds channel by channel, timm concatenates four neighbours, which it also counts in another
# order (mmdet `models/layers/transformer/utils.py::PatchMerging`). These hold four values a channel in that order:
PERMUTED = re.compile(r"backbone\.stages\.\d+\.downsample\.(norm\.(weight|bias)|reduction\.weight)")
NEIGHBOURS = (0, 2, 1, 3)  # its own inverse


def native_name(name: str, decoder_layers: int = 6) -> str | None:
    """Our name of a parameter of mmdet's, or of the packed one that it is a third of; None where there is none.

    Branch `decoder_layers` scores the proposals.
    """
    part = _native_part(name, decoder_layers)
    return part and whole_name(part)


def _native_part(name: str, decoder_layers: int) -> str | None:
    """As `native_name`, but `name[i]` for a third of a packed parameter."""
    return TABLE.ours(re.sub(rf"_branches\.{decoder_layers}\.", f"_branches.{PROPOSALS}.", name))


def mmdet_name(name: str, decoder_layers: int = 6) -> str | None:
    """mmdet's name of a parameter of ours, where it is one there too (a third `name[i]` always is)."""
    theirs = TABLE.theirs(name)
    return theirs and theirs.replace(f"_branches.{PROPOSALS}.", f"_branches.{decoder_layers}.")


def to_native(state: Mapping[str, Tensor], decoder_layers: int | None = None) -> dict[str, Tensor]:
    """mmdet's tensors under our names, permuted as ours are: weights, or what is shaped like them (gradients, moments).

    Args:
        state: tensors by mmdet's name, all of a model or some. Buffers that we compute are left out.
        decoder_layers: needed only where `state` holds some head branches but not the last one.
    Raises:
        ValueError: names that are in no table, two that mean the same and differ, or a part of a packed tensor alone.
    """
    branches = [int(m[1]) for name in state if (m := re.match(r"bbox_head\.\w+_branches\.(\d+)\.", name))]
    layers = max(branches, default=6) if decoder_layers is None else decoder_layers
    kept = _permuted(TABLE.kept(state), _merging_to_native)
    return pack(rename(kept, lambda name: _native_part(name, layers), "MM-Grounding-DINO"))


def to_mmdet(state: Mapping[str, Tensor], decoder_layers: int | None = None) -> dict[str, Tensor]:
    """The inverse of `to_native`, without the buffers that it left out (see `mmdet_buffers`)."""
    decoder = [int(m[1]) for name in state if (m := re.match(r"decoder\.layers\.(\d+)\.", name))]
    layers = max(decoder, default=5) + 1 if decoder_layers is None else decoder_layers
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        packed = TABLE.theirs(thirds(name)[0]) is not None
        parts |= dict(zip(thirds(name), tensor.chunk(3), strict=True)) if packed else {name: tensor}
    return rename(_permuted(parts, _merging_to_mmdet), lambda name: mmdet_name(name, layers), "MM-Grounding-DINO")


def _permuted(state: Mapping[str, Tensor], permute: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """ValueError for a tensor that cannot be permuted."""
    out = {}
    for name, tensor in state.items():
        permuted = PERMUTED.fullmatch(name)
        if permuted and (tensor.dim() == 0 or tensor.shape[-1] % len(NEIGHBOURS)):
            raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}: its last axis does not hold 4 neighbours")
        out[name] = permute(tensor) if permuted else tensor
    return out


def _merging_to_native(tensor: Tensor) -> Tensor:
    """(..., 4 * C), channel-major as `nn.Unfold` gives it -> neighbour-major in timm's order."""
    return tensor.unflatten(-1, (-1, 4))[..., NEIGHBOURS].transpose(-1, -2).flatten(-2)


def _merging_to_mmdet(tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (4, -1))[..., NEIGHBOURS, :].transpose(-1, -2).flatten(-2)


def mmdet_buffers(config: ModelConfig) -> dict[str, Tensor]:
    """The buffers that mmdet's state dict holds and ours does not: a relative position index for each Swin block."""
    window = config.backbone.window_size
    at = torch.arange(window)
    y, x = (grid.flatten() for grid in torch.meshgrid(at, at, indexing="ij"))
    rows = y[:, None] - y[None, :] + window - 1
    columns = x[:, None] - x[None, :] + window - 1
    index = rows * (2 * window - 1) + columns  # (window ** 2, window ** 2), row of the bias table
    return {
        f"backbone.stages.{stage}.blocks.{block}.attn.w_msa.relative_position_index": index
        for stage, depth in enumerate(config.backbone.depths)
        for block in range(depth)
    }


def infer_config(shapes: Mapping[str, tuple[int, ...]], text_heads: int | None = None) -> ModelConfig:
    """The size of a model from the names and shapes of its tensors in mmdet's naming (buffers not needed).

    Attention heads leave no trace in a shape, except in Swin. MM-Grounding-DINO has 8 in the encoder and decoder and 4
    in the fusion and text layers at every size; BERT gets one per 64 channels, at least 2, unless `text_heads` says so.
    A model that has a preset's size is that preset, with its own denoising labels; in others drop path, also without a
    trace, is 0.

    Raises:
        ValueError: a tensor that decides a size is missing or has no such shape; names it.
    """
    count = partial(_count, shapes)

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != dimensions or min(found) < 1:
            raise ValueError(f"the model's size cannot be told: {name!r} is {found or 'missing'}")
        return found

    stages = count(r"backbone\.stages\.(\d+)\.")
    attention = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    tables = [shape(attention.format(i), 2) for i in range(stages)]
    if not tables:
        raise ValueError("the model's size cannot be told: no 'backbone.stages.0...'")
    norms = {int(m[1]) for name in shapes if (m := re.match(r"backbone\.norm(\d+)\.weight", name))}
    backbone = BackboneConfig(
        embed_dim=shape("backbone.patch_embed.projection.weight", 4)[0],
        depths=tuple(count(rf"backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(stages)),
        num_heads=tuple(heads for _, heads in tables),
        window_size=(math.isqrt(tables[0][0]) + 1) // 2,
        out_stages=tuple(sorted(norms)),
        drop_path_rate=0.0,
    )
    vocabulary, text_width = shape(f"{BERT}.embeddings.word_embeddings.weight", 2)
    text = TextConfig(
        width=text_width,
        num_layers=count(re.escape(f"{BERT}.encoder.layer.") + r"(\d+)\."),
        num_heads=text_heads or max(2, text_width // 64),
        ffn_width=shape(f"{BERT}.encoder.layer.0.intermediate.dense.weight", 2)[0],
        vocabulary=vocabulary,
        max_positions=shape(f"{BERT}.embeddings.position_embeddings.weight", 2)[0],
    )
    num_levels, width = shape("level_embed", 2)
    defaults = ModelConfig("custom", backbone, text)
    offsets = shape("encoder.layers.0.self_attn.sampling_offsets.bias", 1)[0]
    config = replace(
        defaults,
        width=width,
        num_levels=num_levels,
        num_points=max(1, offsets // (defaults.num_heads * num_levels * 2)),
        ffn_width=shape("encoder.layers.0.ffn.layers.0.0.weight", 2)[0],
        text_layer_ffn_width=shape("encoder.text_layers.0.ffn.layers.0.0.weight", 2)[0],
        fusion_width=shape("encoder.fusion_layers.0.attn.v_proj.weight", 2)[0],
        enhancer_layers=count(r"encoder\.layers\.(\d+)\."),
        decoder_layers=count(r"decoder\.layers\.(\d+)\."),
        num_queries=shape("query_embedding.weight", 2)[0],
        num_labels=shape("dn_query_generator.label_embedding.weight", 2)[0],
        learned_scale="bbox_head.cls_branches.0.log_scale" in shapes,
    )
    return _preset_of_this_size(config) or config


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many members a module list has. ValueError where a number is left out (a billion would be quickly said)."""
    found = {int(m[1]): name for name in shapes if (m := re.match(pattern, name))}
    if found and max(found) + 1 != len(found):
        raise ValueError(
            f"the model's size cannot be told: {found[max(found)]!r} is number {max(found)} of {len(found)}"
        )
    return len(found)


def _preset_of_this_size(config: ModelConfig) -> ModelConfig | None:
    for make in MODEL_PRESETS.values():
        preset = replace(make(), num_labels=config.num_labels, learned_scale=config.learned_scale)
        rate = preset.backbone.drop_path_rate
        if replace(config, name=preset.name, backbone=replace(config.backbone, drop_path_rate=rate)) == preset:
            return preset
    return None
