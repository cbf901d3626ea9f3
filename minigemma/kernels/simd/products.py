"""Products of integers: what the instruction sets have for 8 and 16 bits, and the dot product of a block of 32."""

from __future__ import annotations

import platform

from llvmlite import ir

from .cpu import BF16, FORCED, LANES, VNNI
from .operation import (
    F32,
    I8,
    I16,
    I32,
    Array,
    Index,
    Lanes,
    Pointer,
    Vector,
    assembly,
    call,
    constant,
    multiply_add,
    operation,
    select,
)

# Sums of products of bytes, of which four belong to a lane: in 32 bits, or two in 16 bits that are still to be added.
IN_32 = VNNI or FORCED == "dots"
FOURS = ir.VectorType(I32, LANES) if IN_32 else ir.VectorType(I16, 2 * LANES)


def hide(vector: Lanes) -> Lanes:
    """The vector itself, about which LLVM then knows nothing, so that it cannot simplify what follows."""
    return assembly("", "=x,0", vector) if platform.machine() in ("x86_64", "AMD64") else vector


def products_of_pairs(a: Lanes, b: Lanes) -> Lanes:
    """int8 or int16 times as many int16, neighbors added: half as many sums in int32. One instruction on most
    processors.
    """
    products = a.sign_extended(I32) * b.sign_extended(I32)
    even, odd = (products.shuffle(range(i, a.lanes, 2)) for i in (0, 1))
    return even + odd


def no_fours() -> Lanes:
    """Zeros to which products of bytes are added."""
    return constant(0, FOURS.element, FOURS.count)


def add_products_of_fours(total: Lanes, unsigned: Lanes, signed: Lanes) -> Lanes:
    """total (of type FOURS) + the products of uint8 and int8, 4 · LANES of each, neighbors added.

    VNNI has an instruction that adds up all four of a lane. Without it neighbors are added in 16 bits, where they have
    to fit: that instruction clamps what does not. LLVM recognizes it in a clamped sum, unless it knows that the sum
    always fits; where AVX-512 could do a part of it LLVM does not, so the instruction is called by its name.
    """
    if VNNI:
        return assembly("vpdpbusd $3, $2, $0", "=v,0,v,v", total, unsigned, signed)
    if IN_32:  # emulated
        for i in range(4):
            a, b = (numbers.shuffle(range(i, 4 * LANES, 4)) for numbers in (unsigned, signed))
            total = total + a.zero_extended(I32) * b.sign_extended(I32)
        return total
    if LANES == 16:
        return total + call("llvm.x86.avx512.pmaddubs.w.512", total.value.type, unsigned, signed)
    unsigned, products = hide(unsigned), []
    for odd in range(2):
        a, b = (numbers.shuffle(range(odd, 4 * LANES, 2)) for numbers in (unsigned, signed))
        products.append(a.zero_extended(I32) * b.sign_extended(I32))
    pairs = products[0] + products[1]
    for bound, beyond in ((-(1 << 15), Lanes.__gt__), ((1 << 15) - 1, Lanes.__lt__)):
        pairs = select(beyond(pairs, bound), pairs, pairs.filled(bound))
    return total + pairs.truncated(I16)


def sums_of_fours(total: Lanes) -> Lanes:
    """LANES sums in int32 from a `total` of such products."""
    return total if IN_32 else products_of_pairs(total, hide(total.filled(1)))


def add_products_of_bf16(total: Lanes, a: Lanes, b: Lanes) -> Lanes:
    """total, LANES float32, + the products of two bf16 numbers in each word of a and b. Emulated in the order of the
    instruction: the upper numbers, then the lower ones, each a product and a sum that are rounded once.
    """
    if BF16:
        return assembly("vdpbf16ps $3, $2, $0", "=v,0,v,v", total, a, b)
    total = multiply_add((a & -65536).bits(F32), (b & -65536).bits(F32), total)
    return multiply_add((a << 16).bits(F32), (b << 16).bits(F32), total)


def integers_of_32(at: Pointer) -> list[Lanes]:
    """The 32 int8 from an address on, in vectors of 2 · LANES."""
    return [(at + i).load(I8, 2 * LANES) for i in range(0, 32, 2 * LANES)]


def products_of_32(parts: list[Lanes], numbers: Pointer) -> Lanes:
    """32 int8 or int16 times the int16 from an address on, added up to LANES sums in int32."""
    total, step = constant(0, I32), 2 * LANES
    for i, part in enumerate(parts):
        total = total + products_of_pairs(part, (numbers + i * step).load(I16, step))
    return total


def dot_of_32(parts: list[Lanes], numbers: Pointer) -> Lanes:
    """LANES partial sums, as float32, of the products of 32 integers with 32 int16. They are exact: 32 · 128 · 32,767
    is less than 2³¹.
    """
    return products_of_32(parts, numbers).to_float()


@operation
def dot_32(row: Array, at: Index, x: Array, k: Index) -> Vector:
    """LANES partial sums, as float32, of the products of 32 int8 from row[at] on with int16 x[k : k + 32]."""
    return dot_of_32(integers_of_32(row[at]), x[k])


@operation
def unpack_32(row: Array, at: Index, out: Array, to: Index) -> None:
    """out[to : to + 32] = 32 int8 from row[at] on, as int16."""
    for i in (0, 16):
        out[to + i].store((row[at] + i).load(I8, 16).sign_extended(I16))
