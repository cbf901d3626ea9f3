"""Logits equal those of transformers in float32, on small random checkpoints that transformers wrote.

The bound is 1e-4 of the largest logit, in float32 mode; rounding alone gives about 3e-6. When a comparison fails, it
prints for each layer how far the two have drifted apart, and from which token on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support import checkpoints  # noqa: E402  needs both

import minigemma as mg  # noqa: E402

TOLERANCE = 1e-4
T = 101  # 14 windows of Gemma 2's checkpoint, 20 of Gemma 3's
IDS = np.random.default_rng(11).integers(3, checkpoints.VOCAB - 1, T)
FAMILIES = list(checkpoints.FAMILIES)


class Truth(NamedTuple):
    folder: Path
    reference: Any  # transformers' model
    logits: np.ndarray  # [T, V], what it gives for IDS


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Models this small gain nothing from a second thread, and torch's would wait busily while ours work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Callable[[str, str], Truth]:
    """truth(family, dtype): a checkpoint, transformers' model of it and its logits, each made once."""

    @cache
    def made(family: str, dtype: str) -> Truth:
        folder = checkpoints.write(tmp_path_factory.mktemp(f"{family}-{dtype}"), family, dtype)
        model = checkpoints.reference(folder)
        return Truth(folder, model, logits_of(model))

    return made


def logits_of(reference: Any, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.from_numpy(ids)[None]).logits[0].numpy()


def in_pieces(model: Any, size: int, ids: np.ndarray = IDS) -> np.ndarray:
    """Logits of `ids`, fed to a cache `size` at a time."""
    held = model.new_cache(len(ids))
    pieces = [model.forward(ids[i : i + size], cache=held) for i in range(0, len(ids), size)]
    assert held.position == len(ids)
    return np.concatenate(pieces)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value; NaN counts as infinitely far."""
    return float(np.nan_to_num(np.abs(found - expected), nan=np.inf).max() / np.abs(expected).max())


def assert_parity(found: np.ndarray, expected: np.ndarray, reference: Any, model: Any) -> None:
    if found.shape != expected.shape or distance(found, expected) > TOLERANCE:
        pytest.fail(report(found, expected, reference, model), pytrace=False)


def report(found: np.ndarray, expected: np.ndarray, reference: Any, model: Any) -> str:
    """The layer debugger: where two models part, by token and by layer."""
    lines = [f"logits {list(found.shape)} and {list(expected.shape)}"]
    if found.shape == expected.shape:
        far = [distance(a, b) > TOLERANCE for a, b in zip(found, expected, strict=True)]
        where = f", first at token {far.index(True)}" if any(far) else ""
        lines = [f"largest difference {distance(found, expected):.1e} of the largest logit{where}"]
    lines.append("layer by layer, all tokens in one piece (if all is well here, look at the cache):")
    theirs = inner_values(reference)
    taps = mg.Taps(*theirs)
    model.forward(IDS, taps=taps)
    for name, value in theirs.items():
        if name not in taps:
            lines.append(f"    {name}: not tapped")
            continue
        apart = distance(taps[name], value)
        lines.append(f"    {name}: {apart:.1e}{'  ← beyond the bound' if apart > TOLERANCE else ''}")
    return "\n".join(lines)


def inner_values(reference: Any) -> dict[str, np.ndarray]:
    """transformers' values for IDS by the names of our taps, in the order in which they are made."""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output)[0].detach().numpy()

        return hook

    decoder = reference.get_decoder()
    layers = {f"blocks.{i}.residual.out": layer for i, layer in enumerate(decoder.layers)}
    modules = {"embedding": decoder.embed_tokens} | layers | {"final_norm": decoder.norm}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    logits = logits_of(reference)
    for handle in handles:
        handle.remove()
    return seen | {"logits": logits}


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_text_in_one_call(truth, family, dtype, backend):
    folder, reference, expected = truth(family, dtype)
    model = mg.load(folder, dtype="f32", backend=backend)
    assert_parity(model.forward(IDS), expected, reference, model)


