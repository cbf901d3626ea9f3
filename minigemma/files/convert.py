"""Converts a tensor from the form in the file to the layout that the models run.

bf16, float32, Q8_0 and the int4 of `minigemma quantize` run in the mapped file. Other forms are converted while
loading, some rows at a time, so a float32 copy of the model never exists. layouts/__init__.py lists what each form
becomes and how much memory that takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, LargePages, read_only
from ..formulas.rglru import softplus
from ..kernels import gguf_blocks as _gguf_kernels  # noqa: F401  they run in place of the definitions
from ..layouts import LAYOUTS, STORED, Layout, Weight, int4, int8, rows
from ..layouts.gguf_blocks import KINDS, dequantize, to_int8

CONVERTED_TOGETHER = 1 << 24  # weights converted through float32 at a time
READABLE = ("F32", "F16", "BF16", *KINDS)
EIGHT_BITS = {"int4": "int8", "int4-symmetric": "int8", "int4-row": "int8-row"}  # of weights that need them
NARROW_MODEL = 1024  # columns
NARROW = ("int8", "int4", "int4-symmetric", *STORED)
FORMS = LAYOUTS | STORED  # what `dtype` may be
FORMATS = tuple(FORMS)
FOUR_BITS = ("int4", "int4-symmetric")
OURS = {name.upper(): name for name in (*FOUR_BITS, *STORED)}  # names in files of the forms that only we write
AS_STORED = OURS | int4.KINDS | {"F32": "f32", "BF16": "bf16", "Q8_0": "int8"}
RUNS_AS = {"sfp8": "bf16", "int8-row": "int8", "int4-row": "int4-symmetric"}


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it: `kind` is the file's name of its type ("BF16", "Q5_0", …), `shape` [R, D] or [D].

    eight_bits: int4 runs as int8, which `in_mostly_other_bits` decides.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    array: NDArray
    eight_bits: bool = False


def in_mostly_other_bits(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Marks the tensors to run as int8 if less than a quarter of all weights would run as int4.

    That takes little more memory, and x keeps 16 bits. The demo file stores one matrix per layer in Q4_K; files of 1B
    and larger store most of them so.
    """
    sizes = {ours: int(np.prod(tensor.shape)) for ours, tensor in tensors.items()}
    four = [ours for ours, tensor in tensors.items() if AS_STORED.get(tensor.kind) == "int4"]
    few = 4 * sum(sizes[ours] for ours in four) < sum(sizes.values())
    return {**tensors, **({ours: replace(tensors[ours], eight_bits=True) for ours in four} if few else {})}


def stored_tensor(name: str, dtype: str, array: NDArray) -> Stored:
    """A tensor of a safetensors file. `minigemma quantize` writes bytes, whose shape tells the form."""
    if dtype not in ("U8", "I8"):
        return Stored(name, dtype, array.shape, array)
    shape, size = array.shape, array.shape[-1] if array.ndim else 0
    blocks = {34: ("Q8_0", 1), 18: ("Q4_0", 1)}
    blocks |= {int4.BYTES: ("INT4", int4.SIDE), int4.SYMMETRIC_BYTES: ("INT4-SYMMETRIC", int4.SIDE)}
    if dtype == "U8" and array.ndim == 3 and size in blocks:
        kind, together = blocks[size]
        return Stored(name, kind, (shape[0] * together, shape[1] * 32), array)
    if dtype == "U8" and array.ndim == 3 and shape[1] == 1 and size % 16 == rows.SCALE_BYTES:
        return Stored(name, "INT4-ROW", (shape[0], (size - rows.SCALE_BYTES) * 2), array)
    if array.ndim == 2 and (dtype == "U8" or size % 32 == rows.SCALE_BYTES):
        return Stored(name, "SFP8" if dtype == "U8" else "INT8-ROW", (shape[0], size - rows.SCALE_BYTES), array)
    return Stored(name, dtype, shape, array)  # which is refused


