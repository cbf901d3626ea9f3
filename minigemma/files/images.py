"""Turns a picture into the pixels that the vision tower takes: [3, 896, 896] float32 in [-1, 1] (Gemma 3 §2.1).

Steps: decode the first frame; rotate it as its EXIF orientation says; convert to RGB, transparency over white; scale to
896 x 896 whatever its shape with Pillow's bilinear filter, which averages where it shrinks; x / 127.5 - 1. Gemma's
processor in transformers does the same, except that it drops transparency and clips 16-bit grey.

Pan & scan (Gemma 3 §2.1): scaling to a square squeezes a wide or tall picture, so small print is lost. On request such
a picture is also cut into up to four crops of equal size, side by side, each scaled separately.
"""

from __future__ import annotations

import math
import re
import warnings
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..arrays import F32
from ..errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000  # larger pictures are refused before they are decoded
SIDE = 896

KINDS: dict[bytes | tuple[bytes, ...], str] = {  # how other files begin, in lower case, and what they are
    b"%pdf": "a PDF",
    b"<svg": "an SVG drawing",
    b"<?xml": "XML, perhaps an SVG drawing",
    (b"<!doctype html", b"<html"): "a web page",
    (b"ii*\0", b"mm\0*"): "a TIFF picture",
    (b"ftyphe", b"ftypmif1"): "an HEIC picture",
    b"ftypavi": "an AVIF picture",
    (b"\0\0\0\x0cjp", b"\xff\x4f\xff\x51"): "a JPEG 2000 picture",
    b"\0\0\1\0": "an icon",
    b"8bps": "a Photoshop file",
    (b"p1", b"p2", b"p3", b"p4", b"p5", b"p6"): "a Netpbm picture",
    b"ftyp": "a video",
}

Notes = Callable[[str], None]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two not included


@dataclass(frozen=True, kw_only=True)
class PanAndScan:
    """Which pictures are cut into how many crops. The defaults are those of the Gemma 3 release."""

    min_crop_size: int = 256  # pixels, of the shorter side
    max_crops: int = 4
    min_ratio: float = 1.2  # of the longer to the shorter side

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        if self.min_crop_size < 1 or self.max_crops < 1:
            raise ValueError(f"{self}: min_crop_size and max_crops must be 1 or more")


def prepare(
    source: Any, side: int = SIDE, pan_and_scan: PanAndScan | None = None, notes: Notes | None = None
) -> tuple[F32, int]:
    """A picture as float32 [1 + crops, 3, side, side] in [-1, 1], the whole one first, and the number of its crops.

    source: as `open_image` takes it. Raises ImageError.
    """
    image = open_image(source, notes)
    boxes = crop_boxes(*image.size, pan_and_scan) if pan_and_scan else []
    return np.stack([image_pixels(part, side) for part in [image, *map(image.crop, boxes)]]), len(boxes)


def image_pixels(image: Image.Image, side: int = SIDE) -> F32:
    """An RGB picture scaled to a square: float32 [3, side, side] in [-1, 1]      [Gemma 3 §2.1]

    Pillow scales and rounds in uint8; a filter in float32 would differ by up to 1 of those 255 steps.
    """
    scaled = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1)


