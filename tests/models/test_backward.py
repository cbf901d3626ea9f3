"""The gradient of every parameter of whole models: against transformers' autograd, and against finite differences.

Sequences of one batch lie one after the other; one is longer than three windows. RecurrentGemma is asked in
transformers with a window of one more key, as its window counts the token itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints
from support import transformers_answers as theirs
from support.compare import distance
from support.training import BATCH, TARGETS, ours, parameters

import minigemma as mg
from minigemma.formulas.cross_entropy import Targets, loss_of_targets
from minigemma.formulas.rglru import softplus
from minigemma.layouts import Adapted
from minigemma.models.backward import Batch, hidden, loss, loss_and_gradients
from minigemma.models.parameters import model_of, refresh, zeros_like
from minigemma.models.registry import all_names
from minigemma.models.weights import named_weights

FAMILIES = ("gemma", "gemma2", "vaultgemma", "gemma3", "recurrentgemma")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """written(family): a checkpoint, made once."""

    def write(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        if family == "recurrentgemma":
            return checkpoints.write_recurrent(folder)
        return checkpoints.write(folder, family)

    return cache(write)


def trained(folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """A model to train, and its parameters."""
    config = mg.load(folder).config
    arrays = parameters(folder, config)
    return model_of(config, arrays), arrays


def gradients_of(model: Any, arrays: dict[str, np.ndarray], *batch: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    found = zeros_like(arrays)
    return loss_and_gradients(model, *batch, 1.0, found), found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_autograd(written, answers, family):
    model, arrays = trained(written(family))
    losses, found = gradients_of(model, arrays, BATCH, TARGETS)
    expected, samples = theirs.gradients(written(family), *BATCH, *TARGETS)
    assert distance(losses, expected) <= 1e-5
    by_their_name = sorted((f"model.{name}", own) for own, name, _ in all_names(model.config, 0))
    assert len(by_their_name) == len(found)
    for name, own in by_their_name:
        gradient = found[own] if not own.endswith("conv") else found[own].T[:, None]
        assert ours(own, gradient).shape == arrays[own].shape
        sample = theirs.sample(np.ascontiguousarray(gradient))
        assert distance(sample, samples[: len(sample)]) <= 1e-5, name
        samples = samples[len(sample) :]
    assert not len(samples)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_a_batch_do_not_meet(written, family):
    """The gradient of a batch is the sum of those of its sequences, and losses are those of `forward`'s logits."""
    model, arrays = trained(written(family))
    losses, together = gradients_of(model, arrays, BATCH, TARGETS)
    np.testing.assert_array_equal(loss(model, BATCH, TARGETS), losses)
    alone, ends = zeros_like(arrays), [*BATCH.starts[1:], len(BATCH.ids)]
    for first, last in zip(BATCH.starts, ends, strict=True):
        at = slice(first, last)
        some = Targets(*(each[at] for each in TARGETS))
        batch = Batch(BATCH.ids[at], np.zeros(1, np.int32))
        found = loss_and_gradients(model, batch, some, 0.5, alone)
        np.testing.assert_allclose(found, losses[at], rtol=1e-5, atol=1e-5)
        logits = model.forward(BATCH.ids[at])
        np.testing.assert_allclose(loss_of_targets(some)(logits, slice(None))[0], found, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.head(hidden(model, batch)), logits, atol=1e-5 * np.abs(logits).max())
    for name, gradient in together.items():
        assert distance(2 * alone[name], gradient) <= 1e-5, name


@pytest.mark.parametrize("family", ["gemma3", "recurrentgemma"])
def test_kernels_and_definitions_give_the_same_gradients(written, family):
    model, arrays = trained(written(family))
    losses, found = gradients_of(model, arrays, BATCH, TARGETS)
    model.backend = "numpy"
    expected_losses, expected = gradients_of(model, arrays, BATCH, TARGETS)
    assert distance(losses, expected_losses) <= 1e-5
    for name, gradient in found.items():
        assert distance(gradient, expected[name]) <= 1e-5, name


def test_a_model_reads_parameters_where_they_are(written):
    """After a step `refresh` makes the model that `model_of` would make of them."""
    model, arrays = trained(written("recurrentgemma"))
    before = loss(model, BATCH, TARGETS)
    for array in arrays.values():
        array *= np.float32(0.9)
    refresh(model, arrays)
    changed = loss(model, BATCH, TARGETS)
    assert distance(changed, before) > 1e-3
    np.testing.assert_array_equal(changed, loss(model_of(model.config, arrays), BATCH, TARGETS))
    np.testing.assert_array_equal(model.weights.blocks[0].recurrent.decay, softplus(arrays["blocks.0.recurrent.decay"]))


