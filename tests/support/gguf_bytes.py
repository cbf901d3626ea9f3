"""GGUF files byte by byte, and what reading them may take."""

from __future__ import annotations

import struct
import time
import tracemalloc
from contextlib import contextmanager

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def array(key, kind, count, elements=b""):
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + elements)


def tensor(name="x", sizes=(4,), kind=0, offset=0, axes=None):
    axes = len(sizes) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", axes, *sizes, kind, offset)


def file(pairs=(), tensors=(), data=0, version=3, pair_count=None, tensor_count=None, alignment=32, magic=b"GGUF"):
    """A GGUF file by hand; counts and everything else as true or untrue as wished, `data` zero bytes at its end."""
    counts = [len(made) if count is None else count for made, count in ((tensors, tensor_count), (pairs, pair_count))]
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *tensors])
    return head + bytes(-len(head) % alignment + data)


@contextmanager
def at_most(seconds, size):
    """What happens inside takes at most `seconds` of this process and `size` bytes of Python's memory."""
    tracemalloc.start()
    try:
        start = time.process_time()
        yield
        assert time.process_time() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()