@pytest.mark.parametrize("size", [1, 3, 7, 64])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_in_pieces_through_a_cache(truth, family, dtype, backend, size):
    folder, reference, expected = truth(family, dtype)
    model = mg.load(folder, dtype="f32", backend=backend, threads=1 if size < 7 else None)
    assert_parity(in_pieces(model, size), expected, reference, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_logits_alone_are_the_last_of_all(truth, family):
    folder, reference, expected = truth(family, "bf16")
    model = mg.load(folder, dtype="f32")
    assert_parity(model.forward(IDS, last_only=True), expected[-1:], reference, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_file_as_stored_is_exact_too(truth, family):
    folder, reference, expected = truth(family, "f32")
    model = mg.load(folder)
    assert_parity(model.forward(IDS), expected, reference, model)


@pytest.mark.parametrize("size", [1, 7, T])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_mode_stays_near_the_exact_one(truth, family, size):
    """bf16 has 8 significant bits, so a rounding is up to 0.4 % off, and keys, values and the inputs of many-token
    products are rounded. Through 3 to 8 layers this gives 0.3 to 0.7 % of the logits' root mean square: 1.5 % are
    allowed, and 5 % of the largest logit for the worst single one.
    """
    folder, _, expected = truth(family, "bf16")
    found = in_pieces(mg.load(folder, threads=1 if size < 7 else None), size)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.015
    assert distance(found, expected) < 0.05


def older(folder: Path) -> None:
    checkpoints.older_config(folder)


def released_vision_names(folder: Path) -> None:
    """As on the hub: a level `vision_model` more than transformers 5 writes."""
    same = {name: name for name in ("language_model.model.", "multi_modal_projector.")}
    checkpoints.rename_tensors(folder, {"vision_tower.": "vision_tower.vision_model."} | same)


def released_4b(folder: Path) -> None:
    """The released 4B: names of the hub, and a text_config that leaves most to the class."""
    released_vision_names(folder)
    checkpoints.older_config(folder, leave_out=checkpoints.LEFT_OUT)


def names_of_2025(folder: Path) -> None:
    """As transformers 4.52 to 4.57 saved a model with a vision tower."""
    checkpoints.rename_tensors(
        folder,
        {
            "language_model.model.": "model.language_model.",
            "vision_tower.": "model.vision_tower.vision_model.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
    )


def bare_names(folder: Path) -> None:
    """As the model without its head is saved."""
    checkpoints.rename_tensors(folder, {"model.": ""})


def stored_head(folder: Path) -> None:
    checkpoints.store_head(folder)


def stored_head_of_vision(folder: Path) -> None:
    checkpoints.store_head(folder, "language_model.lm_head.weight")


SPELLINGS = [
    ("gemma", older),
    ("gemma2", older),
    ("gemma3", older),
    ("gemma3-vision", older),
    ("gemma3-vision", released_vision_names),
    ("gemma3-vision", released_4b),
    ("gemma3-vision", names_of_2025),
    ("gemma3-vision", stored_head_of_vision),
    ("gemma", bare_names),
    ("gemma3", bare_names),
    ("gemma", stored_head),
    ("gemma2", stored_head),
]


@pytest.mark.parametrize("family, rewrite", SPELLINGS, ids=lambda value: getattr(value, "__name__", value))
def test_spelling_of_another_year_is_the_same_model(truth, tmp_path, family, rewrite):
    """Read by transformers too, so that our rewriting is known to mean what it meant then."""
    original, _, expected = truth(family, "bf16")
    folder = tmp_path / "rewritten"
    shutil.copytree(original, folder)
    rewrite(folder)
    reference = checkpoints.reference(folder)
    assert np.array_equal(logits_of(reference), expected), "the rewritten folder is another model"
    model = mg.load(folder, dtype="f32")
    assert_parity(model.forward(IDS), expected, reference, model)


PATTERN_OF_3 = ["sliding_attention", "sliding_attention", "full_attention"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "in many files": ("gemma3", {"shard_size": "30KB"}),
    "with a head of its own": ("gemma", {"tied": False}),
    "with a vision tower and a head of its own": ("gemma3-vision", {"tied": False}),
    "multi-query": ("gemma", {"num_key_value_heads": 1}),
    "multi-head": ("gemma", {"num_key_value_heads": 6}),
    "without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "window of 1": ("gemma2", {"sliding_window": 1}),
    "window past the text": ("gemma3", {"sliding_window": 200}),
    "one global layer in three": ("gemma3", {"layer_types": (PATTERN_OF_3 * 3)[:8]}),
    "cap on Gemma 3's logits": ("gemma3", {"final_logit_softcapping": 3.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(tmp_path, variant):
    family, changes = VARIANTS[variant]
    folder = checkpoints.write(tmp_path, family, "bf16", **changes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard_size" in changes)
    reference = checkpoints.reference(folder)
    model = mg.load(folder, dtype="f32")
    expected = logits_of(reference)
    assert_parity(model.forward(IDS), expected, reference, model)
    assert_parity(in_pieces(model, 7), expected, reference, model)


def rope(base: float, local: float | None = None, factor: float = 8.0) -> dict[str, Any]:
    if local is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}
    everywhere = {"rope_type": "linear", "factor": factor, "rope_theta": base}
    return {
        "rope_parameters": {
            "full_attention": everywhere,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    }


MISTAKES = [
    ("gemma", {"rms_norm_eps": 0.01}),
    ("gemma", rope(10_000.0)),
    ("gemma2", {"query_pre_attn_scalar": 20}),
    ("gemma2", {"sliding_window": 8}),
    ("gemma2", {"sliding_window": 6}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("gemma2", rope(10_000.0)),
    ("gemma3", {"query_pre_attn_scalar": 12}),
    ("gemma3", {"sliding_window": 6}),
    ("gemma3", {"sliding_window": 4}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 8}),
    ("gemma3", rope(40_000.0, 500.0, factor=1.0)),
    ("gemma3", rope(500.0, 40_000.0)),
    ("gemma3-vision", {"query_pre_attn_scalar": 20}),
    ("gemma3-vision", rope(1_000_000.0, 10_000.0, factor=1.0)),
]


@pytest.mark.parametrize("family, change", MISTAKES, ids=str)
def test_the_checkpoints_would_show_this_mistake(truth, family, change):
    """The comparison is only worth what it can see: a model that is wrong in one number is ten bounds away."""
    folder, _, right = truth(family, "f32")
    assert distance(logits_of(checkpoints.reference(folder, **change)), right) > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoints_would_show_the_other_embedding_scale(truth, family):
    folder, _, right = truth(family, "f32")
    reference = checkpoints.reference(folder)
    checkpoints.round_embedding_scale(reference)
    assert distance(logits_of(reference), right) > 5 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoints_would_show_any_tensor_out_of_place(truth, family):
    folder, _, _ = truth(family, "f32")
    reference = checkpoints.reference(folder)
    ids = IDS[:40]
    right = logits_of(reference, ids)
    unseen = []
    for name, parameter in reference.named_parameters():
        if "vision_tower" in name or "multi_modal" in name:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept.roll(1, -1))
            if distance(logits_of(reference, ids), right) < 10 * TOLERANCE:
                unseen.append(name)
            parameter.copy_(kept)
    assert not unseen


def test_report_names_the_layer_that_is_wrong(truth):
    folder, _, expected = truth("gemma3", "f32")
    reference = checkpoints.reference(folder)
    with torch.no_grad():
        reference.get_decoder().layers[5].self_attn.k_norm.weight.mul_(1.1)
    model = mg.load(folder, dtype="f32")
    text = report(expected, logits_of(reference), reference, model)
    marked = [line.split(":")[0].strip() for line in text.splitlines() if "beyond" in line]
    assert marked == [f"blocks.{i}.residual.out" for i in (5, 6, 7)] + ["final_norm", "logits"]
    assert "not tapped" not in text
