"""A new variant of a model is one page and one line of registration: tests/support/bidirectional_gemma3.py."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import bidirectional_gemma3 as page

import minigemma as mg
from minigemma.models.registry import FAMILIES, all_names, register

IDS = np.random.default_rng(5).integers(2, 300, 41)
SIZES = {"hidden_size": 56, "intermediate_size": 74, "num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 12}
FIELDS = SIZES | {
    "model_type": "gemma3_bidirectional",
    "num_key_value_heads": 2,
    "vocab_size": 307,
    "max_position_embeddings": 512,
    "sliding_window": 10,
    "query_pre_attn_scalar": 7,
    "use_bidirectional_attention": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 40_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}


@pytest.fixture(autouse=True)
def registered():
    register(page.FAMILY)
    yield
    FAMILIES.pop(page.FAMILY.name, None)


def write(folder, **changes):
    """A folder of the variant with random weights."""
    fields = FIELDS | changes
    sizes = page.gemma3.text_fields(page.Fields(fields, page.gemma3.JSON_DEFAULTS))
    rng, weights = np.random.default_rng(3), {}
    for _, name, shape in all_names(page.BidirectionalConfig(**sizes), 0):
        scale = shape[-1] ** -0.5 if shape[1:] else 0.3
        weights[f"model.{name}"] = rng.standard_normal(shape, np.float32) * np.float32(scale)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("length", [1, 7, 41])
def test_the_variant_computes_what_transformers_computes(tmp_path, backend, length):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = write(tmp_path)
    config = transformers.Gemma3TextConfig(**{name: value for name, value in FIELDS.items() if name != "model_type"})
    reference = transformers.Gemma3TextModel.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = reference(torch.from_numpy(IDS[:length])[None]).last_hidden_state[0].numpy()
    embedding = mg.load(folder, dtype="f32", backend=backend).embed(IDS[:length])
    assert np.abs(embedding - hidden.mean(0)).max() < 1e-4 * np.abs(hidden).max()


@pytest.mark.parametrize("layers, sees", [(1, 5), (6, 40)], ids=["one local layer", "up to a global layer"])
def test_a_token_is_seen_from_both_sides(tmp_path, layers, sees):
    """A local layer shows W / 2 = 5 tokens on either side, a global one all of them."""
    model = mg.load(write(tmp_path, num_hidden_layers=layers), dtype="f32")
    other = IDS.copy()
    other[20] += 1
    changed = np.flatnonzero(np.abs(model.hidden_states(other) - model.hidden_states(IDS)).max(1) > 1e-6)
    assert list(changed) == list(range(max(0, 20 - sees), min(40, 20 + sees) + 1))


def test_kernels_and_definitions_agree(tmp_path):
    fast, plain = (mg.load(write(tmp_path), dtype="f32", backend=backend) for backend in ("numba", "numpy"))
    for length in (1, 7, 41):
        assert np.abs(fast.embed(IDS[:length]) - plain.embed(IDS[:length])).max() < 1e-5


def test_a_text_comes_in_one_call(tmp_path):
    model = mg.load(write(tmp_path), dtype="f32")
    cache = model.new_cache(8)
    model.hidden_states(IDS[:4], cache)
    with pytest.raises(ValueError, match="in one call"):
        model.hidden_states(IDS[4:8], cache)


def test_a_folder_that_does_not_state_both_directions_is_refused(tmp_path):
    write(tmp_path, use_bidirectional_attention=False)
    with pytest.raises(mg.ModelFormatError, match="use_bidirectional_attention is False; minigemma runs True"):
        mg.load(tmp_path)


def test_without_its_line_of_registration_the_folder_is_of_no_family(tmp_path):
    write(tmp_path)
    del FAMILIES[page.FAMILY.name]
    with pytest.raises(mg.ModelFormatError, match="model_type is 'gemma3_bidirectional'"):
        mg.load(tmp_path)
