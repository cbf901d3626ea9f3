"""The fields of a config.json or a GGUF header, read one by one by a model's page.

Every field a file states is used, or expected to have the one value that changes nothing, or left over. A field that is
left over is refused by name unless it is known to change no result (files/known_keys.py), so that no model runs with a
statement of its file ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

Json = dict[str, Any]
REQUIRED: Any = object()
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")  # two names of one formula; "gelu" is the exact function


class Fields:
    """The fields that a file states, and which of them have been read."""

    def __init__(self, stated: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        self.stated, self.defaults = dict(stated), defaults or {}
        self.prefix = prefix  # that errors put before a field's name
        self.read: set[str] = set()
        self.objects: dict[str, Fields] = {}

    def get(self, *names: str, default: Any = REQUIRED) -> Any:
        """The value stated under `names`, spellings of one field, which must agree; else the default, else KeyError."""
        self.read.update(names)
        found = {name: self.stated[name] for name in names if name in self.stated}
        if len(found) > 1:  # null is no statement where another spelling has a value
            found = {name: value for name, value in found.items() if value is not None} or {names[0]: None}
        if not found:
            default = self.defaults.get(names[0], default)
            if default is REQUIRED:
                raise KeyError(self.prefix + names[0])
            return default
        (name, value), *others = found.items()
        for other, another in others:
            if another != value:
                raise ValueError(
                    f"{self.prefix}{name} is {value!r} and {other} is {another!r}: one field with two values"
                )
        return value

    def integer(self, *names: str, default: Any = REQUIRED) -> int:
        """An integer; a list that gives each layer the same one is that integer."""
        value = same_for_all(names[0], self.get(*names, default=default))
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self.prefix}{names[0]} is {value!r}; it must be an integer")
        return value

    def number(self, *names: str, default: Any = REQUIRED) -> float:
        """A number as float; a list that gives each layer the same one is that number."""
        value = same_for_all(names[0], self.get(*names, default=default))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise ValueError(f"{self.prefix}{names[0]} is {value!r}; it must be a number")
        return float(value)

    def cap(self, name: str, default: Any = None) -> float | None:
        """A soft-cap; null means none."""
        return None if self.get(name, default=default) is None else self.number(name, default=default)

    def expect(self, name: str, *allowed: Any, because: str = "") -> None:
        """Refuse any value but the allowed ones, and null, which states nothing."""
        value = self.get(name, default=None)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.prefix}{name} is {value!r}; {because or 'minigemma runs ' + ' or '.join(map(repr, allowed))}"
            )

    def object(self, name: str) -> Json:
        """An object as it stands, empty if it is absent or null."""
        value = self.get(name, default=None)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{self.prefix}{name} is {str(value)[:80]!r}; it must be an object")
        return value or {}

    def inner(self, name: str, defaults: Mapping[str, Any] | None = None) -> Fields:
        """The fields of an object inside this one, none if it is absent or null; they are left over with it."""
        value = self.object(name)
        return self.objects.setdefault(name, Fields(value, defaults, f"{self.prefix}{name}."))

    def left_over(self) -> dict[str, Any]:
        """The fields, by their names, that were not read and are not null."""
        found = {n: value for n, value in self.stated.items() if n not in self.read and value is not None}
        for name, fields in self.objects.items():
            found |= {f"{name}.{n}": value for n, value in fields.left_over().items()}
        return found


def same_for_all(name: str, value: Any) -> Any:
    """The value of a field; of a list with a value per layer the one value, or ValueError if they differ."""
    if not isinstance(value, list) or not value:
        return value
    if any(one != value[0] for one in value):
        raise ValueError(f"{name} gives a value per layer, {str(value)[:80]}; minigemma runs layers of one size")
    return value[0]


class Rope(NamedTuple):
    """What a statement of rope says."""

    base: float
    scale: float
    fraction: float


def rope_of(stated: Json, base: float, fraction: float = 1.0, name: str = "rope_parameters") -> Rope:
    """The rope of one kind of layer from {"rope_type", "rope_theta", "factor", "partial_rotary_factor"}, field `name`.

    ValueError for any other field and any type but default and linear.
    """
    rope = Fields(stated, prefix=f"{name}.")
    form = rope.get("rope_type", "type", default=None)
    form = "default" if form is None else form
    if form not in ("default", "linear"):
        raise ValueError(f"{name}.rope_type is {form!r}; minigemma runs default and linear")
    found = Rope(
        rope.number("rope_theta", default=base),
        rope.number("factor", default=REQUIRED if form == "linear" else 1.0),
        rope.number("partial_rotary_factor", default=fraction),
    )
    if form == "default" and found.scale != 1:
        raise ValueError(
            f"{name}.rope_type is default, and its factor is {found.scale:g}; only linear rope has a factor"
        )
    rope.get("original_max_position_embeddings", default=None)  # which these two types do not use
    for unknown in rope.left_over():
        raise ValueError(f"{name} has {unknown.removeprefix(name + '.')!r}, which minigemma does not know")
    return found


def plain_rope(f: Fields) -> float:
    """The rope base of a config.json whose layers all have the same rope, on whole heads and unscaled."""
    rope = whole_rope(f)
    if rope.fraction != 1:
        raise ValueError(f"partial_rotary_factor is {rope.fraction:g}; only RecurrentGemma rotates a part of each head")
    return rope.base


def whole_rope(f: Fields, fraction: float = 1.0) -> Rope:
    """The unscaled rope of a config.json whose layers all have the same; rope_scaling overrides rope_parameters."""
    base = f.number("rope_theta", default=10_000.0)
    if f.get("partial_rotary_factor", default=None) is not None:
        fraction = f.number("partial_rotary_factor")
    older, newer = f.object("rope_scaling"), f.object("rope_parameters")
    name = "rope_scaling" if older else "rope_parameters"
    rope = rope_of(older or newer, base, fraction, name)
    if rope.scale != 1:
        raise ValueError(f"by {name}, rope is scaled by {rope.scale:g}; only Gemma 3's global layers are")
    return rope


def period_from_json(f: Fields, layers: int, usual: int) -> int:
    """Every how many layers one is global: stated as a number, as the list of all layers, or not at all."""
    name = "sliding_window_pattern"
    period = f.get(name, f"_{name}", default=None)
    period = usual if period is None else period
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"{name} is {str(period)[:80]!r}; it must be an integer above 0")
    kinds = f.get("layer_types", default=None)
    if kinds is None:
        return period
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f"layer_types is {str(kinds)[:80]!r}; it must be a list of {layers} kinds of layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types has {str(kind)[:80]!r}; minigemma runs full_attention and sliding_attention")
    return _period("layer_types", [kind == "full_attention" for kind in kinds], period)


def period_from_gguf(f: Fields, layers: int, usual: int) -> int:
    """Every how many layers one is global: a number, or a list that says of each layer whether it is local."""
    name = "attention.sliding_window_pattern"
    local = f.get(name, default=usual)
    if not isinstance(local, list):
        return f.integer(name, default=usual)
    if len(local) != layers:
        raise ValueError(f"{name} has {len(local)} values for {layers} layers")
    return _period(name, [not one for one in local], usual)


def _period(name: str, is_global: list[bool], usual: int) -> int:
    first = is_global.index(True) if True in is_global else len(is_global)
    for period in (usual, first + 1):
        if is_global == [i % period == period - 1 for i in range(len(is_global))]:
            return period
    raise ValueError(f"the global layers of {name} do not repeat, one at the end of each period")
