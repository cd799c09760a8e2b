"""Whatever an image file holds: a picture, or one line that names it; and no library writes to the terminal."""

import io
from pathlib import Path

import numpy as np
import pytest
from fuzz.fuzzing import damaged_bytes, outcome, run_cases
from hypothesis import strategies as st
from PIL import Image

from groundingdino.inputs.images import open_image, resize_for_inference

CASES = 200


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def files() -> list[bytes]:
    """One small file of each format and mode."""
    colors = Image.effect_noise((24, 18), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = [colors.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I")]
    deep = Image.fromarray(np.linspace(0, 65535, 432, dtype=np.uint16).reshape(18, 24))
    floats = Image.fromarray(np.ones((18, 24), dtype=np.float32))
    return [
        *(saved(image, "png") for image in [*modes, deep]),
        saved(colors.quantize(8), "png", transparency=bytes([0, 128, 255])),
        *(saved(colors.convert(mode), "jpeg", exif=exif) for mode in ("L", "RGB", "CMYK")),
        saved(colors, "jpeg", progressive=True),
        saved(colors.quantize(16), "gif", save_all=True, append_images=[colors.quantize(4)], duration=50),
        *(saved(colors, "webp", lossless=lossless, exif=exif) for lossless in (True, False)),
        *(saved(colors, "tiff", compression=name) for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        *(saved(image, "tiff") for image in (deep, floats, colors.convert("CMYK"), colors.convert("1"))),
        *(saved(image, "bmp") for image in (colors, colors.convert("P"), colors.convert("1"))),
        *(saved(colors, kind) for kind in ("ppm", "tga", "ico", "pcx", "sgi", "jpeg2000")),
    ]


FILES = files()


def test_any_file_is_a_picture_or_one_line(
    request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "photo.jpg"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        image = outcome(lambda: open_image(path), str(path))
        assert image is None or resize_for_inference(image, (32, 48)).pixels.shape[0] == 3
        assert capfd.readouterr().err == ""

    run_cases(request, st.sampled_from(FILES).flatmap(lambda content: damaged_bytes(content, busy=100)), check, CASES)
