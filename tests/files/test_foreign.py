"""Files, folders and tensors of other kinds are named as what they are."""

import json

import pytest

from minigemma.errors import ModelFormatError
from minigemma.files.config_json import config_from_json
from minigemma.files.foreign import FOREIGN, foreign_tensors, kind_of, what_it_holds
from minigemma.files.open import open_files

BEGINNINGS = {
    "m.onnx": (b"\x08\x07\x12\x07pytorch", "onnx"),
    "m.gguf.gz": (b"\x1f\x8b\x08", "packed"),
    "m.xz": (b"\xfd7zXZ\0", "packed"),
    "m.zst": (b"\x28\xb5\x2f\xfd", "packed"),
    "m.7z": (b"7z\xbc\xaf\x27\x1c", "packed"),
    "m.tar": (b"model.safetensors" + bytes(240) + b"ustar\0", "packed"),
    "m.npy": (b"\x93NUMPY\x01\0", "npy"),
    "ggml.bin": (b"lmgg", "ggml"),
    "ggjt.bin": (b"tjgg\x03\0\0\0", "ggml"),
    "m.pt": (b"PK\x03\x04", "zip"),
    "m.tflite": (b"\x20\0\0\0TFL3", "task"),
    "m.pdf": (b"%PDF-1.4", ""),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_file_tells_by_its_beginning(name, tmp_path):
    head, kind = BEGINNINGS[name]
    assert kind_of(head, f".{name.rpartition('.')[2]}") == kind
    (tmp_path / name).write_bytes(head)
    says = FOREIGN[kind][0] if kind else "is neither a safetensors nor a GGUF file"
    with pytest.raises(ModelFormatError) as refused:
        open_files(tmp_path / name)
    assert refused.value.problem == says


FOLDERS = {
    (): "is an empty folder",
    ("_METADATA",): "is an Orbax checkpoint",
    ("checkpoint-500/config.json",): "its folder checkpoint-500 has one",
    ("model.safetensors",): "has weights, but no config.json",
    ("gemma.litertlm",): "holds gemma.litertlm",
    ("mmproj-model.gguf",): "holds mmproj-model.gguf",
    ("tokenizer.model",): "holds neither config.json nor model.safetensors",
}


@pytest.mark.parametrize("names", FOLDERS, ids=str)
def test_a_folder_without_a_config_tells_by_its_names(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ModelFormatError) as refused:
        config_from_json(tmp_path / "config.json")
    assert FOLDERS[names] in refused.value.problem


def test_weights_under_another_name_are_named(tmp_path):
    (tmp_path / "consolidated.safetensors").touch()
    assert what_it_holds(tmp_path)[1] == "rename it if it has the whole model"
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert "no model.safetensors.index.json" in what_it_holds(tmp_path)[0]


LAYER = "model.layers.0.self_attn.q_proj"
TENSORS = {
    f"{LAYER}.qweight": "quantized",  # GPTQ, AWQ
    f"{LAYER}.weight.absmax": "quantized",  # bitsandbytes
    f"{LAYER}.SCB": "quantized",
    f"{LAYER}.scales": "quantized",  # MLX
    f"{LAYER}.weight_packed": "quantized",  # compressed-tensors
    f"{LAYER}.weight_scale_inv": "quantized",  # fp8
    f"{LAYER}.lora_A.default.weight": "LoRA",
    "score.weight": "classifier",
    "v_head.summary.weight": "classifier",
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_other_programs_tell_by_their_names(name):
    problem, _ = foreign_tensors([name, "another.weight"])
    assert TENSORS[name] in problem and name in problem
    assert foreign_tensors(["another.weight"]) is None


@pytest.mark.parametrize(
    "stated, method",
    [
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)
def test_the_method_of_a_quantization_is_named(stated, method, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"} | stated))
    with pytest.raises(ModelFormatError, match=f"quantised by '{method}'"):
        config_from_json(tmp_path / "config.json")
