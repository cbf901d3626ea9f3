"""Block formats: dequantized bit for bit as the gguf package does it, and quantized as well as its own quantizer."""

from __future__ import annotations

import time

import numpy as np
import pytest
from support import gguf_files
from support.gguf_files import LOSSLESS, random_blocks
from support.oracles import Mode, answered_by, assert_equal

from minigemma.definition import formulas_only
from minigemma.errors import ModelFormatError
from minigemma.files.gguf_file import open_gguf
from minigemma.layouts import int8, rows
from minigemma.layouts.gguf_blocks import (
    KINDS,
    dequantize,
    to_int8,
)
from minigemma.layouts.int4 import quantize_q4_0
from minigemma.layouts.rows import quantize_int4_rows, quantize_int8_rows

EXACT_HALVES = [0.0, -0.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 2.0**-14, 1.0, -2.5, 65504.0]


both = pytest.mark.parametrize("definitions", [False, True], ids=["kernel", "definition"])


def widen(data):
    """Int8 or Q4_0 blocks, or rows with one scale, as float32."""
    if data.dtype == np.int8:
        return rows.INT8.unpack(data)
    if data.ndim == 3 and data.shape[1] == 1 and data.shape[2] not in (18, 34):
        return rows.INT4.unpack(data)
    return dequantize("Q4_0" if data.shape[2] == 18 else "Q8_0", data)


@answered_by("gguf", digest=True)
def oracle(kind, blocks):
    """Float32 values of blocks by the gguf package."""
    import gguf

    values = gguf.quants.dequantize(blocks.reshape(-1, blocks.shape[-1]), gguf.GGMLQuantizationType[kind])
    return values.reshape(*blocks.shape[:-2], -1)


def exact(kind, blocks):
    """The package's values, which are our definition's to the last bit."""
    with formulas_only():
        values = dequantize(kind, blocks)
    assert_equal(values, oracle(kind, blocks))
    return values


def in_blocks(weights, kind):
    """[R, blocks, bytes] as the package quantizes."""
    return gguf_files.quantize(weights, kind).reshape(len(weights), weights.shape[1] // 32, -1)


def gaussian(rows=11, columns=256, seed=0):
    """Weights of rows whose sizes lie far apart."""
    rng = np.random.default_rng(seed)
    sizes = np.logspace(-3, 1, rows)[:, None]
    return (rng.standard_normal((rows, columns)) * sizes).astype(np.float32)


# ------------------------------------------------------------------------------------------------- from blocks


@both
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_bit_pattern_are_the_packages_to_the_last_bit(answers, kind, definitions):
    blocks = random_blocks(kind, rows=67, columns=5)
    with formulas_only(definitions):
        found = dequantize(kind, blocks)
    assert found.dtype == np.float32
    assert_equal(found, oracle(kind, blocks))


@both
@pytest.mark.parametrize("kind", ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))
def test_blocks_that_the_package_quantized(answers, kind, definitions):
    """Blocks of real weights, where random bits might hide a pair of mistakes."""
    weights = gaussian()
    blocks = in_blocks(weights, kind)
    with formulas_only(definitions):
        found = dequantize(kind, blocks)
    assert_equal(found, oracle(kind, blocks))
    assert np.abs(found - weights).max() < np.abs(weights).max() / 7


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", EXACT_HALVES)
def test_every_kind_of_float16_scale(answers, kind, scale, definitions):
    """Zero of both signs, subnormal, largest: all of a float16 but infinity and NaN."""
    blocks = np.array(random_blocks(kind))
    for at in gguf_files.HALVES.get(kind, (0, 2)):
        blocks[..., at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    with formulas_only(definitions):
        found = dequantize(kind, blocks)
    assert_equal(found, oracle(kind, blocks))


def test_plain_types(answers):
    weights = gaussian()
    half = weights.astype(np.float16)
    bf16 = gguf_files.quantize(weights, "BF16")
    assert dequantize("F32", weights) is weights
    np.testing.assert_array_equal(dequantize("F16", half), half.astype(np.float32), strict=True)
    assert_equal(dequantize("BF16", bf16.view(np.uint16)), oracle("BF16", bf16[:, None]))


@pytest.mark.parametrize("read", [dequantize, to_int8])
@pytest.mark.parametrize("kind", ["IQ3_S", "MXFP4", "I32", "nonsense"])
def test_a_type_without_a_reader_is_named(kind, read):
    with pytest.raises(ModelFormatError, match=f"is of type {kind}, .*take a file of F32, F16, BF16, Q4_0"):
        read(kind, np.zeros((2, 3, 136), np.uint8))


# ------------------------------------------------------------------------------------------------- to int8 blocks


@both
@pytest.mark.parametrize("kind", LOSSLESS)
def test_to_int8_loses_nothing_where_a_block_has_one_scale_and_no_minimum(answers, kind, definitions):
    blocks = random_blocks(kind, rows=67, columns=5)
    with formulas_only(definitions):
        made = to_int8(kind, blocks)
    assert made.dtype == np.uint8 and made.shape == (67, 5 * gguf_files.KINDS[kind][1] // 32, 34)
    assert_equal(widen(made), oracle(kind, blocks))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 65504.0])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LOSSLESS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the definition's arithmetic with them
