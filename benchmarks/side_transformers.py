"""transformers' MMGroundingDinoForObjectDetection, used as its documentation shows. See `worker`."""

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHECKPOINTED = ("SwinLayer", "MMGroundingDinoEncoderLayer")  # a block of the backbone, a layer of the encoder


class Side:
    """The model and what the benchmarks ask of it."""

    def __init__(self, folder: Path, threads: int) -> None:
        import transformers

        torch.set_num_threads(threads)
        self.model = transformers.MMGroundingDinoForObjectDetection.from_pretrained(folder / "theirs").eval()
        self.model.config.auxiliary_loss = True  # losses of every decoder layer, as in every Grounding DINO

    def forget(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Nothing to close."""

    def to_bfloat16(self) -> dict[str, float]:
        """From now on weights and images are in bfloat16."""
        self.model.bfloat16()
        return {}

    @torch.inference_mode()
    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """scores (B, Q) of the best token, boxes (B, Q, 4) cxcywh in [0, 1]."""
        output = self.model(
            pixel_values=inputs["pixels"].to(self.model.dtype),
            input_ids=inputs["token_ids"],
            attention_mask=inputs["valid"].long(),
        )
        return {"scores": output.logits.amax(-1).sigmoid().float(), "boxes": output.pred_boxes.float()}

    def train(self, inputs: dict[str, Tensor], checkpointing: bool) -> dict[str, float]:
        """Forward, loss and backward. It has no denoising queries."""
        self.model.train()
        self._checkpoint(checkpointing)
        classes = torch.zeros(inputs["boxes"].shape[1], dtype=torch.int64)
        labels = [{"class_labels": classes, "boxes": boxes} for boxes in inputs["boxes"]]
        output = self.model(
            pixel_values=inputs["pixels"],
            input_ids=inputs["token_ids"],
            attention_mask=inputs["valid"].long(),
            labels=labels,
        )
        output.loss.backward()
        self.model.eval()
        return {"loss": float(output.loss.detach())}

    def _checkpoint(self, on: bool) -> None:
        """Its own switch reaches the decoder only: wrap the backbone's blocks and the encoder's layers."""
        # By their classes: where in the model the blocks are differs from version 4 to 5.
        layers = [module for module in self.model.modules() if type(module).__name__ in CHECKPOINTED]
        for layer in layers:
            layer.__dict__.pop("forward", None)
            if on:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
