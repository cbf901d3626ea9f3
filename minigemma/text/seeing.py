"""Images as a text model sees them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import F32
from ..errors import check_type, no_vision
from ..models.decoder import Decoder

if TYPE_CHECKING:
    from ..files.images import PanAndScan


@dataclass(frozen=True)
class Seen:
    """Images as the text model sees them, made by `look_at` once for all answers about them."""

    features: F32  # [n, tokens, D]: each image, then its crops
    crops: tuple[int, ...]  # of each image

    def __len__(self) -> int:
        return len(self.crops)


def look_at(
    model: Decoder,
    images: Sequence[Any],
    pan_and_scan: PanAndScan | None = None,
    notes: Callable[[str], None] = warnings.warn,
) -> Seen:
    """Run images through the vision tower.

    images: files, Pillow images, uint8 arrays [h, w, 3], or one float32 array [n, 3, side, side] in [-1, 1]. With
    `pan_and_scan` those that are wide or tall are looked at in crops too (Gemma 3 §2.1). What is done to a picture
    beyond scaling it (turned as its camera says, transparency on white) is told to `notes`.

    Raises ImageError for files that are no images, ValueError where the model has no vision tower.
    """
    if isinstance(images, (str, Path)):
        images = [images]
    vision = model.vision
    if vision is None:
        raise no_vision(model.name, len(images))
    if isinstance(images, np.ndarray) and images.dtype == np.float32:
        return Seen(model.image_features(images), (0,) * len(images))
    from ..files.images import PanAndScan, prepare  # and with them Pillow, which a text needs nothing of

    check_type("pan_and_scan", pan_and_scan, PanAndScan, "a PanAndScan of minigemma.files.images")
    looked = [prepare(image, vision.side, pan_and_scan, notes) for image in images]
    features = [model.image_features(pixels) for pixels, _ in looked]
    return Seen(np.concatenate(features), tuple(crops for _, crops in looked))
