"""Weights by name: a copy of a model with some of them replaced."""

import numpy as np
import pytest
from support.small_models import LOCAL_GLOBAL, RECURRENT, SEEING

from minigemma.cli.random_weights import random_model
from minigemma.layouts import LAYOUTS, Weight
from minigemma.models.registry import all_names
from minigemma.models.weights import named_weights

IDS = list(range(2, 12))


@pytest.mark.parametrize("config", [LOCAL_GLOBAL, SEEING, RECURRENT], ids=lambda config: config.family)
def test_names_are_those_of_the_tables_on_the_pages(config):
    names = [name for name, _ in named_weights(random_model(config, "f32").weights)]
    assert sorted(names) == sorted(name for name, _, _ in all_names(config, 0))


def test_a_copy_has_the_new_weight_and_shares_all_others():
    model = random_model(LOCAL_GLOBAL, "bf16")
    before = model.forward(IDS)
    array = np.zeros((64, 96), np.float32)
    other = model.with_weights({"blocks.1.ffn.down": array})
    array += 1  # the caller's array is not the model's
    assert (other.weights.blocks[1].ffn.down.widen() == 0).all()
    assert other.weights.blocks[1].ffn.down.layout is model.weights.blocks[1].ffn.down.layout
    assert other.weights.blocks[0] is model.weights.blocks[0] and other.weights.embedding is model.weights.embedding
    assert other.weights.blocks[1].attention is model.weights.blocks[1].attention
    assert (model.forward(IDS) == before).all() and (other.forward(IDS) != before).any()


def test_the_coarse_head_of_a_copy_is_made_of_its_own_weights():
    model = random_model(LOCAL_GLOBAL, "bf16")
    model.__dict__["coarse_head"] = "of the old weights"
    other = model.with_weights({"embedding": np.zeros((300, 64), np.float32)})
    assert model.coarse_head == "of the old weights" and other.coarse_head is None


def test_a_weight_keeps_its_layout_and_gates_stay_as_they_are_stored():
    model = random_model(RECURRENT, "bf16")
    name, gate = "blocks.0.recurrent.input_gate", model.weights.blocks[0].recurrent.input_gate
    out = Weight.pack(LAYOUTS["f32"], np.ones((64, 64), np.float32))
    other = model.with_weights({name: np.ones(gate.shape, np.float32), "blocks.0.recurrent.out": out})
    assert other.weights.blocks[0].recurrent.out is out
    assert other.weights.blocks[0].recurrent.input_gate.dtype == gate.dtype
    assert np.isfinite(other.forward(IDS)).all()


@pytest.mark.parametrize(
    "name, array, message",
    [
        (
            "blocks.1.atention.o",
            np.zeros((64, 64)),
            r"no weight 'blocks.1.atention.o'; the nearest are blocks.1",
        ),
        ("blocks.1.attention.o", np.zeros((64, 32)), r"cannot become float64 \[64, 32\]; it is float32 \[64, 64\]"),
        ("blocks.1.attention.o", np.zeros((64, 64), int), r"cannot become int64"),
        ("final_norm", Weight.pack(LAYOUTS["f32"], np.zeros((64, 64), np.float32)), r"final_norm cannot become"),
    ],
)
def test_wrong_names_and_shapes_are_refused(name, array, message):
    with pytest.raises(ValueError, match=message):
        random_model(LOCAL_GLOBAL, "f32").with_weights({name: array})
