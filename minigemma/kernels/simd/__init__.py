"""Vectors as Numba values, so that a kernel can say which vector instruction runs.

A modern core multiplies and adds 8 or 16 float32 numbers in one instruction. LLVM finds such vectors in plain loops by
itself only when the loop is simple; where it does not, a kernel states them:

    total = zeros()
    for d in range(0, D, LANES):
        total = fma(load(row, d), load(x, d), total)      # LANES products and sums at once
    y = sum_lanes(total)

Each operation is one or a few LLVM instructions, which LLVM turns into AVX-512, AVX2 or NEON, whichever the processor
has. How an operation is made: operation.py. What there is:

    cpu.py            LANES, ROWS and what else depends on the processor
    memory.py         load, store, prefetch
    vectors.py        arithmetic, exp, tanh, sums across lanes
    accumulators.py   eight sums (matvec), tiles of ROWS x 2 vectors (matmul)
    products.py       dot products of blocks of int8 and int4
    interleaved.py    blocks of 16 interleaved rows of four or two bits

Which kernel uses what on which processor, and its fallback: docs/performance.md. The tiles of AMX: amx.py.
"""

from .accumulators import (
    add_fours,
    add_scaled_blocks,
    eight_zeros,
    int_tile_add_scaled,
    int_tile_zeros,
    store_sums,
    tile_add_bf16_pairs,
    tile_add_outer,
    tile_add_pairs,
    tile_load,
    tile_store,
    tile_zeros,
)
from .cpu import AHEAD, BF16, DOTS, F16C, FORCED, LANES, ROWS, STREAMS, VNNI, paths
from .interleaved import (
    SCALES,
    add_int2_block,
    add_int4_block,
    add_int4_block_to_four,
    byte_tile_add,
    byte_tile_add_scaled,
    byte_tile_zeros,
    four_row_sums_zeros,
    round_int4_block,
    row_sums_zeros,
    store_row_sums,
    unpack_halves,
    unpack_int4_block,
    unpack_int8_block,
)
from .memory import (
    bf16_bits,
    from_even_odd,
    load,
    load_even_odd,
    load_half,
    load_one,
    prefetch,
    prefetch_ahead,
    prefetch_four,
    splat_half,
    store,
    store_half,
    store_whole,
    to_even_odd,
)
from .products import dot_32, unpack_32
from .vectors import (
    exp,
    expm1,
    fma,
    magnitude,
    max_lanes,
    maximum,
    minimum,
    root,
    round_lanes,
    splat,
    sum_lanes,
    tanh,
    where_less,
    zeros,
)