def runs_as(ours: str, tensor: Stored, dtype: str | None) -> str:
    """The name of the layout in which a tensor runs once loaded with this dtype."""
    tensor = _laid_out(ours, tensor)
    if is_matrix(ours, tensor):
        return layout_for(tensor, form_for(tensor, dtype, ours)).name
    return "bf16" if ours.endswith("_gate") and tensor.kind == "BF16" and dtype != "f32" else "f32"


def held_bytes(ours: str, tensor: Stored, dtype: str | None) -> int:
    """How much memory a tensor takes once loaded with this dtype."""
    layout = LAYOUTS[runs_as(ours, tensor, dtype)]
    if is_matrix(ours, tensor := _laid_out(ours, tensor)):
        return layout.nbytes(*tensor.shape)
    return int(layout.bits) // 8 * int(np.prod(tensor.shape))


def converted_weight(ours: str, tensor: Stored, dtype: str | None, norm_offset: float, pages: LargePages) -> Any:
    """Returns a tensor as the models take it: matrices in their layout, gates as stored, small tensors in float32."""
    tensor = _laid_out(ours, tensor)
    if is_matrix(ours, tensor):
        return _matrix(tensor, dtype, ours, pages)
    if len(tensor.shape) == 3 and ours.endswith("_gate") and tensor.kind == "BF16" and dtype != "f32":
        return read_only(tensor.array)
    wide = unfolded(ours, np.array(dequantize(tensor.kind, tensor.array), np.float32))
    if ours.endswith("recurrent.decay"):
        return read_only(softplus(wide))
    if ours.startswith("vision.") and ours != "vision.soft_norm":  # a LayerNorm's weight is the gain itself
        return read_only(wide)
    return read_only(wide - np.float32(norm_offset))


def unfolded(ours: str, wide: F32) -> F32:
    """A tensor in float32 with the causal convolution, [E, 1, C] in files, as the models take it: [C, E]."""
    return np.ascontiguousarray(wide[:, 0].T) if ours.endswith("recurrent.conv") else wide


def _laid_out(ours: str, tensor: Stored) -> Stored:
    """Reshapes the patch convolution to a matrix and transposes the projection P; other tensors are unchanged."""
    if ours == "vision.patch":
        flat = tensor.array.reshape(len(tensor.array), -1)
        return replace(tensor, shape=flat.shape, array=flat)
    if ours == "vision.projection":
        if tensor.kind in KINDS:  # blocks cannot be transposed
            tensor = replace(tensor, kind="F32", array=dequantize(tensor.kind, tensor.array))
        return replace(tensor, shape=tensor.shape[::-1], array=tensor.array.T)
    return tensor


def is_matrix(ours: str, tensor: Stored) -> bool:
    """Is this the weight of a linear map or an embedding, which has a layout, and no norm, bias or gate?"""
    return len(tensor.shape) == 2 and not ours.endswith("_bias") and ours != "vision.positions"


def form_for(tensor: Stored, dtype: str | None, ours: str) -> str:
    """The form that a matrix is rounded to: `dtype`, or the nearest of ours to the stored form. With dtype "int4",
    symmetric weights stay symmetric: the same values in fewer bits.
    """
    stored = "bf16" if tensor.kind == "F16" else AS_STORED.get(tensor.kind, "int8")
    stored = "int8" if tensor.eight_bits and dtype is None else stored
    wanted = stored if dtype is None or (dtype == "int4" and stored in FOUR_BITS) else dtype
    if wanted in FOUR_BITS and tensor.shape[0] % int4.SIDE:
        wanted = "int8"
    if stored != wanted:
        wanted = in_eight_bits(ours, wanted, tensor.shape[1])
    if tensor.shape[1] % FORMS[wanted].columns:
        return "f32" if tensor.kind == "F32" else "bf16"  # rows that do not divide into blocks
    return wanted