def test_to_int8_keeps_what_is_no_number(kind, scale):
    """A damaged block must not become one of zeros. 65,504 is a scale, with some kinds one too large for int8."""
    blocks = random_blocks(kind).copy()
    for at in gguf_files.HALVES.get(kind, (0, 2)):
        blocks[2, 1, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    with formulas_only():
        expected = np.isfinite(widen(to_int8(kind, blocks)))
    assert (scale == 65504 or not expected[2].all()) and expected[:2].all() and expected[3:].all()
    np.testing.assert_array_equal(np.isfinite(widen(to_int8(kind, blocks))), expected)


def test_to_int8_of_int8_is_the_file_itself():
    blocks = random_blocks("Q8_0")
    assert np.shares_memory(to_int8("Q8_0", blocks), blocks)


@both
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LOSSLESS])
def test_to_int8_of_the_others_rounds_to_the_nearest_step(answers, kind, definitions):
    """Nowhere half a step off (a twentieth more where the scale's float16 fell short), with 96 steps or more."""
    blocks = random_blocks(kind, rows=29, columns=3)
    with formulas_only(definitions):
        made = to_int8(kind, blocks)
    right = exact(kind, blocks).reshape(29, -1, 32)
    assert made.shape == (*right.shape[:2], 34)
    d = np.ascontiguousarray(made[..., :2]).view(np.float16).astype(np.float32)
    off = np.abs(widen(made).reshape(right.shape) - right)
    assert (off <= d * 0.565).all()
    assert (d <= np.abs(right).max(axis=-1, keepdims=True) / 96 * 1.001 + 2.0**-25).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LOSSLESS])
def test_to_int8_is_no_worse_than_the_packages_quantizer(answers, kind):
    blocks = random_blocks(kind, rows=101, columns=3)
    right = exact(kind, blocks)
    theirs = exact("Q8_0", in_blocks(right, "Q8_0"))
    assert np.square(widen(to_int8(kind, blocks)) - right).mean() <= 1.001 * np.square(theirs - right).mean()


def test_to_int8_of_plain_types_is_int8():
    weights = gaussian()
    half = weights.astype(np.float16)
    np.testing.assert_array_equal(to_int8("F32", weights), int8.pack(weights))
    np.testing.assert_array_equal(to_int8("F16", half), int8.pack(half.astype(np.float32)))


# ------------------------------------------------------------------------------------------------- from float32