def test_a_head_of_its_own_has_a_gradient_of_its_own(written):
    model, arrays = trained(written("gemma2"))
    _, tied = gradients_of(model, arrays, BATCH, TARGETS)
    arrays["head"] = arrays["embedding"].copy()
    _, apart = gradients_of(model_of(model.config, arrays), arrays, BATCH, TARGETS)
    assert distance(apart["embedding"] + apart["head"], tied["embedding"]) <= 1e-6


def test_a_loss_may_be_any_function_of_the_logits(written):
    """Here the sum of squares, whose gradient is twice the logits; a finite difference along the embedding agrees."""
    model, arrays = trained(written("gemma2"))

    def squares(logits: np.ndarray, at: slice) -> tuple[np.ndarray, np.ndarray]:
        return (logits**2).sum(axis=1), 2 * logits

    losses, found = gradients_of(model, arrays, BATCH, squares)
    logits = model.head(hidden(model, BATCH))
    np.testing.assert_allclose(losses, (logits.astype(np.float64) ** 2).sum(axis=1), rtol=1e-5)
    direction, step, sums = np.sign(found["embedding"]), np.float32(1e-4), []
    for sign in (1, -2):
        arrays["embedding"] += sign * step * direction
        refresh(model, arrays)
        sums.append((model.head(hidden(model, BATCH)).astype(np.float64) ** 2).sum())
    assert (sums[0] - sums[1]) / (2 * step) == pytest.approx((found["embedding"] * direction).sum(), rel=1e-2)


@pytest.mark.parametrize(
    "batch, targets, message",
    [
        (Batch(BATCH.ids + checkpoints.VOCAB, BATCH.starts), TARGETS, "ids must be"),
        (Batch(BATCH.ids, BATCH.starts[1:]), TARGETS, "starts must rise from 0"),
        (Batch(BATCH.ids, BATCH.starts[[0, 0]]), TARGETS, "starts must rise from 0"),
        (Batch(BATCH.ids, np.array([0, len(BATCH.ids)])), TARGETS, "starts must rise from 0"),
        (BATCH, Targets(TARGETS.ids[:-1], TARGETS.weights[:-1]), "they must be"),
        (BATCH, Targets(TARGETS.ids - checkpoints.VOCAB, TARGETS.weights), "ids of targets must be"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(written, batch, targets, message):
    model, arrays = trained(written("gemma2"))
    with pytest.raises(ValueError, match=message):
        gradients_of(model, arrays, batch, targets)
    with pytest.raises(ValueError, match=message):
        loss(model, batch, targets)


def test_models_with_images_or_without_logits_are_refused(written, tmp_path):
    seeing = mg.load(checkpoints.write(tmp_path / "seeing", "gemma3-vision"))
    with pytest.raises(ValueError, match="only text models are trained"):
        model_of(seeing.config, {})
    encoder = mg.load(checkpoints.write_embedding(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="writes no text"):
        loss(encoder, BATCH, TARGETS)


@pytest.mark.parametrize("family", ["gemma3", "recurrentgemma"])
def test_gradients_of_an_adapter_follow_from_those_of_its_matrix(written, family):
    """By the chain rule dA = s Bᵀ dW and dB = s dW Aᵀ; nothing else has room for a gradient, and so none is made."""
    model, arrays = trained(written(family))
    names = [f"blocks.2.{name}" for name in ("attention.q", "attention.o", "ffn.down", "ffn.gate")]
    names += [f"blocks.1.recurrent.{name}" for name in ("x", "out")] if family == "recurrentgemma" else []
    random = np.random.default_rng(1)
    pairs = {
        name: [random.standard_normal(size, np.float32) * np.float32(0.2) for size in sizes]
        for name in names
        for sizes in [((3, arrays[name].shape[1]), (arrays[name].shape[0], 3))]
    }
    weights = dict(named_weights(model.weights))
    adapted = model.with_weights({name: Adapted.of(weights[name], *pair, 0.5) for name, pair in pairs.items()})
    found = {
        f"{name}.lora_{half}": np.zeros_like(array)
        for name, pair in pairs.items()
        for half, array in zip("ab", pair, strict=True)
    }
    losses = loss_and_gradients(adapted, BATCH, TARGETS, 1.0, found)
    for name, (a, b) in pairs.items():
        arrays[name] += np.float32(0.5) * (b @ a)
    refresh(model, arrays)
    expected, whole = gradients_of(model, arrays, BATCH, TARGETS)
    assert distance(losses, expected) <= 1e-5
    for name, (a, b) in pairs.items():
        assert distance(found[f"{name}.lora_a"], 0.5 * b.T @ whole[name]) <= 1e-4, name
        assert distance(found[f"{name}.lora_b"], 0.5 * whole[name] @ a.T) <= 1e-4, name