def in_eight_bits(ours: str, form: str, columns: int) -> str:
    """The form of a weight that is rounded to `form`: eight bits instead of four for the embedding, for q, k and v, and
    in models less than 1,024 wide for gate and up. On the 270M, v in four bits costs 6 % of perplexity, gate and up
    7 %; most of that model is its embedding, so eight bits for gate and up take 8 % more memory.
    """
    sensitive = r"attention\.[qkv]$|ffn\.(gate|up)$" if columns < NARROW_MODEL else r"attention\.[qkv]$"
    kept = ours in ("embedding", "head") or (form == "int4" and re.search(sensitive, ours))
    return EIGHT_BITS.get(form, form) if kept else form


def layout_for(tensor: Stored, form: str) -> Layout:
    """The layout in which a matrix of this form runs; int4-row whose rows do not divide by sixteen runs as int8."""
    layout = LAYOUTS[RUNS_AS.get(form, form)]
    return layout if tensor.shape[0] % layout.rows == 0 else LAYOUTS["int8"]


def _matrix(tensor: Stored, dtype: str | None, ours: str, pages: LargePages) -> Weight:
    """The matrix in its layout: the mapped file itself if stored in that layout, else converted, in large pages."""
    form, shape = form_for(tensor, dtype, ours), (tensor.shape[0], tensor.shape[1])
    if _is_stored_as(tensor.kind, form) and form in LAYOUTS:
        return Weight(LAYOUTS[form], tensor.array, shape)
    for layout in (layout_for(tensor, form), LAYOUTS["bf16"]):  # bf16 where a row's scale is no normal float16
        made = [_in_layout(form, converted(tensor.kind, part, form), layout) for part in some_rows(tensor)]
        parts = [part for part in made if part is not None]
        if len(parts) == len(made):
            break
    return Weight(layout, pages.hold(np.concatenate(parts) if parts[1:] else np.ascontiguousarray(parts[0])), shape)


def some_rows(tensor: Stored) -> Iterator[NDArray]:
    """Yields the array in parts of a multiple of sixteen rows, small enough to hold in float32."""
    in_element = tensor.shape[0] // len(tensor.array)  # sixteen rows, where they are interleaved
    step = max(1, CONVERTED_TOGETHER // tensor.shape[1] // int4.SIDE) * int4.SIDE // in_element
    for r in range(0, len(tensor.array), step):
        yield tensor.array[r : r + step]


def widened(kind: str, array: NDArray) -> F32:
    """A stored tensor, or some of its rows, as float32, exact."""
    return FORMS[OURS[kind]].unpack(array) if kind in OURS else dequantize(kind, array)


def converted(kind: str, part: NDArray, form: str) -> NDArray:
    """Rows of a matrix, stored as `kind`, in one of FORMS."""
    if _is_stored_as(kind, form):
        return part
    if OURS.get(kind) in FOUR_BITS:
        kind, part = "Q4_1" if kind == "INT4" else "Q4_0", int4.to_gguf(part)
    if form == "int8":
        return to_int8(kind, part) if kind not in OURS else int8.pack(widened(kind, part))
    if int4.KINDS.get(kind) == form:
        return int4.from_gguf(kind, part)
    return FORMS[form].pack(widened(kind, part))


def _is_stored_as(kind: str, form: str) -> bool:
    """Do the bytes in the file have this form already? GGUF's four-bit types still need interleaving."""
    return AS_STORED.get(kind) == form and kind not in int4.KINDS


def _in_layout(form: str, part: NDArray, layout: Layout) -> NDArray | None:
    """Rows in one of FORMS → in the layout that they run in. None where a row's scale is no normal float16."""
    if form == layout.name:
        return part
    if layout.name == "bf16":
        return layout.pack(FORMS[form].unpack(part))
    blocks = rows.in_blocks(part) if form.endswith("-row") else part
    if blocks is None or form == "int8-row":
        return blocks
    return int4.from_gguf("Q4_0", blocks) if layout.name == "int4-symmetric" else to_int8("Q4_0", blocks)