@both
def test_int8_as_the_package_does_it(definitions):
    """The scales to the bit. A whole number may be one off where a weight lies between two of them: ours is divided by
    the scale as stored, theirs by the scale before it became a float16."""
    weights = gaussian(rows=61, columns=320)
    weights[5, :32] = 0
    with formulas_only(definitions):
        made = int8.pack(weights).reshape(-1, 34)
    theirs = in_blocks(weights, "Q8_0").reshape(made.shape)
    np.testing.assert_array_equal(made[:, :2], theirs[:, :2])
    off = made[:, 2:].view(np.int8).astype(int) - theirs[:, 2:].view(np.int8)
    assert np.abs(off).max() <= 1
    assert (off != 0).mean() < 0.02


@both
def test_int4_misses_less_than_the_package_does(answers, definitions):
    """By its own measure, in which a weight counts w² + mean w²: closer than the package's Q4_0 in all, and in no block
    far from the closest of six hundred scales."""
    weights = gaussian(rows=61, columns=320)
    with formulas_only(definitions):
        made = quantize_q4_0(weights)
    np.testing.assert_array_equal(widen(made), dequantize("Q4_0", made))
    if Mode.live:
        np.testing.assert_array_equal(widen(made), oracle.__wrapped__("Q4_0", made))
    theirs = exact("Q4_0", in_blocks(weights, "Q4_0"))
    blocks = weights.reshape(-1, 32).astype(np.float64)
    counts = blocks**2 + (blocks**2).mean(axis=1, keepdims=True)

    def missed(w):
        return (counts * (w.reshape(-1, 32) - blocks) ** 2).sum(axis=1)

    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scales = (farthest / -k for k in np.linspace(4, 10, 600))
    best = np.min([missed(np.clip(np.rint(blocks / d), -8, 7) * d) for d in scales], axis=0)
    found = missed(widen(made))
    assert found.sum() < 0.85 * missed(theirs).sum()
    assert found.sum() < 1.05 * best.sum()
    assert (found < 1.5 * best).all()


@both
@pytest.mark.parametrize("quantize", [int8.pack, quantize_int8_rows])
@pytest.mark.parametrize("steps", [np.arange(-127, 128), np.arange(-100, 28) * 0.5])
def test_int8_keeps_what_it_can_say(steps, quantize, definitions):
    """Weights that are whole multiples of a scale, the largest of them 127 times: not a bit is lost."""
    weights = np.tile(np.resize(steps, 31), (4, 1)).astype(np.float32)
    weights = np.concatenate([np.round(weights), np.full((4, 1), 127)], axis=1).astype(np.float32)
    weights *= np.array([[1], [-0.5], [2.0**-12], [3.0]], np.float32)
    with formulas_only(definitions):
        np.testing.assert_array_equal(widen(quantize(weights)), weights)


@both
@pytest.mark.parametrize("quantize", [quantize_q4_0, quantize_int4_rows])
def test_int4_keeps_what_it_can_say(quantize, definitions):
    """Sixteen steps from -8 to 7, either way up: the larger side goes to the side of the weight farthest from 0."""
    weights = np.resize(np.arange(-8, 8), 32).astype(np.float32) * np.array([[1], [-1], [0.125], [-24]], np.float32)
    with formulas_only(definitions):
        np.testing.assert_array_equal(widen(quantize(weights)), weights)


@both
@pytest.mark.parametrize("quantize, size", [(int8.pack, 34), (quantize_q4_0, 18)])
def test_blocks_of_nothing_are_zero_and_stay_finite(quantize, size, definitions):
    weights = np.zeros((3, 64), np.float32)
    weights[1] = 1e-30  # too small for a float16 scale
    weights[2, 7] = -3.0
    with formulas_only(definitions):
        made = quantize(weights)
    assert made.shape == (3, 2, size)
    found = widen(made)
    assert not found[:2].any()
    assert found[2, 7] == pytest.approx(-3, rel=1e-3) and np.count_nonzero(found[2]) == 1


