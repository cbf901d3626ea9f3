"""A picture's pixels equal those of transformers' Gemma 3 image processor, and bad files end in one sentence.

The oracle is Gemma3ImageProcessorPil, the processor of transformers that works without torchvision. Where it does
something that this package does not want (it drops transparency, clips 16 bits), the truth is arithmetic in the test.
"""

import io
import random
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from minigemma.errors import ImageError
from minigemma.images import PanAndScan, crop_boxes, image_pixels, open_image, prepare

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    oracle = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")

PHOTOGRAPHS = sorted((Path(__file__).parent / "data" / "images").glob("*.jpg"))
CROPPING = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
rng = np.random.default_rng(11)


def processed(image, **settings):
    """(pixels [n, 3, 896, 896], crops) by transformers, with the settings that Gemma 3 was released with."""
    half = [0.5, 0.5, 0.5]
    processor = oracle.Gemma3ImageProcessorPil(size={"height": 896, "width": 896}, image_mean=half, image_std=half)
    out = processor(images=[image], return_tensors="np", **settings)
    return np.asarray(out["pixel_values"]), int(out["num_crops"][0])


def drawing(width, height):
    """Lines, letters and a gradient, sharp edges included."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, (x + y) % 256], -1).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for i in range(0, max(width, height), 17):
        pen.line((i, 0, width - i, height), fill=(i % 256, 255 - i % 256, 40), width=1 + i % 3)
    pen.text((width // 3, height // 3), "Gemma 3", fill="white")
    return image


def same(found, expected):
    """Within 1/255 of the range from 0 to 1 at every pixel."""
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() <= 2 / 255 / 100, "Pillow on both sides: equal but for float32's last digits"


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", [None, (100, 37), (896, 896), (1500, 900), (333, 2000)])
def test_photographs(path, size):
    image = Image.open(path)
    image = image.resize(size, Image.Resampling.LANCZOS) if size else image
    expected, _ = processed(image)
    same(prepare(image)[0], expected)
    if size is None:
        same(prepare(path)[0], expected)
        same(prepare(np.asarray(image))[0], expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 5000), (895, 897), (896, 100), (3000, 1000)])
def test_drawings_of_any_size(size):
    same(image_pixels(drawing(*size)), processed(drawing(*size))[0][0])


def test_another_side():
    half = [0.5, 0.5, 0.5]
    processor = oracle.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, image_mean=half, image_std=half)
    expected = processor(images=[drawing(200, 90)], return_tensors="np")["pixel_values"]
    same(prepare(drawing(200, 90), side=56)[0], np.asarray(expected))


def on_white(image):
    """Transparency composited by arithmetic."""
    r = np.asarray(image.convert("RGBA"), np.float64)
    alpha = r[..., 3:] / 255
    return r[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "YCbCr", "HSV", "LAB", "F"])
def test_modes_without_transparency(mode):
    image = drawing(150, 90).convert("L").convert("F") if mode == "F" else drawing(150, 90)
    image = image if mode in ("F", "LAB", "HSV") else image.convert(mode)
    image = image.convert(mode) if mode in ("HSV",) else image
    same(prepare(image)[0], processed(image.convert("RGB"))[0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P with a transparent colour"])
def test_transparency_is_shown_white(mode, tmp_path):
    image = drawing(150, 90).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 150), (90, 1)).astype(np.uint8)))
    if mode == "LA":
        image = image.convert("LA")
    path = tmp_path / "x.png"
    if mode.startswith("P "):
        image = drawing(150, 90).convert("P")
        image.save(path, transparency=image.getpixel((0, 0)))
    else:
        image.save(path)
    notes = []
    found = open_image(path, notes.append)
    expected = on_white(Image.open(path))
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= 1
    assert len(notes) == 1 and notes[0].endswith("is transparent in places; they are shown white")


def test_an_opaque_picture_with_an_alpha_channel_needs_no_remark():
    notes = []
    found = open_image(drawing(20, 30).convert("RGBA"), notes.append)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(drawing(20, 30)))
    assert not notes


def test_16_bits_of_grey_keep_their_range(tmp_path):
    grey = np.linspace(0, 65535, 120 * 80).reshape(80, 120).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    found = np.asarray(open_image(tmp_path / "x.png"), np.float64)
    assert np.abs(found[..., 0] - grey / 257).max() <= 0.51
    assert (found[..., 0] == found[..., 2]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_the_camera_says(orientation, tmp_path):
    """By NumPy: which pixel of the file is the top left one of the picture."""
    pixels = np.asarray(drawing(60, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    notes = []
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.png", notes.append)), upright)
    assert [note.split("is ")[-1] for note in notes] == (
        [f"turned upright, as its EXIF orientation ({orientation}) says"] if orientation > 1 else []
    )


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    notes = []
    found = np.asarray(open_image(tmp_path / "x.gif", notes.append))
    assert (found == (255, 0, 0)).all()
    assert notes == [f"{tmp_path / 'x.gif'} is animated; its first frame is used"]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp"])
def test_every_format_that_is_named(kind, tmp_path):
    drawing(50, 40).save(tmp_path / f"x.{kind}")
    assert open_image(str(tmp_path / f"x.{kind}")).size == (50, 40)


# ---- pan & scan


def their_boxes(width, height):
    """transformers' crops of a picture whose pixels say where they stand."""
    where = np.stack(np.broadcast_arrays(np.arange(width)[None], np.arange(height)[:, None])).astype(np.int32)
    crops = oracle.Gemma3ImageProcessorPil().pan_and_scan(where, 256, 4, 1.2)
    return [(int(c[0].min()), int(c[1].min()), int(c[0].max()) + 1, int(c[1].max()) + 1) for c in crops]


