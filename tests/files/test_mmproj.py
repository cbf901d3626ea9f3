"""A GGUF text model and its vision tower in a second file: the same model as the Hugging Face folder with both.

The GGUF files are as llama.cpp's converter writes them: other names, 1 + w for RMSNorms and
w for LayerNorms, the projection in float16.
"""

import json

import numpy as np
import pytest
from support import gguf_files
from support.synthetic import config_json

import minigemma as mg
from minigemma.cli.main import main
from minigemma.config import VisionConfig
from minigemma.files.load import describe
from minigemma.layouts.gguf_blocks import dequantize
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.registry import all_names

EYES = VisionConfig(width=48, layers=2, heads=4, ffn_width=80, side=56, patch=7, tokens=4)
CONFIG = Gemma3Config(
    width=64, layers=6, heads=2, kv_heads=1, head_dim=32, ffn_width=96, vocab=300, window=8, context=64, vision=EYES
)
IDS = [2, 17, EYES.image_token, EYES.image_token, EYES.image_token, EYES.image_token, 30, 31]
IMAGE = np.random.default_rng(3).uniform(-1, 1, (1, 3, 56, 56)).astype(np.float32)


def random_weights():
    """Every tensor by our name; the projection exact in float16, as the converter forces it."""
    random = np.random.default_rng(5)
    weights = {}
    for ours, _, shape in all_names(CONFIG, 0):
        values = random.standard_normal(shape, np.float32) * (0.15 if shape[1:] else 0.5)
        weights[ours] = values.astype(np.float16).astype(np.float32) if ours == "vision.projection" else values
    return weights


def folder(at, weights):
    from safetensors.numpy import save_file

    at.mkdir()
    names = {
        ours: name if ours.startswith("vision.") else f"language_model.model.{name}"
        for ours, name, _ in all_names(CONFIG, 0)
    }
    text = config_json(CONFIG) | {"hidden_activation": "gelu_pytorch_tanh"}
    tower = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    tower |= {"image_size": 56, "patch_size": 7}
    fields = {"model_type": "gemma3", "text_config": text, "vision_config": tower, "mm_tokens_per_image": 4}
    (at / "config.json").write_text(json.dumps(fields))
    save_file({names[ours]: values for ours, values in weights.items()}, at / "model.safetensors")
    return at


def text_file(path, weights):
    norms = {ours for ours, *_ in all_names(CONFIG, 1) if weights[ours].ndim == 1}
    named = {
        theirs: weights[ours] + (ours in norms) for ours, theirs, _ in all_names(CONFIG, 1) if "vision" not in ours
    }
    sizes = {"context_length": 64, "embedding_length": 64, "block_count": 6, "feed_forward_length": 96}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32}
    sizes |= {"attention.sliding_window": 8, "attention.layer_norm_rms_epsilon": 1e-6}
    return gguf_files.write(path, "gemma3", {f"gemma3.{name}": value for name, value in sizes.items()}, named)


