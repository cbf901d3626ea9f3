"""Models of any released size with random weights, made in memory, for measuring and for looking at shapes.

Their output is noise; their cost equals that of the released weights, byte for byte. A matrix of D columns has weights
of about D^-1/2, so activations keep their size from layer to layer.
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays import read_only
from ..config import TextConfig
from ..files.convert import FORMATS, RUNS_AS, in_eight_bits
from ..layouts import LAYOUTS, Weight
from ..models.decoder import Decoder
from ..models.parameters import assembled
from ..models.registry import FAMILIES, RELEASED, all_names

SPREAD = {"int8": 74.0, "int4": 4.6, "int4-symmetric": 4.6}  # the standard deviation of random bytes and nibbles


def random_model(
    shape: str | TextConfig,
    dtype: str = "bf16",
    layers: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    vision: bool = True,
) -> Decoder:
    """A model of a released name ("recurrentgemma-2b") or a config, with random weights and without a tokenizer.

    dtype: one of FORMATS, as in `load`, for the layout that it runs in; `layers`: only the first ones, also of the
    vision tower; `vision`: with it, where the model has one.
    Raises ValueError for an unknown name or dtype.
    """
    if isinstance(shape, str):
        if shape not in RELEASED:
            raise ValueError(f"no released model is named {shape!r}; the released ones are {', '.join(RELEASED)}")
        shape = RELEASED[shape]
    if dtype not in FORMATS:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(FORMATS)}")
    config = replace(shape, layers=min(layers or shape.layers, shape.layers))
    if eyes := config.vision:
        config = replace(
            config, vision=replace(eyes, layers=min(layers or eyes.layers, eyes.layers)) if vision else None
        )
    random = np.random.Generator(np.random.SFC64(seed))
    weights = {name: _tensor(random, name, shape, dtype) for name, _, shape in all_names(config, 0)}
    return FAMILIES[config.family].model(config, assembled(config, weights), exact=dtype == "f32", threads=threads)


def _tensor(random: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    if name.endswith("recurrent.conv"):
        return read_only(random.standard_normal((shape[2], shape[0]), np.float32) * np.float32(0.1))
    if name == "vision.patch":
        shape = (shape[0], shape[1] * shape[2] * shape[3])
    elif name == "vision.projection":
        shape = shape[::-1]
    if name.endswith("recurrent.decay"):  # a between 0.9 and 0.999, as the paper begins (§2.4)
        return read_only((-np.log(random.uniform(0.9, 0.999, shape)) / 8).astype(np.float32))
    if len(shape) == 2 and not name.endswith("_bias") and name != "vision.positions":
        return random_matrix(random, *shape, in_eight_bits(name, dtype, shape[1]))
    if len(shape) == 3 and dtype != "f32":
        return read_only(random_matrix(random, shape[0] * shape[1], shape[2], "bf16").data.reshape(shape))
    gain = 1 if re.search(r"^vision\..*norm[12]?$", name) and name != "vision.soft_norm" else 0  # of a LayerNorm
    return read_only(random.standard_normal(shape, np.float32) * np.float32(0.1) + np.float32(gain))


def random_matrix(random: np.random.Generator, rows: int, columns: int, dtype: str) -> Weight:
    """[R, D] of weights around D^-1/2, in the layout that `load` gives this dtype; rows of no whole blocks are bf16."""
    size, layout = float(columns) ** -0.5, LAYOUTS[RUNS_AS.get(dtype, dtype)]
    if rows % layout.rows:
        layout = LAYOUTS["int8"]
    if columns % layout.columns:
        layout = LAYOUTS["bf16"]
    if layout.name == "f32":
        return Weight(layout, random.standard_normal((rows, columns), np.float32) * np.float32(size), (rows, columns))
    count = layout.nbytes(rows, columns)
    data = random.integers(0, 1 << 64, -(-count // 8), np.uint64).view(np.uint8)[:count]
    data = data.view(layout.dtype).reshape(layout.data_shape(rows, columns))
    if layout.name == "bf16":  # a random sign and fraction and one exponent: evenly spread from 2^e to 2^(e + 1), ±
        data &= np.uint16(0x807F)
        data |= np.uint16((127 + round(np.log2(size / 1.5))) << 7)
    else:
        scales = np.full(layout.rows, size / SPREAD[layout.name], np.float16)
        data[..., : scales.nbytes] = scales.view(np.uint8)
        if layout.name == "int4":
            data[..., scales.nbytes : 2 * scales.nbytes] = (scales * np.float16(-7.5)).view(np.uint8)
    return Weight(layout, data, (rows, columns))