@pytest.mark.parametrize("quantize, largest", [(quantize_int8_rows, 127), (quantize_int4_rows, 8)])
def test_rows_with_one_scale(quantize, largest):
    """Whole rows of zeros, of one weight, and of weights near the end of float32's range."""
    weights = np.zeros((4, 96), np.float32)
    weights[1, 70] = -3
    weights[2], weights[3] = np.linspace(-1e-44, 1e-44, 96), np.linspace(-1e-35, 1e-35, 96)
    found = widen(quantize(weights))
    assert not found[0].any()
    assert found[1, 70] == -3 and np.count_nonzero(found[1]) == 1
    assert np.isfinite(found[2]).all()
    assert 0 < np.abs(found[3] - weights[3]).max() <= 1e-35 / largest


def test_int8_rows_are_the_closed_form():
    """The largest weight is 127 times the scale, and each lies half a step or less from where it was."""
    weights = gaussian(columns=2304)
    made = quantize_int8_rows(weights)
    scale = made[:, :4].copy().view(np.float32)
    np.testing.assert_array_equal(scale, np.abs(weights).max(axis=1, keepdims=True) / np.float32(127))
    assert (np.abs(made[:, 4:].astype(int)).max(axis=1) == 127).all()
    assert (np.abs(widen(made) - weights) <= 0.5001 * scale).all()


@pytest.mark.parametrize("columns", [32, 256, 2304, 16384])
def test_int4_rows_are_nearly_the_best_of_all_scales(columns):
    """Every row against a thousand scales of either sign, each the least squares of the whole numbers it gives."""
    weights = gaussian(rows=5, columns=columns).astype(np.float64)
    missed = np.square(widen(quantize_int4_rows(weights.astype(np.float32))) - weights).sum(axis=1)
    for row, found in zip(weights, missed, strict=True):
        tried = np.abs(row).max() / np.concatenate([np.linspace(4, 30, 500), -np.linspace(4, 30, 500)])
        q = np.clip(np.rint(row / tried[:, None]), -8, 7)
        best = (row @ row) - ((q @ row) ** 2 / (q**2).sum(axis=1)).max()
        assert best * 0.99999 <= found <= best * (1.4 if columns == 32 else 1.1)


def test_what_one_scale_for_a_row_costs():
    """The figures in the docstrings."""
    weights = np.random.default_rng(0).standard_normal((300, 2304), np.float32)
    formats = {quantize_int8_rows: 0.0083, int8.pack: 0.0053, quantize_int4_rows: 0.108, quantize_q4_0: 0.083}
    for quantize, said in formats.items():
        missed = np.linalg.norm(widen(quantize(weights)) - weights) / np.linalg.norm(weights)
        assert missed == pytest.approx(said, rel=0.02), quantize.__name__
    scale = np.abs(weights).max(axis=1, keepdims=True) / 7
    missed = np.linalg.norm(np.rint(weights / scale) * scale - weights) / np.linalg.norm(weights)
    assert missed == pytest.approx(0.15, rel=0.02)


@pytest.mark.parametrize("quantize", [int8.pack, quantize_q4_0])
def test_rows_that_do_not_divide_into_blocks_are_refused(quantize):
    for shape in ((2, 48), (32, 33), (3, 31)):
        with pytest.raises(ValueError, match=r"\d"):
            quantize(np.ones(shape, np.float32))


# ------------------------------------------------------------------------------------------------- the real file


def test_the_real_file_in_every_type_that_it_has(answers, demo_file):
    """The first rows of a tensor of each type, to the bit; and its way to int8 takes a moment once compiled."""
    found = open_gguf(demo_file)
    seen = set()
    for tensor in found.tensors.values():
        if tensor.type in seen or tensor.type not in KINDS:
            continue
        seen.add(tensor.type)
        part = tensor.blocks[:50]
        assert_equal(dequantize(tensor.type, part), oracle(tensor.type, part))
        to_int8(tensor.type, part)
        start = time.perf_counter()
        to_int8(tensor.type, tensor.blocks)
        assert time.perf_counter() - start < 2
    assert seen == {"Q5_0", "Q8_0", "Q4_K", "Q6_K"}
