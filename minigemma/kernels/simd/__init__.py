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