def test_crop_boxes_of_200_sizes():
    choose = random.Random(4)
    sizes = [(choose.randint(1, 2500), choose.randint(1, 2500)) for _ in range(120)]
    sizes += [(choose.randint(240, 1400), choose.randint(240, 300)) for _ in range(40)]
    sizes += [(512, 256), (511, 256), (512, 255), (600, 500), (599, 500), (601, 500), (640, 256), (896, 256)]
    sizes += [(1023, 409), (1280, 512), (1281, 512), (2000, 300), (5000, 256), (257, 257), (513, 427)]
    sizes += [(height, width) for width, height in sizes[100:]]
    assert len(sizes) >= 200
    cut = 0
    for width, height in sizes:
        boxes = crop_boxes(width, height, PanAndScan())
        assert boxes == their_boxes(width, height), (width, height)
        cut += bool(boxes)
    assert cut > 60, "enough of them are cut at all"


@pytest.mark.parametrize("size", [(1000, 400), (300, 1000), (1023, 300), (500, 480)])
def test_pixels_of_crops(size):
    expected, crops = processed(drawing(*size), **CROPPING)
    found, count = prepare(drawing(*size), pan_and_scan=PanAndScan())
    assert count == crops
    same(found, expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000))
def test_crops_cover_the_picture_once(width, height):
    boxes = crop_boxes(width, height, PanAndScan())
    assert len(boxes) in (0, 2, 3, 4)
    assert not boxes or sum((r - l_) * (b - t) for l_, t, r, b in boxes) == width * height


# ---- bad files


def png(width, height, body=b""):
    """A PNG that claims a size, whatever follows."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def encoded(kind="JPEG"):
    out = io.BytesIO()
    drawing(64, 48).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "is empty; fetch it again"),
        (encoded()[:900], "cannot be decoded"),
        (encoded("PNG")[:-500], "cannot be decoded"),
        (png(20_000, 20_000), "pixels"),
        (png(60_000, 60_000), "pixels; scale it down first|pixels, above"),
        (png(0, 5), "cannot be decoded|is no picture"),
        (b"%PDF-1.7\n" + b"x" * 100, "is a PDF; take a picture in one of PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 100, "is an HEIC picture"),
        (b"just some words", "is no picture, or a damaged one"),
        (b"\xff\xd8\xff" + b"\0" * 200, "is no picture|cannot be decoded"),
        (b"II*\0" + b"\0" * 100, "is no picture"),
    ],
)
def test_bad_files(content, says, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(ImageError, match=says) as caught:
        open_image(path)
    assert time.monotonic() - began < 2
    assert caught.value.path == str(path) and "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    for source, says in (
        (tmp_path / "none.png", "none.png: does not exist; check the path"),
        (tmp_path, "is a folder"),
        ("https://example.org/cow.jpg", "https://example.org/cow.jpg: is a web address; download the picture"),
        ("a\0b", "cannot be read"),
        (None, "the NoneType given as an image: is no image; give a path, a Pillow image or a uint8 array"),
        (np.zeros((3, 4, 5, 6), np.uint8), r"is uint8 \[3, 4, 5, 6\]; it must be uint8 \[height, width, 3\]"),
        (np.zeros((3, 4, 3)), "is float64"),
        (np.zeros((0, 4, 3), np.uint8), "pixels|image"),
    ):
        with pytest.raises(ImageError, match=says):
            open_image(source)


SEEDS = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_damaged_files_open_or_are_refused(tmp_path_factory, seed, data):
    """Bytes changed anywhere, or the end cut off: a picture, or the one error."""
    content = bytearray(seed[: data.draw(st.integers(0, len(seed)))] if data.draw(st.booleans()) else seed)
    for _ in range(data.draw(st.integers(0, 5)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert open_image(path).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)
