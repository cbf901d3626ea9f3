"""Random models cost what released ones cost, `bench` measures what it says, and its peers hold the same weights."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minigemma.cli.bench import arithmetic_peak, bench, points, prompt_flops, read_bandwidth, roofline, table, token_at
from minigemma.cli.main import main
from minigemma.cli.peers import DeepMind, LlamaCpp, OpenVINO, Transformers, weight_bytes
from minigemma.cli.random_weights import random_model
from minigemma.config import VisionConfig
from minigemma.kernels import amx
from minigemma.layouts.weight import format_of
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig
from minigemma.models.registry import RELEASED

SMALL = {"width": 64, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn_width": 96, "vocab": 300}
RECURRENT = RecurrentGemmaConfig(**SMALL, window=8, lru_width=64, gate_blocks=2)
LOCAL_GLOBAL = Gemma2Config(**SMALL, window=8)
EYES = VisionConfig(
    width=48,
    layers=2,
    heads=2,
    ffn_width=80,
    side=56,
    patch=14,
    tokens=4,
    image_token=299,
    start_token=298,
    end_token=297,
)
SEEING = Gemma3Config(**SMALL, window=8, pattern=3, context=600, vision=EYES)


@pytest.mark.parametrize(
    "dtype, bits", [("f32", 32), ("bf16", 16), ("int8", 8.5), ("int4", 4.5), ("int8-row", 8.04), ("int4-row", 4.04)]
)
def test_random_weights_take_the_bytes_that_the_format_says(dtype, bits):
    config = RELEASED["gemma-3-270m"]
    model = random_model(config, dtype, layers=2)
    matrices = replace(config, layers=2).non_embedding_parameters * bits / 8
    embedding = config.embedding_parameters * (bits + 4 if "int4" in dtype else bits) / 8
    assert weight_bytes(model.weights) == pytest.approx(matrices + embedding, rel=2e-3), "norms are float32"
    assert format_of(model.weights.blocks[1].ffn.down) == dtype


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4", "int8-row", "int4-row"])
@pytest.mark.parametrize("config", [RECURRENT, LOCAL_GLOBAL, SEEING], ids=["recurrent", "gemma 2", "gemma 3"])
def test_random_models_run_and_their_values_keep_their_size(config, dtype):
    model = random_model(config, dtype)
    logits = model.forward(range(2, 40))
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100


def test_the_seed_decides():
    first, again, other = (random_model(RECURRENT, "int8", seed=seed).weights for seed in (1, 1, 2))
    assert (first.embedding == again.embedding).all()
    assert (first.embedding != other.embedding).any()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no released model is named 'gemma-5'; those that are: gemma-2b,"):
        random_model("gemma-5")
    with pytest.raises(ValueError, match="dtype is 'int2'"):
        random_model(RECURRENT, "int2")
    with pytest.raises(ValueError, match="'ollama' is no program that is known here"):
        bench(random_model(RECURRENT), 4, 2, against=["ollama"])
    with pytest.raises(ValueError, match="context is 600 tokens"):
        bench(random_model(SEEING), 599, 2)


@pytest.mark.oracle
@pytest.mark.parametrize("config", [RECURRENT, LOCAL_GLOBAL, replace(SEEING, vision=None)], ids=lambda c: c.family)
@pytest.mark.parametrize("peer", [Transformers, DeepMind])
def test_a_peer_has_the_same_weights(config, peer):
    """Its logits in bf16 are ours but for rounding; six tokens are within its window whichever way it counts."""
    pytest.importorskip("torch")
    model, ids = random_model(config, "bf16"), [2, 17, 99, 3, 250, 61]
    if peer is DeepMind and config is not RECURRENT:
        with pytest.raises(ImportError, match="RecurrentGemma only"):
            peer(model)
        return
    try:
        other = peer(model)
    except ImportError as error:
        pytest.skip(str(error))
    assert other.prefill(ids) > 0
    theirs = other.state.logits if peer is Transformers else other.logits
    ours = model.forward(ids)[-1]
    assert np.abs(theirs[0, -1].float().numpy() - ours).max() < 0.05 * np.abs(ours).max()
    assert other.decode(2) > 0


@pytest.mark.oracle
def test_llama_cpp_runs_the_file_itself(demo_file):
    import minigemma as mg

    with pytest.raises(ImportError, match="it runs GGUF files"):
        LlamaCpp(random_model(LOCAL_GLOBAL))
    model = mg.load(demo_file)
    try:
        other = LlamaCpp(model)
    except ImportError as error:
        pytest.skip(str(error))
    ids = model.tokenizer.encode("The capital of France is Paris, the capital of Spain is")
    assert other.prefill([2, *ids]) > 0
    assert other.decode(2) > 0


@pytest.mark.oracle
def test_transformers_has_the_same_vision_tower():
    model = random_model(SEEING, "bf16")
    pixels = np.random.default_rng(1).uniform(-1, 1, (3, EYES.side, EYES.side)).astype(np.float32)
    pytest.importorskip("torch")
    other = Transformers(model)
    assert other.look(pixels) > 0
    ours = model.vision_tower(pixels)
    assert np.abs(other.seen[0].float().numpy() - ours).max() < 0.05 * np.abs(ours).max()


def test_layers_may_be_fewer():
    model = random_model("gemma-3-4b", "int4", layers=1)
    assert (model.config.layers, len(model.weights.blocks), len(model.weights.vision.blocks)) == (1, 1, 1)
    assert random_model("gemma-3-4b", "int4", layers=1, vision=False).vision is None


def test_report_and_table():
    seen = []
    report = bench(random_model(SEEING), 20, 3, positions=[10, 500], repeat=1, image=True, progress=seen.append)
    report["weights"] = "random"
    ours = report["programs"]["minigemma"]
    assert ours["decode_tps"] > 0 and ours["seconds_to_first_token"] == pytest.approx(20 / ours["prefill_tps"])
    assert set(report["milliseconds_per_token_at"]) == {"10", "500"}
    assert report["multiplies"] == "float32" or amx.choice()[0] != "vectors"
    assert set(report["image"]) >= {"vision tower", "reading its tokens", "one more token"}
    assert "an image: round 1 of 1" in seen
    text = table(report)
    assert "weights random" in text
    assert f"the first token after {ours['seconds_to_first_token']:.3g} s" in text
    assert "at position       500" in text
    assert "vision tower" in text
    assert "tower       minigemma" in text


def test_the_scan_of_a_recurrent_model_is_measured():
    report = bench(random_model(RECURRENT), 4, 2, repeat=1)
    assert 1e6 < report["scan_bytes_per_second"] < 1e13
    assert "GB/s over 2,048 tokens" in table(report | {"weights": "random"})


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("minigemma.cli.peers.find_spec", lambda name: None)
    report = bench(random_model(RECURRENT), 4, 2, against=["deepmind"], repeat=1)
    report["weights"] = "random"
    assert "deepmind    not measured: recurrentgemma, einops" in table(report)


def test_a_position_is_only_pretended():
    model = random_model(RECURRENT)
    assert set(token_at(model, [0, 5, 10_000], 6, 1, print)) == {0, 5, 10_000}
    cache = model.new_cache(20_000)
    cache.skip_to(10_000)
    assert (cache.position, cache.nbytes) == (10_000, RECURRENT.cache_bytes(10_000))
    assert np.isfinite(model.forward([5], cache)).all()
    for wrong in (9_000, 20_001):
        with pytest.raises(ValueError, match=f"position {wrong} is not within 10001"):
            cache.skip_to(wrong)


def test_the_machine_is_measured():
    assert 1e7 < read_bandwidth() < 1e13  # whatever else wants the machine meanwhile
    assert 1e7 < arithmetic_peak() < 1e14


def test_command_line(capsys):
    arguments = ["--prompt-tokens", "9", "-n", "2", "-r", "1", "--positions", "100,30000", "--json", "-q"]
    assert main(["bench", "--shape", "gemma-3-270m", "--dtype", "int4", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["name"], report["dtype"], report["weights"]) == ("gemma-3-270m", "int4", "random")
    assert main(["bench", "--shape", "gemma-9"]) == 1
    assert capsys.readouterr().err.startswith("minigemma: gemma-9: no released model is named 'gemma-9'")


@pytest.mark.oracle
@pytest.mark.parametrize(
    "config",
    [RELEASED["gemma-2b"], LOCAL_GLOBAL, replace(SEEING, vision=None, rope_scale=8.0)],
    ids=lambda c: c.family,
)
def test_openvino_has_the_same_model(config):
    """Past two windows, by a prompt and token by token, its logits are ours but for int8."""
    model, ids = random_model(replace(config, **SMALL), "f32"), list(range(40, 60))
    try:
        other = OpenVINO(model)
    except ImportError as error:
        pytest.skip(str(error))
    ours = model.forward(ids)
    assert other.prefill(ids) > 0
    assert np.corrcoef(other.logits, ours[-1])[0, 1] > 0.995
    other.prefill(ids[:3])
    for position in range(3, len(ids)):
        other.forward(ids[position : position + 1])
        assert np.corrcoef(other.logits, ours[position])[0, 1] > 0.995
    assert other.decode(2) > 0


@pytest.mark.oracle
def test_a_wrong_graph_of_openvino_is_refused(monkeypatch):
    """It checks itself: here it gets the weights of another model."""
    import minigemma.cli.peers

    model, graph_of = random_model(LOCAL_GLOBAL, "f32"), minigemma.cli.peers.stateful_graph
    monkeypatch.setattr(
        "minigemma.cli.peers.stateful_graph", lambda _: graph_of(random_model(LOCAL_GLOBAL, "f32", seed=9))
    )
    pytest.importorskip("openvino")
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"openvino's graph of .* is wrong"):
        OpenVINO(model)


def test_what_openvino_lacks_is_said(monkeypatch):
    monkeypatch.setattr("minigemma.cli.peers.find_spec", lambda name: None if name == "openvino" else name)
    with pytest.raises(ImportError, match=r"^pip install openvino$"):
        OpenVINO(random_model(LOCAL_GLOBAL))
    monkeypatch.setattr("minigemma.cli.peers.find_spec", lambda name: name)
    with pytest.raises(ImportError, match="RecurrentGemma has another"):
        OpenVINO(random_model(RECURRENT))


REPORT = {
    "name": "small",
    "dtype": "int8",
    "threads": 2,
    "vectors": "8 lanes",
    "parameters": 1500,
    "flops_per_token": 2000,
    "read_bytes_per_second": 30e9,
    "flops_per_second": 90e9,
    "multiplies": "float32",
    "prompt_tokens": 64,
    "programs": {
        "minigemma": {"prefill_tps": 100.0, "decode_tps": 20.0, "weight_bytes": 1500},
        "other": {"prefill_tps": 50.0, "decode_tps": 10.0, "weight_bytes": 3000},
    },
    "prefill_tps_of": {"4": {"minigemma": 80.0, "other": 40.0}},
}


@pytest.mark.parametrize("config", [RECURRENT, LOCAL_GLOBAL], ids=["recurrent", "gemma 2"])
def test_a_prompt_does_without_most_of_the_last_layer(config):
    ffn, q_and_o = 3 * 64 * 96, 2 * 64 * 2 * 32
    assert prompt_flops(random_model(config)) == 2 * (config.non_embedding_parameters - ffn - q_and_o)
    if config is RECURRENT:  # of two layers the last is a recurrent block: W_y and W_out, 64 x 64
        shorter = random_model(config, layers=2)
        assert prompt_flops(shorter) == 2 * (shorter.config.non_embedding_parameters - ffn - 2 * 64 * 64)


def test_points_of_the_roofline():
    """A token multiplies all of 1,500 weights, a prompt 500, the head's and some of the last layer's, once: two flop
    each.
    """
    ours, other = points(REPORT).values()
    assert ours[0] == ("decode", 3000 / 1500, 3000 * 20.0)
    assert ours[1] == ("prompt of 4", (4 * 2000 + 1000) / 1500, (4 * 2000 + 1000) * 80.0 / 4)
    assert ours[2][:2] == ("prompt of 64", (64 * 2000 + 1000) / 1500)
    assert [point[1] for point in other] == [point[1] / 2 for point in ours]


def test_decoding_at_the_speed_of_memory_lies_on_the_roof():
    limit = REPORT["read_bytes_per_second"] / 1500
    at_limit = REPORT["programs"]["minigemma"] | {"decode_tps": limit}
    _, intensity, speed = points(REPORT | {"programs": {"minigemma": at_limit}})["minigemma"][0]
    assert speed == pytest.approx(intensity * REPORT["read_bytes_per_second"])


@pytest.mark.oracle
def test_the_roofline_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    for report in (REPORT, REPORT | {"prefill_tps_of": {}}):
        roofline(report, tmp_path / "roof.png")
        with Image.open(tmp_path / "roof.png") as picture:
            assert picture.size == (1350, 900)


@pytest.mark.oracle
def test_plot_on_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roof.svg"
    sizes = ["--shape", "gemma-3-270m", "--layers", "1", "--dtype", "int4", "-n", "1", "-r", "1", "-q"]
    assert main(["bench", *sizes, "--prompt-tokens", "5,2", "--plot", str(path)]) == 0
    assert "a prompt    of 2 tokens: minigemma" in capsys.readouterr().out
    assert path.read_text().startswith("<?xml")
    assert main(["bench", *sizes, "--plot", "roof.docx"]) == 1
    assert "name it .png, or one of" in capsys.readouterr().err
    assert main(["bench", *sizes, "--plot", str(tmp_path / "no" / "roof.png")]) == 1
    assert "No such folder" in capsys.readouterr().err
    monkeypatch.setattr("minigemma.cli.bench.find_spec", lambda name: None)
    assert main(["bench", *sizes, "--plot", str(path)]) == 1
    assert capsys.readouterr().err.endswith("pip install matplotlib\n")
