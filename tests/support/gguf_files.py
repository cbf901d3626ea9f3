"""GGUF files and blocks as llama.cpp's gguf package writes them, without the package.

files/test_gguf_file.py compares files and layouts/test_gguf_blocks.py blocks with the package's own under `-m oracle`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

# Of a type: its number in a file, and the weights and bytes of a block.
KINDS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
}
HALVES = dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,))  # where the scales stand; else 0 and 2
HALVES |= {"Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "TQ1_0": (52,), "TQ2_0": (64,)}
LOSSLESS = ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "TQ1_0", "TQ2_0")
# Of a value's type: its number, and how struct packs it.
NUMBERS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
USUAL = {int: "uint32", float: "float32", bool: "bool", str: "string"}


class Typed(tuple):
    """(type's name, value), where a value's usual type is not the one wanted."""


def text(value: str | bytes, order: str = "<") -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack(f"{order}Q", len(value)) + value


def packed(value: Any, order: str, inside: bool = False) -> bytes:
    """A value with the number of its type; whole numbers are int32 inside lists, uint32 elsewhere."""
    if isinstance(value, list):
        items = [packed(item, order, inside=True) for item in value]
        head = struct.pack(f"{order}I", 9) + items[0][:4] + struct.pack(f"{order}Q", len(items))
        return head + b"".join(item[4:] for item in items)
    name, value = value if isinstance(value, Typed) else (USUAL[type(value)], value)
    if name == "string":
        return struct.pack(f"{order}I", 8) + text(value, order)
    number, form = NUMBERS["int32" if inside and name == "uint32" else name]
    return struct.pack(f"{order}I", number) + struct.pack(f"{order}{form}", value)


def write(
    path: Path,
    architecture: str,
    fields: dict[str, Any],
    tensors: dict[str, Any],
    alignment: int | None = None,
    order: str = "<",
) -> Path:
    """A file of version 3; a tensor is an array of float32 or float16, or (type, bytes [..., R, bytes of a row])."""
    step = alignment or 32
    pairs = {"general.architecture": architecture} | fields
    if alignment:
        pairs = {"general.architecture": architecture, "general.alignment": alignment} | fields
    head = b"GGUF" + struct.pack(f"{order}IQQ", 3, len(tensors), len(pairs))
    head += b"".join(text(key, order) + packed(value, order) for key, value in pairs.items())
    body = b""
    for name, tensor in tensors.items():
        kind, data = tensor if isinstance(tensor, tuple) else ({4: "F32", 2: "F16"}[tensor.dtype.itemsize], tensor)
        number, weights, size = KINDS[kind]
        shape = list(data.shape)
        if data.dtype == np.uint8:
            shape[-1] = shape[-1] // size * weights
        head += text(name, order) + struct.pack(f"{order}I", len(shape))
        head += struct.pack(f"{order}{len(shape)}QIQ", *shape[::-1], number, len(body))
        body += np.ascontiguousarray(data if order == "<" else data.byteswap()).tobytes()
        body += bytes(-len(body) % step)
    path.write_bytes(head + bytes(-len(head) % step) + body)
    return path


def quantize(values: np.ndarray, kind: str) -> np.ndarray:
    """Bytes [R, bytes of a row] of float32 values [R, D], as ggml makes them; F32, F16 as arrays."""
    if kind in ("F32", "F16"):
        return values.astype({"F32": np.float32, "F16": np.float16}[kind], copy=False)
    if kind == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    blocks = values.reshape(-1, 32)
    low = blocks.min(axis=1, keepdims=True)
    if kind in ("Q4_1", "Q5_1"):
        d = (blocks.max(axis=1, keepdims=True) - low) / (15 if kind == "Q4_1" else 31)
    else:
        farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
        d = np.abs(farthest) / 127 if kind == "Q8_0" else farthest / {"Q4_0": -8, "Q5_0": -16}[kind]
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, 0, 1 / d)
    scale = [d.astype(np.float16).view(np.uint8)]
    if kind == "Q8_0":
        x = blocks * inverse
        q = np.sign(x) * (np.floor(np.abs(x)) + np.floor(2 * (np.abs(x) - np.floor(np.abs(x)))))
        parts = [*scale, q.astype(np.int8).view(np.uint8)]
    else:
        minimum = kind in ("Q4_1", "Q5_1")
        top, half = (15, 8.5) if kind[1] == "4" else (31, 16.5)
        x = (blocks - low) * inverse + np.float32(0.5) if minimum else blocks * inverse + np.float32(half)
        q = np.trunc(x).astype(np.uint8).clip(0, top)
        if minimum:
            scale.append(low.astype(np.float16).view(np.uint8))
        if top == 31:
            scale.append(np.packbits(q >> 4, axis=1, bitorder="little"))
        parts = [*scale, (q[:, :16] & 15) | (q[:, 16:] << 4)]
    return np.concatenate(parts, axis=1).reshape(len(values), -1)


def random_blocks(kind, rows=7, columns=3, seed=0):
    """[rows, columns, bytes]: every bit random, but for scales of the size that models have."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (rows, columns, KINDS[kind][2]), np.uint8)
    for at in HALVES.get(kind, (0, 2)):
        made[..., at : at + 2] = (rng.standard_normal((rows, columns, 1)) * 0.02).astype(np.float16).view(np.uint8)
    made.setflags(write=False)
    return made
