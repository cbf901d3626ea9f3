"""A written GGUF file is the model that was saved, for `load`, for llama.cpp's reader and for transformers."""

from dataclasses import replace

import numpy as np
import pytest
from support.tokenizers import ways_in
from support.transformers_answers import libraries, run

import minigemma as mg
from minigemma.files.gguf_write import FORMS, save_gguf
from minigemma.files.save import save_model
from minigemma.models.gemma import GemmaConfig
from minigemma.train.initial import initial_parameters
from minigemma.train.sizes import TINY

SIZES = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn_width": 96, "vocab": 710}
CONFIGS = {"gemma": GemmaConfig(**SIZES), "gemma2": replace(TINY["tiny-gemma-2"], vocab=710)}
CONFIGS["gemma3"] = replace(TINY["tiny-gemma-3"], vocab=710, rope_scale=8.0)
TEXT = "And it came to pass in those days, that there went out a decree.\n\n"


def parameters_of(config):
    """Initial ones, with norms that are not zero."""
    random, found = np.random.default_rng(0), initial_parameters(config, 1)
    return {n: x if x.ndim > 1 else random.normal(0, 0.2, x.shape).astype(np.float32) for n, x in found.items()}


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("family", CONFIGS)
def test_the_file_is_the_model(family, dtype, tmp_path):
    config, tokenizer = CONFIGS[family], ways_in()[1]
    parameters = parameters_of(config)
    save_model(tmp_path / "folder", config, parameters, tokenizer, "f32")
    save_gguf(tmp_path / "model.gguf", config, parameters, tokenizer, dtype)
    one, two = mg.load(tmp_path / "folder"), mg.load(tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.glob("model*")] == ["model.gguf"]
    ids = tokenizer.encode(TEXT * 3)
    assert two.tokenizer.encode(TEXT * 3) == ids and two.tokenizer.decode(ids) == TEXT * 3
    assert replace(two.config, query_pre_attn_scalar=None) == replace(one.config, query_pre_attn_scalar=None)
    expected = one.forward(ids)
    difference = abs(two.forward(ids) - expected).max() / abs(expected).max()
    assert difference < {"f32": 1e-5, "f16": 3e-2, "bf16": 3e-2, "int8": 5e-2, "int4": 0.8}[dtype]


def test_what_llama_cpp_lacks_is_refused(tmp_path):
    config = TINY["tiny-recurrentgemma"]
    with pytest.raises(ValueError, match="no RecurrentGemma"):
        save_gguf(tmp_path / "a.gguf", config, initial_parameters(config, 0), None)
    config = replace(TINY["tiny-gemma-3"], query_pre_attn_scalar=7.0)
    with pytest.raises(ValueError, match=r"query_pre_attn_scalar is .* GGUF header cannot state"):
        save_gguf(tmp_path / "a.gguf", config, initial_parameters(config, 0), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.oracle
@pytest.mark.parametrize("family", CONFIGS)
def test_gguf_reads_what_was_written(family, tmp_path):
    gguf = pytest.importorskip("gguf")
    config, tokenizer = CONFIGS[family], ways_in()[1]
    parameters = parameters_of(config)
    save_gguf(tmp_path / "model.gguf", config, parameters, tokenizer, "int8")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {field for field in reader.fields if field.startswith("tokenizer.")} >= {"tokenizer.ggml.tokens"}
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert abs(tensors["token_embd.weight"] - parameters["embedding"]).max() < 0.01
    assert abs(tensors["output_norm.weight"] - 1 - parameters["final_norm"]).max() < 1e-6


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_transformers_loads_the_file(family, tmp_path):
    """With the folder's config, as a GGUF header has no attention scale; llama.cpp has a rule for it."""
    pytest.importorskip("accelerate", reason="transformers wants it to read a GGUF file")
    torch, transformers = libraries()
    config, tokenizer = CONFIGS[family], ways_in()[1]
    parameters = parameters_of(config)
    save_gguf(tmp_path / "model.gguf", config, parameters, tokenizer, "f32")
    save_model(tmp_path / "folder", config, parameters, tokenizer, "f32")
    stated = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=stated, dtype=torch.float32, attn_implementation="eager"
    )
    ids = np.array(tokenizer.encode(TEXT * 4))
    expected = run(model.eval(), ids)
    assert abs(mg.load(tmp_path / "model.gguf").forward(ids) - expected).max() < 1e-4 * abs(expected).max()
