"""Decoding, resizing and normalising against what mmdet's pipelines made of the golden images."""

import hashlib
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from groundingdino.inputs import images
from groundingdino.inputs.images import (
    inference_size,
    normalize,
    open_image,
    resize_for_inference,
    resize_for_training,
    to_rgb,
    training_size,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
RESIZED = json.loads((GOLDEN / "test_resize.json").read_text())
# Pillow before 13 rounds this one case differently; see the golden README.
BY_PIXELS = "tall_398x60@200"


@pytest.mark.parametrize("case", RESIZED)
def test_the_test_time_image_is_mmdets_to_the_last_pixel(case: str):
    expected = RESIZED[case]
    image = open_image(GOLDEN / "images" / f"{case.split('@')[0]}.png")
    found = resize_for_inference(image, tuple(expected["scale"]))
    assert [image.height, image.width] == expected["ori_shape"]
    assert list(found.pixels.shape) == [3, *expected["img_shape"]]
    assert found.geometry.size == tuple(expected["img_shape"])
    assert list(found.geometry.scale_factor) == expected["scale_factor_wh"]
    rows = found.pixels.permute(1, 2, 0).numpy()
    if case == BY_PIXELS:
        stored = np.load(GOLDEN / "test_resize_200.npz")
        stored = stored[next(name for name in stored.files if name.startswith("tall"))]
        assert np.abs(rows.astype(int) - stored.astype(int)).max() <= 1
    else:
        assert hashlib.sha256(rows.tobytes()).hexdigest() == expected["sha256_rgb_uint8"]


def test_sizes_truncate_at_test_time_and_round_in_training():
    table = json.loads((GOLDEN / "resize_sizes.json").read_text())
    assert table["columns"] == ["w", "h", "test_w", "test_h", "train_short_side", "train_w", "train_h"]
    assert len(table["rows"]) == 3000
    for w, h, test_w, test_h, short, train_w, train_h in table["rows"]:
        assert inference_size((w, h)) == (test_w, test_h)
        assert training_size((w, h), (short, 1333)) == (train_w, train_h)


def test_gray_with_alpha_lies_on_mmcvs_canvas_and_other_alpha_is_dropped():
    gray = Image.fromarray(np.array([[[200, 0], [200, 255]]], dtype=np.uint8))
    assert np.array(to_rgb(gray)).tolist() == [[[124, 117, 104], [200, 200, 200]]]
    colour = Image.fromarray(np.array([[[1, 2, 3, 0]]], dtype=np.uint8))
    assert np.array(to_rgb(colour)).tolist() == [[[1, 2, 3]]]


def test_the_callers_image_is_left_as_it_is():
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    assert to_rgb(image).size == (2, 4)
    assert image.size == (4, 2) and image.getexif()[0x0112] == 6


def test_the_training_resize_interpolates_between_neighbours_also_where_it_shrinks():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 30, 40), generator=generator, dtype=torch.uint8)
    for width, height in [(20, 15), (33, 25), (53, 40), (133, 100)]:
        resized = resize_for_training(image, (width, height))
        x = ((np.arange(width) + 0.5) * 40 / width - 0.5).clip(0, 39)
        y = ((np.arange(height) + 0.5) * 30 / height - 0.5).clip(0, 29)
        x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
        x1, y1 = (x0 + 1).clip(max=39), (y0 + 1).clip(max=29)
        pixels = image.numpy().astype(float)
        rows = pixels[:, y0] * (1 - (y - y0))[:, None] + pixels[:, y1] * (y - y0)[:, None]
        exact = rows[:, :, x0] * (1 - (x - x0)) + rows[:, :, x1] * (x - x0)
        assert resized.dtype == torch.uint8
        assert np.abs(resized.numpy() - exact).max() <= 1.0 + 1e-9


def test_normalising_uses_imagenets_mean_and_deviation_in_rgb_order():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = [(0 - 123.675) / 58.395, (128 - 116.28) / 57.12, (255 - 103.53) / 57.375]
    torch.testing.assert_close(normalize(image).flatten(), torch.tensor(expected))