def tower_file(path, weights, swapped=False, projection=None, **changes):
    """`swapped`: fc1 and fc2 under each other's names, as converters before llama.cpp's PR 13290 wrote them."""
    named = {theirs: weights[ours] for ours, theirs, _ in all_names(CONFIG, 1) if ours.startswith("vision.")}
    named["mm.soft_emb_norm.weight"] = named["mm.soft_emb_norm.weight"] + 1
    half = named["mm.input_projection.weight"].astype(np.float16)
    named["mm.input_projection.weight"] = half if projection is None else projection
    if swapped:
        other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        named = {".".join(other.get(part, part) for part in name.split(".")): values for name, values in named.items()}
    sizes = {"image_size": 56, "patch_size": 7, "embedding_length": 48, "feed_forward_length": 80, "block_count": 2}
    sizes |= {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-6, "projection_dim": 64}
    fields = {f"clip.vision.{name}": value for name, value in sizes.items()}
    fields |= {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "gemma3",
        "clip.vision.projector.scale_factor": 4,
    }
    fields |= changes
    return gguf_files.write(path, "clip", fields, {name: named[name] for name in named if name not in changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    at, weights = tmp_path_factory.mktemp("sees"), random_weights()
    return folder(at / "hf", weights), text_file(at / "text.gguf", weights), weights


@pytest.mark.parametrize("swapped", [False, True])
def test_the_same_logits_as_the_folder(files, tmp_path, swapped):
    hf, text, weights = files
    tower = tower_file(tmp_path / "mmproj.gguf", weights, swapped)
    expected = mg.load(hf, dtype="f32").forward(IDS, images=IMAGE)
    found = mg.load(text, dtype="f32", mmproj=tower).forward(IDS, images=IMAGE)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_projection_in_eight_bits_is_widened(files, tmp_path):
    """Blocks lie along the rows of the file, whose transpose is the weight."""
    _, text, weights = files
    blocks = gguf_files.quantize(weights["vision.projection"], "Q8_0")
    blocks = blocks.reshape(len(weights["vision.projection"]), -1)
    rounded = weights | {"vision.projection": dequantize("Q8_0", blocks.reshape(len(blocks), -1, 34))}
    tower, wide = (tmp_path / name for name in ("q8.gguf", "wide.gguf"))
    models = [
        mg.load(text, dtype="f32", mmproj=tower_file(tower, rounded, projection=("Q8_0", blocks))),
        mg.load(text, dtype="f32", mmproj=tower_file(wide, rounded, projection=rounded["vision.projection"])),
    ]
    found, expected = (model.forward(IDS, images=IMAGE) for model in models)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_image_matters(files):
    model = mg.load(files[0])
    assert np.abs(model.forward(IDS, images=IMAGE) - model.forward(IDS, images=-IMAGE))[1:].max() > 0.01


def test_without_the_second_file_it_is_a_text_model(files):
    _, text, _ = files
    with pytest.raises(ValueError, match="no vision tower, but 1 image was given"):
        mg.load(text).forward(IDS, images=IMAGE)


def test_the_tower_is_counted_only_where_it_is_wanted(files, tmp_path):
    hf, text, weights = files
    tower = tower_file(tmp_path / "mmproj.gguf", weights)
    for path, more in ((hf, {}), (text, {"mmproj": tower})):
        whole, blind = (describe(path, vision=vision, **more).weight_bytes for vision in (True, False))
        assert whole - blind > 4 * EYES.parameters
        assert mg.load(path, vision=False, **more).vision is None


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"clip.projector_type": "mlp"}, "projector type 'mlp'"),
        ({"clip.vision.block_count": 3}, "lacks 16 tensors: v.blk.2"),
        ({"clip.vision.embedding_length": 52}, r"v.patch_embd.weight is \[48, 3, 7, 7\], the config implies \[52,"),
        ({"clip.vision.projection_dim": 128}, "projects to a width of 128, and the text model has 64"),
        ({"clip.vision.patch_size": 5}, "56 pixels do not divide into patches of 5"),
        ({"clip.vision.projector.scale_factor": 0}, "division|modulo"),
        ({"clip.vision.image_size": 7.5}, "clip.vision.image_size is 7.5; it must be an integer"),
        ({"v.post_ln.weight": 1}, "lacks 1 tensors: v.post_ln.weight"),
    ],
)
def test_a_tower_of_another_model(files, tmp_path, capsys, changes, says):
    tower = tower_file(tmp_path / "mmproj.gguf", files[2], **changes)
    with pytest.raises(mg.ModelFormatError, match=says) as caught:
        mg.load(files[1], mmproj=tower)
    assert caught.value.path == str(tower)
    assert main(["inspect", "-m", str(files[1]), "--mmproj", str(tower)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_files_in_each_others_place(files, tmp_path):
    hf, text, weights = files
    tower = tower_file(tmp_path / "mmproj.gguf", weights)
    with pytest.raises(mg.ModelFormatError, match=r"is the vision tower of a model \(mmproj\); give it as --mmproj"):
        mg.load(tower)
    with pytest.raises(mg.ModelFormatError, match="architecture 'gemma3'"):
        mg.load(text, mmproj=text)
    with pytest.raises(mg.ModelFormatError, match="--mmproj goes with a GGUF file only"):
        mg.load(hf, mmproj=tower)
    with pytest.raises(mg.ModelFormatError, match=r"nothing\.gguf"):
        mg.load(text, mmproj=tmp_path / "nothing.gguf")


def test_inspect_tells_of_the_tower(files, tmp_path, capsys):
    tower = tower_file(tmp_path / "mmproj.gguf", files[2])
    assert main(["inspect", "-m", str(files[1]), "--mmproj", str(tower)]) == 0
    said = f"vision      {EYES.parameters:,} parameters, 2 layers: 56 x 56 pixels → 64 patches → 4 tokens per image"
    assert said in capsys.readouterr().out
