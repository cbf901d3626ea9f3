"""Random models cost what released ones cost."""

from dataclasses import replace

import numpy as np
import pytest
from support.small_models import LOCAL_GLOBAL, RECURRENT, SEEING

from minigemma.cli.measure import weight_bytes
from minigemma.cli.random_weights import random_model
from minigemma.files.convert import RUNS_AS
from minigemma.models.registry import RELEASED


@pytest.mark.parametrize(
    "dtype, bits",
    [
        *(("f32", 32), ("bf16", 16), ("int8", 8.5), ("int4", 5), ("int4-symmetric", 4.5)),
        *(("int8-row", 8.5), ("int4-row", 4.5)),
    ],
)
def test_random_weights_take_the_bytes_that_the_format_says(dtype, bits):
    config = replace(RELEASED["gemma-3-270m"], vocab=16_384)
    model = random_model(config, dtype, layers=2)
    sizes, wide = replace(config, layers=2), {"int4": 8.5, "int4-symmetric": 8.5, "int4-row": 8.5}.get(dtype, bits)
    in_eight = config.embedding_parameters  # of an int4 model, and what its narrow blocks begin with
    if dtype == "int4":
        in_eight += 2 * (config.heads + 2 * config.kv_heads) * config.head_dim * config.width
        in_eight += 2 * 2 * config.ffn_width * config.width
    in_four = sizes.embedding_parameters + sizes.non_embedding_parameters - in_eight
    expected = (in_eight * wide + in_four * bits) / 8
    assert weight_bytes(model.weights) == pytest.approx(expected, rel=2e-3), "norms are float32"
    assert model.weights.blocks[1].ffn.down.layout.name == RUNS_AS.get(dtype, dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4", "int4-symmetric", "int8-row", "int4-row"])
@pytest.mark.parametrize("config", [RECURRENT, LOCAL_GLOBAL, SEEING], ids=["recurrent", "gemma 2", "gemma 3"])
def test_random_models_run_and_their_values_keep_their_size(config, dtype):
    model = random_model(config, dtype)
    logits = model.forward(range(2, 40))
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100


def test_the_seed_decides():
    first, again, other = (random_model(RECURRENT, "int8", seed=seed).weights for seed in (1, 1, 2))
    assert (first.embedding.data == again.embedding.data).all()
    assert (first.embedding.data != other.embedding.data).any()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no released model is named 'gemma-5'; the released ones are gemma-2b,"):
        random_model("gemma-5")
    with pytest.raises(ValueError, match="dtype is 'int2'"):
        random_model(RECURRENT, "int2")


def test_layers_may_be_fewer(monkeypatch):
    monkeypatch.setitem(RELEASED, "gemma-3-4b", replace(RELEASED["gemma-3-4b"], vocab=1000))
    model = random_model("gemma-3-4b", "int4", layers=1)
    assert (model.config.layers, len(model.weights.blocks), len(model.weights.vision.blocks)) == (1, 1, 1)
    assert random_model("gemma-3-4b", "int4", layers=1, vision=False).vision is None
