"""Weights by name: where "blocks.5.attention.o" stands in the tree of a model's weights, and trees with another there.

Names are those of the tables on the models' pages (`TENSORS`, `LAYER`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np

from ..arrays import F32, read_only, round_bf16
from ..config import TextConfig
from ..errors import check_type
from ..layouts.weight import Adapted, Weight

Tree = TypeVar("Tree")


def named_weights(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, weight) of every matrix, gate, norm and bias in a tree of dataclasses and tuples."""
    if isinstance(tree, (Weight, np.ndarray)):
        yield prefix.removesuffix("."), tree
    elif tree is not None:
        for name, part in _parts(tree).items():
            yield from named_weights(part, f"{prefix}{name}.")


def replaced(tree: Tree, changed: Mapping[str, Weight | F32]) -> Tree:
    """The tree with other weights under the names in `changed`; whatever holds none of them is shared, not copied.

    Raises ValueError for a name that the tree does not have, with the nearest, and for another shape.
    """
    check_type("the argument", changed, Mapping, "weights by their names", optional=False)
    known = dict(named_weights(tree))
    for name in changed:
        if name not in known:
            near = ", ".join(get_close_matches(name, known, n=3, cutoff=0.3))
            raise ValueError(f"the model has no weight {name!r}" + (f"; the nearest are {near}" if near else ""))
    return _replaced(tree, {name: _fitted(name, known[name], new) for name, new in changed.items()}, "")


def fingerprint_of(config: TextConfig, tree: Any) -> str:
    """A digest, 32 hex digits, of a text model's sizes and of 8 KB of each weight, with names, layouts and adapters."""
    digest = sha256(repr(replace(config, name="", context=1, vision=None)).encode())
    for name, weight in named_weights(replace(tree, vision=None)):
        arrays = [weight.data] if isinstance(weight, Weight) else [weight]
        arrays += [weight.a * np.float32(weight.scale), weight.b] if isinstance(weight, Adapted) else []
        digest.update(f"{name} {weight.layout.name if isinstance(weight, Weight) else ''}".encode())
        for array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            digest.update(f"{array.dtype} {array.shape}".encode())
            for first in range(0, len(data), max(len(data) // 16, 512)):
                digest.update(data[first : first + 512].data)
    return digest.hexdigest()[:32]


def _parts(tree: Any) -> dict[str, Any]:
    if isinstance(tree, tuple):
        return {str(i): part for i, part in enumerate(tree)}
    return {field.name: getattr(tree, field.name) for field in fields(tree)}


def _replaced(tree: Any, changed: Mapping[str, Any], prefix: str) -> Any:
    if prefix and prefix[:-1] in changed:
        return changed[prefix[:-1]]
    if not any(name.startswith(prefix) for name in changed):
        return tree
    parts = {name: _replaced(part, changed, f"{prefix}{name}.") for name, part in _parts(tree).items()}
    return tuple(parts.values()) if isinstance(tree, tuple) else replace(tree, **parts)


def _fitted(name: str, old: Any, new: Weight | F32) -> Any:
    """`new` in the form of the weight it replaces; a Weight keeps its own layout."""
    if isinstance(new, Weight) and isinstance(old, Weight) and new.shape == old.shape:
        return new
    array = np.asarray(new) if not isinstance(new, Weight) else np.empty(new.shape, object)
    if array.shape != old.shape or array.dtype.kind != "f":
        raise ValueError(f"{name} cannot become {array.dtype} {list(array.shape)}; it is float32 {list(old.shape)}")
    array = np.array(array, np.float32)  # a copy: what the caller changes later is not the model's
    if isinstance(old, Weight):
        return Weight.pack(old.layout, array)
    return read_only(round_bf16(array) if old.dtype == np.uint16 else array)
