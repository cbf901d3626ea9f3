"""LoRA adapters of peft: the same logits as peft over transformers, beside weights of any layout and merged."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import adapters, checkpoints
from support.compare import distance
from support.tensors import read, save

import minigemma as mg
from minigemma.cli import main
from minigemma.files.adapter import read_adapter
from minigemma.layouts import Adapted
from minigemma.text.batch import generate_batch

IDS = np.random.default_rng(3).integers(3, checkpoints.VOCAB - 1, 40)
CASES = [
    ("gemma3", ["q_proj", "v_proj", "down_proj"], {"ranks": {"v_proj": 2}, "alpha_pattern": {"layers.1.+q_proj": 3}}),
    ("gemma3", ["gate_proj", "up_proj", "k_proj"], {"use_rslora": True, "layers_to_transform": [1, 4]}),
    ("gemma2", ["o_proj"], {"modules_to_save": ["input_layernorm", "embed_tokens"]}),
    ("gemma", ["embed_tokens", "o_proj"], {}),
    ("gemma", ["lm_head"], {}),
    ("recurrentgemma", ["linear_x", "linear_out", "q_proj", "gate_proj"], {"lora_alpha": 5.5}),
]


def written(folder: Path, family: str) -> Path:
    if family == "recurrentgemma":
        return checkpoints.write_recurrent(folder / "model")
    return checkpoints.write(folder / "model", family)


@pytest.fixture
def gemma(tmp_path):
    return written(tmp_path, "gemma3")


@pytest.mark.parametrize("family, targets, told", CASES)
def test_logits_are_those_of_peft(tmp_path, answers, family, targets, told):
    model = written(tmp_path, family)
    adapter = adapters.write(tmp_path / "adapter", model, targets, **told)
    expected = adapters.logits(model, adapter, IDS)
    assert distance(mg.load(model).forward(IDS), expected) > 0.1
    for backend in ("numba", "numpy"):
        assert distance(mg.load(model, adapter=adapter, backend=backend).forward(IDS), expected) <= 3e-5
    assert main(["export", str(model), str(tmp_path / "merged"), "--adapter", str(adapter), "-q"]) == 0
    assert distance(mg.load(tmp_path / "merged").forward(IDS), expected) <= 3e-5


@pytest.mark.parametrize("dtype", ["f32", "int8", "int4"])
def test_token_by_token_and_together_the_adapter_is_not_skipped(tmp_path, dtype):
    """Sizes that the fused kernels take, in every layout."""
    model = mg.load("tiny-gemma-3").path
    adapter = adapters.write(tmp_path / "adapter", model, ["q_proj", "down_proj"])
    with_it, without = mg.load(model, dtype, adapter=adapter), mg.load(model, dtype)
    ids = np.arange(10, 30)
    whole, cache = with_it.forward(ids), with_it.new_cache(len(ids))
    steps = np.concatenate([with_it.forward([i], cache) for i in ids])
    assert distance(steps, whole) < 0.02 < distance(without.forward(ids), whole)
    settings = {"max_new_tokens": 6, "temperature": 0, "raw": True}
    alone = [mg.generate(with_it, text, **settings) for text in ("In the", "And")]
    both = ["", ""]
    for token in generate_batch(with_it, ["In the", "And"], **settings):
        both[token.index] += token.text
    assert both == alone


def test_several_adapters_add_up(gemma, tmp_path):
    """Two of them give what one of both their ranks gives, and in the other order the same."""
    one = adapters.write(tmp_path / "one", gemma, ["q_proj", "o_proj"])
    two = adapters.write(tmp_path / "two", gemma, ["q_proj"], r=2, lora_alpha=3)
    model = mg.load(gemma, adapter=[one, two])
    weight, alone = model.weights.blocks[2].attention.q, mg.load(gemma).weights.blocks[2].attention.q.widen()
    assert isinstance(weight, Adapted) and weight.a.shape[0] == 6
    changes = [mg.load(gemma, adapter=a).weights.blocks[2].attention.q.widen() - alone for a in (one, two)]
    np.testing.assert_allclose(weight.widen(), alone + sum(changes), atol=1e-5)
    np.testing.assert_array_equal(weight.rows(np.array([3, 0])), weight.widen()[[3, 0]])
    assert distance(mg.load(gemma, adapter=[two, one]).forward(IDS), model.forward(IDS)) <= 1e-5


def changed(folder, **told):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))


@pytest.mark.parametrize(
    "told, problem",
    [
        ({"peft_type": "IA3"}, "is of type 'IA3'"),
        ({"use_dora": True}, "sets 'use_dora' to True"),
        ({"bias": "all"}, "sets 'bias' to 'all'"),
        ({"layer_replication": [[0, 4]]}, "'layer_replication'"),
        ({"something_new": 3}, "'something_new'"),
        ({"init_lora_weights": "pissa"}, "began as 'pissa'"),
        ({"r": 3}, "not as a float [3, 56]"),
        ({"r": 0}, "has 0 for r"),
        ({"lora_alpha": "8"}, "has '8' for lora_alpha"),
        ({"target_modules": ["k_proj"]}, "target_modules or layers_to_transform leave out"),
        ({"layers_to_transform": [0]}, "leave out"),
        ({"target_modules": ["q_proj", "k_proj"]}, "which target_modules names"),
        ({"target_modules": "("}, "no regular expression"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head' in modules_to_save"),
    ],
)
def test_what_a_config_states_is_never_passed_over(gemma, tmp_path, told, problem):
    changed(adapters.write(tmp_path / "adapter", gemma, ["q_proj"]), **told)
    with pytest.raises(mg.ModelFormatError) as error:
        mg.load(gemma, adapter=tmp_path / "adapter")
    assert problem in str(error.value) and "adapter" in str(error.value)


def test_bad_tensors_are_one_sentence(gemma, tmp_path, capsys):
    folder = adapters.write(tmp_path / "adapter", gemma, ["q_proj"])
    good = read(folder / "adapter_model.safetensors")
    name = min(good)

    def told(tensors):
        save(tensors, folder / "adapter_model.safetensors")
        assert main(["generate", "-m", str(gemma), "--adapter", str(folder), "Hello"]) == 1
        out, error = capsys.readouterr()
        assert not out and error.count("\n") == 1 and "Traceback" not in error
        return error

    assert "without its B" in told({key: t for key, t in good.items() if key != name.replace("lora_A", "lora_B")})
    assert "which target_modules names" in told({k: t for k, t in good.items() if not k.startswith(name[:-14])})
    assert "NaN" in told(good | {name: good[name] * np.float32(np.nan)})
    assert "no part of this model" in told(good | {name.replace("layers.0", "layers.99"): good[name]})
    assert "lora_magnitude" in told(good | {name.replace("lora_A.weight", "lora_magnitude_vector"): good[name][0]})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert main(["score", "-m", str(gemma), "--adapter", str(folder), "Hello"]) == 1
    assert "pickle" in capsys.readouterr().err
    with pytest.raises(mg.ModelFormatError, match="does not exist"):
        mg.load(gemma, adapter=tmp_path / "none")


def test_two_adapters_that_hold_a_tensor_whole_are_refused(gemma, tmp_path):
    both = [adapters.write(tmp_path / name, gemma, ["q_proj"], modules_to_save=["norm"]) for name in "ab"]
    with pytest.raises(mg.ModelFormatError, match="one of them holds it whole"):
        mg.load(gemma, adapter=both)


def test_the_adapter_of_a_tower_is_left_out_with_the_tower(gemma, tmp_path):
    folder = adapters.write(tmp_path / "adapter", gemma, ["q_proj"])
    path = folder / "adapter_model.safetensors"
    tower = "base_model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save(read(path) | {tower: np.ones((4, 12), np.float32)}, path)
    config = mg.load(gemma).config
    assert len(read_adapter(folder, config).pairs) == config.layers
