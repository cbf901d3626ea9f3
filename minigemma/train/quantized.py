"""Quantization-aware training: the model runs with rounded matrices and adapts to them (Gemma 3 §2.3).

    forward    with ŵ = Q(w), exactly what `load(folder, dtype)` makes of w
    backward   ∂loss/∂w := ∂loss/∂ŵ, straight through the rounding
    update     of w, in float32: its small steps add up until ŵ moves to the next number

Gemma 3 fine-tunes this way for a few thousand steps, towards the probabilities of the unrounded model: distill with the
trained model as its own teacher, --init and --qat.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..arrays import F32, LargePages
from ..files.convert import Stored, converted_weight
from ..layouts import Weight


class Rounded:
    """Parameters for a model to run with: matrices rounded to a dtype of `load`, all others as they are."""

    def __init__(self, exact: Mapping[str, F32], dtype: str | None) -> None:
        """None: `parameters` are `exact` themselves."""
        self.exact, self.dtype = exact, dtype
        self.parameters = dict(exact)
        if dtype:
            self.parameters |= {name: values.copy() for name, values in exact.items() if _is_matrix(name, values)}
        self.round()

    def round(self) -> None:
        """Round again, after `exact` has changed."""
        for name, values in self.exact.items():
            if self.dtype and _is_matrix(name, values):
                self.parameters[name][...] = rounded(name, values, self.dtype)


def rounded(name: str, values: F32, dtype: str) -> F32:
    """What a model that is loaded with this dtype has for a matrix [R, D]: float32 [R, D]."""
    weight = converted_weight(name, Stored(name, "F32", values.shape, values), dtype, 0.0, LargePages())
    assert isinstance(weight, Weight)
    return weight.widen()


def _is_matrix(name: str, values: F32) -> bool:
    return values.ndim == 2 and not name.endswith(("_bias", "recurrent.conv"))
