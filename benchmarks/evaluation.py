"""Referring evaluation: sentences of one photograph a second, ours and transformers', on the same random weights.

python -m benchmarks.evaluation [--size swin_b] [--sentences 8] [--image PHOTO.jpg] [--threads 2]

RefCOCO testA has 7.5 sentences about each photograph. Ours computes the image half once for them and asks them in
batches; transformers, used as its documentation shows, gets the image anew with each. Rounds alternate.
Random weights rank many proposals almost equally: where rounding swaps two of them, scores move by up to 1e-3.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from groundingdino.devices import pick_device  # before torch: it settles how large tensors get memory

# isort: split
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.random_checkpoint import random_tensor
from groundingdino import text
from groundingdino.config import MODEL_PRESETS, ModelConfig
from groundingdino.conversion import huggingface
from groundingdino.data import transforms
from groundingdino.data.batch import collate_images
from groundingdino.evaluation.referring import EvaluationOptions, ask
from groundingdino.model import GroundingDINO, build_detector

SENTENCES = (
    "the man in the red shirt on the left",
    "second zebra from right",
    "cup",
    "woman holding an umbrella",
    "left most chair that is not occupied",
    "guy in blue",
    "the small dog lying in front of the couch",
    "white bus in the back",
)
Answers = list[tuple[np.ndarray, np.ndarray]]


def random_model(config: ModelConfig) -> GroundingDINO:
    """Weights of a plausible scale."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build_detector(config).eval()
    for name, tensor in model.state_dict().items():
        if "sampling_offsets.bias" not in name and "contrastive_head" not in name:
            tensor.copy_(random_tensor(name, tensor.shape, generator))
    return model


def transformers_model(model: GroundingDINO) -> Any:
    """transformers' MMGroundingDinoForObjectDetection with the same weights."""
    import transformers

    config = transformers.MMGroundingDinoConfig(**huggingface.config_json(model.config))
    theirs = transformers.MMGroundingDinoForObjectDetection(config).eval()
    weights = huggingface.to_huggingface(model.state_dict(), model.config)
    result = theirs.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    return theirs


@torch.inference_mode()
def ask_transformers(theirs: Any, pixels: Tensor, sentence: str) -> np.ndarray:
    """Scores of the queries, falling."""
    words = text.collate_text([text.default_tokenizer().encode(text.finish_caption(sentence))])
    images = collate_images([pixels])
    output = theirs(pixel_values=images.pixels, input_ids=words.token_ids, attention_mask=words.valid.long())
    return output.logits[0].amax(dim=-1).sigmoid().sort(descending=True).values.numpy()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time, and what came out."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def main(
    size: Literal["swin_t", "swin_b", "swin_l"] = "swin_b",
    sentences: int = 8,
    batch_sizes: tuple[int, ...] = (1, 4, 8),
    image: Path | None = None,
    scale: tuple[int, int] = transforms.TEST_SCALE,
    rounds: int = 2,
    threads: int = 2,
    with_transformers: bool = True,
) -> None:
    """Measure on the CPU.

    Args:
        size: of the model.
        sentences: about the photograph.
        batch_sizes: sentences that run together, each measured.
        image: a photograph; default is noise of 640x480.
        scale: most pixels of the short and the long side.
        rounds: the median is reported.
        threads: of torch.
        with_transformers: whether to run transformers beside it; it asks one sentence a round.
    """
    torch.set_num_threads(threads)
    device = pick_device("cpu")
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    pixels, factor = transforms.resize_for_test(
        transforms.open_image(image) if image else Image.fromarray(noise), scale
    )
    asked = [SENTENCES[n % len(SENTENCES)] for n in range(sentences)]
    model = random_model(MODEL_PRESETS[size]())
    theirs = transformers_model(model) if with_transformers else None

    def ours(captions: list[str], batch_size: int) -> Answers:
        options = EvaluationOptions(batch_size=batch_size)
        return list(ask(model, pixels, factor, captions, options, device))

    def one_by_one() -> Answers:
        return [ours([caption], 1)[0] for caption in asked]

    times: dict[str, list[float]] = {}
    answers: dict[str, Answers] = {}
    their_scores = None
    for _ in range(rounds):
        for batch_size in batch_sizes:
            name = f"ours, {batch_size} sentences at once"
            took, answers[name] = seconds(lambda batch_size=batch_size: ours(asked, batch_size))
            times.setdefault(name, []).append(took / sentences)
        if theirs is not None:
            took, their_scores = seconds(lambda: ask_transformers(theirs, pixels, asked[0]))
            times.setdefault("transformers, image and sentence", []).append(took)
    reference = one_by_one()
    print(f"{size}, {pixels.shape[2]}x{pixels.shape[1]} pixels, {sentences} sentences, {threads} threads")
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians.get("transformers, image and sentence")
    for name, median in medians.items():
        ratio = f", {base / median:.1f} times transformers" if base and name.startswith("ours") else ""
        apart = ""
        if name in answers:
            worst = max(np.abs(a[1] - b[1]).max() for a, b in zip(answers[name], reference, strict=True))
            apart = f"; scores differ from one by one by {worst:.1e}"
        print(f"{name}: {median:.2f} s a sentence, {1 / median:.3f} a second{ratio}{apart}")
    if their_scores is not None:
        kept = reference[0][1]
        apart = np.abs(kept - their_scores[: len(kept)]).max()
        print(f"scores of the first sentence differ from transformers' by {apart:.1e}")


if __name__ == "__main__":
    tyro.cli(main)