def test_a_missing_or_broken_image_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="gone.jpg: no such file"):
        open_image(tmp_path / "gone.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match="text.jpg: not a readable image"):
        open_image(tmp_path / "text.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.jpg: not a readable image"):
        open_image(tmp_path / "cut.jpg")
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
    (tmp_path / "header.png").write_bytes(header)
    with pytest.raises(ValueError, match="header.png: not a readable image"):
        open_image(tmp_path / "header.png")


@pytest.mark.parametrize("content", [b"P6 0 0 255\n", b"GIF89a" + bytes(7) + b";"], ids=["ppm", "gif"])
def test_a_file_of_no_pixels_is_refused_in_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "empty").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*empty: not a readable image[^\n]*$"):
        open_image(tmp_path / "empty")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_of_gray_become_eight(tmp_path: Path, suffix: str):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"gray.{suffix}")
    found = np.asarray(images.open_image(tmp_path / f"gray.{suffix}"))
    assert found.shape == (16, 16, 3) and found[0, 0, 0] == 0 and found[-1, -1, 0] == 255
    assert np.abs(found[..., 0].astype(float) - values / 257).max() < 1


def test_numbers_without_a_known_range_are_refused(tmp_path: Path):
    Image.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif: not a readable image .its pixels are 32-bit numbers"):
        images.open_image(tmp_path / "float.tif")


def test_a_pipe_a_folder_and_a_device_are_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, what in ((tmp_path / "pipe.jpg", "pipe"), (tmp_path, "folder"), (Path("/dev/zero"), "device")):
        with pytest.raises(ValueError, match=what):
            images.open_image(path)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path):
    """144 million pixels in a file of a hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(ValueError, match="bomb.png: .*12000x12000 pixels, more than"):
        images.open_image(tmp_path / "bomb.png")


def test_damaged_exif_data_do_not_matter_and_pillows_warnings_stay_inside(tmp_path: Path, recwarn):
    image = Image.effect_noise((32, 24), 50).convert("RGB")
    image.save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    image.quantize(8).save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    assert images.open_image(tmp_path / "exif.jpg").size == (32, 24)
    assert images.open_image(tmp_path / "palette.png").mode == "RGB"
    assert not recwarn.list


def test_a_moving_picture_is_its_first_frame(tmp_path: Path):
    first, second = (Image.new("RGB", (8, 6), color) for color in ("red", "blue"))
    for kind in ("gif", "png", "webp", "tiff"):
        options = {"lossless": True} if kind == "webp" else {}
        first.save(tmp_path / f"moving.{kind}", save_all=True, append_images=[second], **options)
        found = images.open_image(tmp_path / f"moving.{kind}")
        assert found.size == (8, 6) and found.getcolors() == [(48, (255, 0, 0))], kind


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_colors_for_printing_become_those_of_a_screen(tmp_path: Path, suffix: str):
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / f"printed.{suffix}")
    ((count, color),) = images.open_image(tmp_path / f"printed.{suffix}").getcolors()
    assert count == 48 and np.abs(np.subtract(color, (255, 0, 0))).max() <= 2  # JPEG rounds


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_as_pillow_turns_it(orientation: int):
    image = Image.effect_noise((5, 3), 50).convert("RGB")
    image.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(image)
    assert np.array_equal(np.asarray(images.to_rgb(image)), np.asarray(expected))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 4, device="meta"), "meta"),
        (torch.zeros(3, 4, 4).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.zeros(3, 4, 4), 0.1, 0, torch.quint8), "quantized"),
        (torch.zeros(3, 4, 4).to(torch.float8_e4m3fn), "float8"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "complex64"),
        (torch.full((3, 4, 4), float("nan")), "nan"),
        (b"bytes", "got bytes"),
        ({"a": 1}, "got dict"),
        (Image.new("RGB", (0, 5)), "0x5 pixels"),
        ("a\0b.jpg", "cannot be the name"),
        ("\ud800.jpg", "no such file|cannot be"),
        (np.full((4, 4, 3), None), "got object"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(image, message):
    with pytest.raises(ValueError, match=message) as caught:
        images.load_image(image)
    assert "\n" not in str(caught.value)


def test_a_list_that_contains_itself_is_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="contains itself"):
        list(images.each_image(endless))
