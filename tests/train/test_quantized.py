"""Quantization-aware training: the model runs as it will when loaded with a dtype, and gets better at it."""

import numpy as np
import pytest
from support.runs import toy, write_text

import minigemma as mg
from minigemma.train.quantized import Rounded, rounded
from minigemma.train.settings import ROUNDED
from minigemma.train.targets import Distillation
from minigemma.train.trainer import Training

SMALL = {"batch_tokens": 128, "seq": 32, "threads": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a toy model that has learned a little."""
    folder = tmp_path_factory.mktemp("trained")
    list(Training(toy(), write_text(folder), folder / "run", steps=15, lr=0.01, eval_every=999, **SMALL))
    return folder


@pytest.mark.parametrize("dtype", [*ROUNDED[:2], "sfp8"])
def test_the_model_runs_as_load_will_make_it(trained, dtype):
    run = Training(toy(), trained / "text.txt", init=trained / "run", steps=2, qat=dtype, **SMALL)
    ids = [run.tokenizer.bos, *run.tokenizer.encode("Jack and Jill")]
    loaded = mg.load(trained / "run", dtype)
    for name in ("embedding", "blocks.1.ffn.down"):
        found = loaded.weights.embedding if name == "embedding" else loaded.weights.blocks[1].ffn.down
        np.testing.assert_array_equal(run.rounded.parameters[name], found.widen())
    np.testing.assert_allclose(run.model.forward(ids), loaded.forward(ids), rtol=0, atol=0.1)


def test_steps_move_the_exact_parameters_and_the_rounded_ones_follow(trained):
    run = Training(toy(), trained / "text.txt", init=trained / "run", steps=2, qat="int4", **SMALL)
    before = {name: values.copy() for name, values in run.adam.parameters.items()}
    run.step()
    for name, values in run.adam.parameters.items():
        assert (values != before[name]).any(), name
        expected = rounded(name, values, "int4") if values.ndim == 2 else values
        np.testing.assert_array_equal(run.rounded.parameters[name], expected)


def test_the_rounded_model_comes_nearer_to_the_exact_one(trained, tmp_path):
    """The teacher is the model before; KL to it falls, while rounding alone would leave it as in the first step."""
    told = Distillation(teacher=str(trained / "run"), draws="all")
    settings = SMALL | {"lr": 0.002, "warmup": 0.1, "weight_decay": 0.0, "eval_every": 999, "held_out": 0}
    run = Training(
        toy(), trained / "text.txt", init=trained / "run", distillation=told, steps=25, qat="int4-row", **settings
    )
    divergences = [step.kl for step in run]
    assert np.median(divergences[-5:]) < 0.85 * np.median(divergences[:3])  # the median, as <eos> has a hard target


def test_without_a_dtype_nothing_is_copied():
    exact = {"embedding": np.ones((32, 32), np.float32)}
    assert Rounded(exact, None).parameters["embedding"] is exact["embedding"]


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="qat is 'int3'; it must be one of int4, int4-row"):
        Training(toy(), write_text(tmp_path), steps=2, qat="int3", **SMALL)