def crop_boxes(width: int, height: int, pan_and_scan: PanAndScan) -> list[Box]:
    """The crops of a picture, left to right or top to bottom; none if it is nearly square or small.

    Their number is the rounded ratio of the sides, at least 2 and at most `max_crops`, and limited so that each crop
    keeps `min_crop_size` pixels. If it does not divide evenly, the last crop is narrower.      [Gemma 3 §2.1]

    >>> crop_boxes(1000, 400, PanAndScan())
    [(0, 0, 334, 400), (334, 0, 668, 400), (668, 0, 1000, 400)]
    """
    long, short = max(width, height), min(width, height)
    if long / short < pan_and_scan.min_ratio:
        return []
    count = min(long // pan_and_scan.min_crop_size, math.floor(long / short + 0.5))
    count = min(max(2, count), pan_and_scan.max_crops)
    size = -(-long // count)
    if min(size, short) < pan_and_scan.min_crop_size:
        return []
    cuts = [(start, min(start + size, long)) for start in range(0, long, size)]
    return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in cuts]


def open_image(source: Any, notes: Notes | None = None) -> Image.Image:
    """A picture as RGB, upright and decoded whole.

    source: a path, the bytes of a file, a Pillow image, or uint8 [h, w], [h, w, 3] or [h, w, 4]. Changes that its
    author might not expect (rotation, transparency over white, first frame) are passed to `notes`, a sentence each.
    Raises ImageError for anything else, for formats other than PNG, JPEG, WebP, GIF and BMP, and above 50 megapixels.
    """
    name, tell = _name(source), notes or (lambda text: None)
    if re.match(r"(https?|ftp|file|data):", name, re.IGNORECASE):
        raise ImageError(name, "is a web address", "download the picture and give its path")
    if not isinstance(source, (str, Path, bytes, Image.Image, np.ndarray)):
        raise ImageError(name, "is no image", "give a path, a Pillow image or a uint8 array [height, width, 3]")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about sizes and odd metadata: sizes are checked here
            if isinstance(source, np.ndarray):
                return _rgb(_from_array(source), name, tell)
            if isinstance(source, Image.Image):
                return _rgb(source, name, tell)
            with _opened(source if isinstance(source, bytes) else Path(source).expanduser(), name) as image:
                _check_size(image.size, name)
                if getattr(image, "is_animated", False) and image.format != "MPO":  # a JPEG with a second one for depth
                    tell(f"{name} is animated; its first frame is used")
                return _rgb(image, name, tell)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        problem = f"cannot be decoded ({error or type(error).__name__})"
        raise ImageError(name, problem, "the file is damaged or cut short: fetch it again") from None


def content_of(url: Any) -> bytes:
    """The content of an image's data URL; ValueError for what is none."""
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise ValueError("an image must come as a data URL, data:image/png;base64,…; nothing is fetched")
    try:
        return b64decode("".join(data.split()), validate=True)  # `base64` of a shell breaks lines
    except ValueError as error:
        raise ValueError(f"the data URL of an image is not base64: {error}") from None


def _name(source: Any) -> str:
    """The name of a picture in errors and notes: its path if it has one; the start of a data: address."""
    path = source if isinstance(source, (str, Path)) else getattr(source, "filename", "")
    text = str(path or f"the {type(source).__name__} given as an image")
    return f"{text[:60]}…" if text[:5].lower() == "data:" else text


def _opened(source: Path | bytes, name: str) -> Image.Image:
    head = source[:64].lower() if isinstance(source, bytes) else _head(source)
    if not head:
        raise ImageError(name, "is empty", "fetch it again")
    try:
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(name, f"has more than {MAX_PIXELS:,} pixels", "scale it down first") from None
    except UnidentifiedImageError:
        start = head[4:] if head[4:8] == b"ftyp" else head.removeprefix(b"\xef\xbb\xbf").lstrip()
        kind = next((what for magic, what in KINDS.items() if start.startswith(magic)), "no picture, or a damaged one")
        raise ImageError(name, f"is {kind}", f"give one of these: {', '.join(FORMATS)}") from None


def _head(path: Path) -> bytes:
    """The first bytes of a file, in lower case."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe or device may never end
            raise ImageError(path, "is no regular file", "save the picture to a file first")
        with path.open("rb") as file:
            return file.read(64).lower()
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(path, "does not exist", "check the path") from None
    except IsADirectoryError:
        raise ImageError(path, "is a folder", "give the picture's own path") from None
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', error)})"
        raise ImageError(path, problem, "check the path and its permissions") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(name, f"has {width:,} x {height:,} pixels, above {MAX_PIXELS:,}", "scale it down first")
    if not width * height:
        raise ImageError(name, f"has {width} x {height} pixels", "take another picture")


def _from_array(array: np.ndarray) -> Image.Image:
    shapes = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shapes:
        problem = f"is {array.dtype} {list(array.shape)}"
        raise ImageError("the array given as an image", problem, "it must be uint8 [height, width, 3]")
    return Image.fromarray(np.ascontiguousarray(array))


def _grey(values: NDArray, mode: str, name: str) -> NDArray:
    """Scales grey of more than 8 bits, which Pillow would clip, to uint8: I;16 from 16 bits, I and F by value."""
    low, high = float(values.min()), float(values.max())
    bits = 16 if mode.startswith("I;16") or (mode == "I" and high > 255) else 8
    if not (low >= 0 and high < 2**bits) or (mode == "F" and 0 < high <= 1):
        problem = f"is of Pillow's mode {mode} with values from {low:g} to {high:g}"
        raise ImageError(name, problem, "scale them to 0 … 255 and convert it to mode L")
    return (values / (257 if bits == 16 else 1)).round().astype(np.uint8)


def _rgb(image: Image.Image, name: str, tell: Notes) -> Image.Image:
    """Upright, without transparency, 8 bits a channel."""
    _check_size(image.size, name)
    image.load()
    orientation = image.getexif().get(0x0112, 1)
    if orientation in range(2, 9):
        image = ImageOps.exif_transpose(image)
        tell(f"{name} is turned upright, as its EXIF orientation ({orientation}) says")
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(np.asarray(image, np.float32), image.mode, name)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            tell(f"{name} is transparent in places; they are shown white")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
