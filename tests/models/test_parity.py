"""Logits equal those of transformers in float32, on small random checkpoints.

The bound is 1e-4 of the largest logit, in float32 mode; rounding alone gives about 3e-6. When a comparison fails under
`-m oracle`, it prints for each layer how far the two have drifted apart, and from which token on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints
from support import transformers_answers as theirs
from support.compare import TOLERANCE, distance, in_chunks
from support.oracles import Mode, live_only

import minigemma as mg

T = 101  # 14 windows of Gemma 2's checkpoint, 20 of Gemma 3's
IDS = np.random.default_rng(11).integers(3, checkpoints.VOCAB - 1, T)
FAMILIES = checkpoints.FAMILIES


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str, str], Path]:
    """written(family, dtype): a checkpoint, made once."""
    return cache(lambda family, dtype: checkpoints.write(tmp_path_factory.mktemp(f"{family}-{dtype}"), family, dtype))


@pytest.fixture(scope="module")
def loaded(written) -> Callable[..., Any]:
    """loaded(family, dtype, backend, threads): minigemma's model of a checkpoint in float32, made once."""
    return cache(
        lambda family, dtype, backend="numba", threads=None: mg.load(
            written(family, dtype), dtype="f32", backend=backend, threads=threads
        )
    )


@pytest.fixture(scope="module")
def truth(written, answers) -> Callable[[str, str], np.ndarray]:
    """truth(family, dtype): transformers' logits [T, V] for IDS."""
    return cache(lambda family, dtype: theirs.text_logits(written(family, dtype), IDS))


def assert_parity(found: np.ndarray, expected: np.ndarray, folder: Path, model: Any) -> None:
    if found.shape != expected.shape or distance(found, expected) > TOLERANCE:
        reference = theirs.held(folder) if Mode.live else None
        pytest.fail(report(found, expected, reference, model), pytrace=False)


def report(found: np.ndarray, expected: np.ndarray, reference: Any, model: Any) -> str:
    """The layer debugger: where two models part, by token and by layer."""
    lines = [f"logits {list(found.shape)} and {list(expected.shape)}"]
    if found.shape == expected.shape:
        far = [distance(a, b) > TOLERANCE for a, b in zip(found, expected, strict=True)]
        where = f", first at token {far.index(True)}" if any(far) else ""
        lines = [f"largest difference {distance(found, expected):.1e} of the largest logit{where}"]
    if reference is None:
        return "\n".join([*lines, "`pytest -m oracle` shows it layer by layer"])
    lines.append("layer by layer, all tokens in one call (if all is well here, look at the cache):")
    values = inner_values(reference)
    taps = mg.Taps(*values)
    model.forward(IDS, taps=taps)
    for name, value in values.items():
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
    logits = theirs.run(reference, IDS)
    for handle in handles:
        handle.remove()
    return seen | {"logits": logits}


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_text_in_one_call(truth, written, loaded, family, dtype, backend):
    model = loaded(family, dtype, backend)
    assert_parity(model.forward(IDS), truth(family, dtype), written(family, dtype), model)


