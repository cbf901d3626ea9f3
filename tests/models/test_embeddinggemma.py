"""EmbeddingGemma against transformers and torch, and that a variant is one page and a line of registration."""

import json

import numpy as np
import pytest
from support import checkpoints, gguf_files
from support import transformers_answers as theirs
from support.compare import TOLERANCE, distance
from support.tensors import read

import minigemma as mg
from minigemma.cli.quantize import quantize
from minigemma.models.registry import FAMILIES, RELEASED, all_names

IDS = np.random.default_rng(5).integers(3, checkpoints.VOCAB - 1, 41)
SIDE = 5  # tokens that a local layer shows on either side


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a dtype, written once."""
    return {
        dtype: checkpoints.write_embedding(tmp_path_factory.mktemp(dtype) / "model", dtype)
        for dtype in checkpoints.DTYPES
    }


@pytest.mark.parametrize("length", [1, 7, 41])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
def test_embeddings_equal_those_of_transformers(answers, folders, dtype, backend, length):
    found = mg.load(folders[dtype], dtype="f32", backend=backend).embed(IDS[:length])
    expected = theirs.embedding(folders[dtype], IDS[:length])
    assert found.dtype == np.float32 and found.shape == (24,)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    assert distance(found, expected) < TOLERANCE


def test_bf16_mode_stays_near_the_exact_one(answers, folders):
    found = mg.load(folders["bf16"]).embed(IDS)
    assert found @ theirs.embedding(folders["bf16"], IDS) > 0.9995


@pytest.mark.parametrize("layers, sees", [(1, SIDE), (6, 40)], ids=["one local layer", "up to a global layer"])
def test_a_token_is_seen_from_both_sides(tmp_path, layers, sees):
    """A local layer shows W / 2 = 5 tokens on either side, a global one all of them."""
    model = mg.load(checkpoints.write_embedding(tmp_path / "model", num_hidden_layers=layers), dtype="f32")
    other = IDS.copy()
    other[20] = other[20] % 50 + 3 if other[20] % 50 + 3 != other[20] else 60
    changed = np.flatnonzero(np.abs(model.hidden_states(other) - model.hidden_states(IDS)).max(1) > 1e-6)
    assert list(changed) == list(range(max(0, 20 - sees), min(40, 20 + sees) + 1))


def test_kernels_and_definitions_agree(folders):
    fast, plain = (mg.load(folders["f32"], dtype="f32", backend=backend) for backend in ("numba", "numpy"))
    for length in (1, 7, 41):
        assert np.abs(fast.embed(IDS[:length]) - plain.embed(IDS[:length])).max() < 1e-5


def test_a_text_comes_in_one_call(folders):
    model = mg.load(folders["f32"], dtype="f32")
    cache = model.new_cache(8)
    model.hidden_states(IDS[:4], cache)
    with pytest.raises(ValueError, match="in one call"):
        model.hidden_states(IDS[4:8], cache)


def test_an_encoder_writes_no_text(folders):
    model = mg.load(folders["f32"])
    for write in (lambda: mg.generate(model, [2, 5], max_new_tokens=2), lambda: mg.score(model, [2, 5, 6])):
        with pytest.raises(ValueError, match="EmbeddingGemma writes no text"):
            write()


def test_without_its_line_of_registration_the_folder_is_of_no_family(folders, monkeypatch):
    """A Gemma 3 that is not causal is refused where no page takes it."""
    monkeypatch.delitem(FAMILIES, "embeddinggemma")
    with pytest.raises(mg.ModelFormatError, match="use_bidirectional_attention is True"):
        mg.load(folders["f32"])


def test_a_causal_folder_stays_a_gemma_3(tmp_path):
    folder = checkpoints.write_embedding(tmp_path / "model", use_bidirectional_attention=False)
    assert mg.load(folder).config.family == "gemma3"


def test_parameters_are_those_of_the_released_model():
    """307,581,696, as the model's entry in MTEB states."""
    config = RELEASED["embeddinggemma-300m"]
    assert config.embedding_parameters + config.non_embedding_parameters == 307_581_696


def test_a_quantized_folder_is_read_back(folders, tmp_path):
    quantize(folders["bf16"], tmp_path / "int8", "int8")
    small, before = mg.load(tmp_path / "int8"), mg.load(folders["bf16"])
    assert small.config == before.config
    assert small.embed(IDS) @ before.embed(IDS) > 0.999


def gguf_file(folder, path, **changes):
    """The folder as llama.cpp's converter writes it: other names, 1 + w for norms, the matrices after the mean too."""
    c, stored = mg.load(folder).config, read(folder / "model.safetensors")
    for i in (2, 3):
        stored[f"{i}_Dense/linear.weight"] = read(folder / f"{i}_Dense" / "model.safetensors")["linear.weight"]
    tensors = {
        theirs: stored[name] + np.float32(stored[name].ndim == 1)
        for (_, name, _), (_, theirs, _) in zip(all_names(c, 0), all_names(c, 1), strict=True)
    }
    fields = {"context_length": 64, "embedding_length": c.width, "block_count": c.layers, "pooling_type": 1}
    fields |= {"feed_forward_length": c.ffn_width, "attention.head_count": c.heads, "attention.key_length": c.head_dim}
    fields |= {"attention.head_count_kv": c.kv_heads, "attention.sliding_window": 10, "attention.causal": False}
    fields |= {"attention.layer_norm_rms_epsilon": c.eps, "rope.freq_base": c.rope_base}
    fields |= {"rope.freq_base_swa": c.rope_base_local, "rope.scaling.factor": c.rope_scale}
    fields |= {"dense_2_feat_in": c.width, "dense_2_feat_out": 90, "dense_3_feat_in": 90, "dense_3_feat_out": 24}
    fields = {f"gemma-embedding.{name}": value for name, value in (fields | changes).items()}
    return gguf_files.write(path, "gemma-embedding", fields, tensors)


def test_a_gguf_file_is_the_same_model_as_its_folder(tmp_path):
    no_header_states = {"query_pre_attn_scalar": 12, "rms_norm_eps": 1e-6}
    folder = checkpoints.write_embedding(tmp_path / "model", **no_header_states)
    model, before = mg.load(gguf_file(folder, tmp_path / "a.gguf")), mg.load(folder)
    assert model.config == before.config
    np.testing.assert_allclose(model.embed(IDS), before.embed(IDS), atol=1e-5)


REFUSED = {"pooling_type": 2, "attention.causal": True, "dense_3_feat_in": 24, "dense_2_feat_in": 24}


@pytest.mark.parametrize("name", REFUSED)
def test_a_gguf_file_of_another_encoder_is_refused(folders, tmp_path, name):
    with pytest.raises(mg.ModelFormatError, match=rf"gemma-embedding\.{name} is {REFUSED[name]}"):
        mg.load(gguf_file(folders["f32"], tmp_path / "a.gguf", **{name: REFUSED[name]}))


STATED = [
    ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode_cls_token is True; .*the mean"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "pooling_mode_mean_tokens is False; .*the mean"),
    ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is False; minigemma runs True"),
    ("1_Pooling/config.json", {"weights": 2}, "weights' is 2, which minigemma does not know"),
    ("2_Dense/config.json", {"bias": True}, "bias is True; minigemma runs False"),
    ("2_Dense/config.json", {"in_features": 8}, "in_features is 8; minigemma runs 56"),
    ("2_Dense/config.json", {"out_features": 8}, "in_features is 90; minigemma runs 8"),
    ("3_Dense/config.json", {"out_features": 8}, r"3_Dense/linear.weight is \[24, 90\], the config implies \[8, 90\]"),
    ("3_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"}, "activation.Tanh"),
    ("config_sentence_transformers.json", {"prompts": {"query": 1}}, "each must be a text"),
    ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "each must be a text"),
]


@pytest.mark.parametrize("file, change, said", STATED)
def test_what_the_modules_state_is_used_or_refused(tmp_path, file, change, said):
    path = checkpoints.write_embedding(tmp_path / "model") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(mg.ModelFormatError, match=said):
        mg.load(tmp_path / "model")


@pytest.mark.parametrize("listed", [[], {}, [1], "without the last", "one more"])
def test_other_modules_are_refused(tmp_path, listed):
    path = checkpoints.write_embedding(tmp_path / "model") / "modules.json"
    modules = json.loads(path.read_text())
    more = {"idx": 5, "name": "5", "path": "5_LayerNorm", "type": "sentence_transformers.models.LayerNorm"}
    changed = {"without the last": modules[:-1], "one more": [*modules, more]}
    path.write_text(json.dumps(changed[listed] if isinstance(listed, str) else listed))
    with pytest.raises(mg.ModelFormatError, match=r"modules.json lists .*; minigemma runs Transformer, 1_Pooling"):
        mg.load(tmp_path / "model")


@pytest.mark.parametrize("file", ["modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"])
def test_a_missing_file_is_named(tmp_path, file):
    (checkpoints.write_embedding(tmp_path / "model") / file).unlink()
    with pytest.raises(mg.ModelFormatError, match=r"modules\.json|2_Dense"):
        mg.load(tmp_path / "model")