@pytest.mark.parametrize("size", [1, 3, 7, 64])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_in_chunks_through_a_cache(truth, written, loaded, family, dtype, backend, size):
    model = loaded(family, dtype, backend, 1 if size < 7 else None)
    assert_parity(in_chunks(model, size, IDS), truth(family, dtype), written(family, dtype), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_logits_alone_are_the_last_of_all(truth, written, loaded, family):
    model = loaded(family, "bf16")
    assert_parity(model.forward(IDS, last_only=True), truth(family, "bf16")[-1:], written(family, "bf16"), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_file_as_stored_is_exact_too(truth, written, family):
    model = mg.load(written(family, "f32"))
    assert_parity(model.forward(IDS), truth(family, "f32"), written(family, "f32"), model)


@pytest.mark.parametrize("size", [1, 7, T])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_mode_stays_near_the_exact_one(truth, written, family, size):
    """bf16 has 8 significant bits, so a rounding is up to 0.4 % off, and keys, values and the inputs of many-token
    products are rounded. Through 3 to 8 layers this gives 0.3 to 0.7 % of the logits' root mean square: 1.5 % are
    allowed, and 5 % of the largest logit for the worst single one.
    """
    expected = truth(family, "bf16")
    found = in_chunks(mg.load(written(family, "bf16"), threads=1 if size < 7 else None), size, IDS)
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
def test_spelling_of_another_year_is_the_same_model(truth, written, tmp_path, family, rewrite):
    """Read by transformers too, so that our rewriting is known to mean what it meant then."""
    folder = tmp_path / "rewritten"
    shutil.copytree(written(family, "bf16"), folder)
    rewrite(folder)
    same = theirs.says_the_same(folder, written(family, "bf16"), IDS)
    assert same, "the rewritten folder is another model"
    model = mg.load(folder, dtype="f32")
    assert_parity(model.forward(IDS), truth(family, "bf16"), folder, model)


PATTERN_OF_3 = ["sliding_attention", "sliding_attention", "full_attention"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "in many files": ("gemma3", {"shard_size": 30_000}),
    "with a head of its own": ("gemma", {"tied": False}),
    "with a vision tower and a head of its own": ("gemma3-vision", {"tied": False}),
    "multi-query": ("gemma", {"num_key_value_heads": 1}),
    "multi-head": ("gemma", {"num_key_value_heads": 6}),
    "without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "window of 1": ("gemma2", {"sliding_window": 1}),
    "window past the text": ("gemma3", {"sliding_window": 200}),
    "one global layer in three": ("gemma3", {"layer_types": (PATTERN_OF_3 * 3)[:8]}),
    "local layers in VaultGemma": ("vaultgemma", {"layer_types": [*PATTERN_OF_3[1:], PATTERN_OF_3[0]]}),
    "cap on Gemma 3's logits": ("gemma3", {"final_logit_softcapping": 3.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(answers, tmp_path, variant):
    family, changes = VARIANTS[variant]
    folder = checkpoints.write(tmp_path, family, "bf16", **changes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard_size" in changes)
    model, expected = mg.load(folder, dtype="f32"), theirs.text_logits(folder, IDS)
    assert_parity(model.forward(IDS), expected, folder, model)
    assert_parity(in_chunks(model, 7, IDS), expected, folder, model)


@live_only
@pytest.mark.parametrize("family, changes", [*((family, {}) for family in FAMILIES), *VARIANTS.values()], ids=str)
def test_our_checkpoints_are_what_transformers_writes(answers, tmp_path, family, changes):
    """config.json field by field, and every tensor's name and shape."""
    ours = checkpoints.write(tmp_path / "ours", family, "bf16", **changes)
    theirs.saved_again(ours, tmp_path / "theirs")
    assert checkpoints.described(ours) == checkpoints.described(tmp_path / "theirs")


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
    ("vaultgemma", {"attn_logit_softcapping": None}),
    ("vaultgemma", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    ("gemma3", {"query_pre_attn_scalar": 12}),
    ("gemma3", {"sliding_window": 6}),
    ("gemma3", {"sliding_window": 4}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 8}),
    ("gemma3", rope(40_000.0, 500.0, factor=1.0)),
    ("gemma3", rope(500.0, 40_000.0)),
    ("gemma3-vision", {"query_pre_attn_scalar": 20}),
    ("gemma3-vision", rope(1_000_000.0, 10_000.0, factor=1.0)),
]


@live_only
@pytest.mark.parametrize("family, change", MISTAKES, ids=str)
def test_the_checkpoints_would_show_this_mistake(truth, written, family, change):
    """The comparison is only worth what it can see: a model that is wrong in one number is ten bounds away."""
    wrong = theirs.model_of(written(family, "f32"), **change)
    assert distance(theirs.run(wrong, IDS), truth(family, "f32")) > 10 * TOLERANCE


@live_only
@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoints_would_show_the_other_embedding_scale(truth, written, family):
    reference = theirs.model_of(written(family, "f32"))
    theirs.round_embedding_scale(reference)
    assert distance(theirs.run(reference, IDS), truth(family, "f32")) > 5 * TOLERANCE


@live_only
@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoints_would_show_any_tensor_out_of_place(answers, written, family):
    reference, ids = theirs.model_of(written(family, "f32")), IDS[:40]
    seen = theirs.tensors_seen(reference, lambda name: "vision_tower" not in name and "multi_modal" not in name, ids)
    assert not [name for name, far in seen.items() if far < 10 * TOLERANCE]


@live_only
def test_report_names_the_layer_that_is_wrong(truth, written, loaded):
    torch, _ = theirs.libraries()
    expected = truth("gemma3", "f32")
    reference = theirs.model_of(written("gemma3", "f32"))
    with torch.no_grad():
        reference.get_decoder().layers[5].self_attn.k_norm.weight.mul_(1.1)
    text = report(expected, theirs.run(reference, IDS), reference, loaded("gemma3", "f32"))
    marked = [line.split(":")[0].strip() for line in text.splitlines() if "beyond" in line]
    assert marked == [f"blocks.{i}.residual.out" for i in (5, 6, 7)] + ["final_norm", "logits"]
    assert "not tapped" not in text
