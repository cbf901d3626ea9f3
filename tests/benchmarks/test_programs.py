"""Other programs hold the same weights, and what is not installed is said."""

from dataclasses import replace

import numpy as np
import pytest
from support.small_models import EYES, LOCAL_GLOBAL, RECURRENT, SEEING, SMALL

from benchmarks import CONVERTED, programs_with
from benchmarks.__main__ import main
from benchmarks.converted import Continued, timed
from benchmarks.llama_cpp import LlamaCpp
from benchmarks.openvino import OpenVINO, stateful_graph
from benchmarks.torch_programs import DeepMind, Transformers
from minigemma.cli.bench import table
from minigemma.cli.measure import Plan, bench
from minigemma.cli.random_weights import random_model
from minigemma.models.registry import RELEASED


def test_unknown_programs_are_refused(capsys, monkeypatch, small_machine):
    with pytest.raises(ValueError, match="'ollama' is no known program"):
        programs_with(random_model(RECURRENT), ["ollama"])
    monkeypatch.setitem(RELEASED, "gemma-3-270m", replace(RELEASED["gemma-3-270m"], vocab=1000))
    assert main([]) == 2
    shape = ["--shape", "gemma-3-270m", "--layers", "1", "-n", "1", "-r", "1", "--prompt-tokens", "2", "-q"]
    assert main(["ollama", *shape]) == 1
    assert main(["llama.cpp", *shape]) == 0
    assert "llama.cpp   not measured: it runs GGUF files" in capsys.readouterr().out


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


def test_what_is_not_installed_is_said(monkeypatch, small_machine):
    monkeypatch.setattr("benchmarks.torch_programs.find_spec", lambda name: None)
    model = random_model(RECURRENT)
    programs, missing = programs_with(model, ["deepmind"])
    report = bench(model, Plan(4, 2, repeat=1), programs) | {"weights": "random", "missing": missing}
    assert "deepmind    not measured: recurrentgemma, einops" in table(report)


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
    model, graph_of = random_model(LOCAL_GLOBAL, "f32"), stateful_graph
    monkeypatch.setattr(
        "benchmarks.openvino.stateful_graph", lambda _: graph_of(random_model(LOCAL_GLOBAL, "f32", seed=9))
    )
    pytest.importorskip("openvino")
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"openvino's graph of .* is wrong"):
        OpenVINO(model)


@pytest.mark.parametrize("program", CONVERTED, ids=lambda program: program.name)
def test_a_converted_folder_is_asked_for_and_has_the_same_weights(program, monkeypatch):
    """In place of the library stands one that always continues with the same token."""
    model, always = random_model(LOCAL_GLOBAL, "f32"), [0]
    monkeypatch.setattr(program, "module", "json")
    monkeypatch.setattr(program, "open", lambda *_: None)
    monkeypatch.setattr(program, "continued", lambda self, ids, count: Continued(always * count, 2.0, 0.5))
    _, missing = programs_with(model, [program.name])
    assert missing == {
        program.name: f"give the folder its converter wrote: {program.name}=FOLDER (benchmarks/README.md)"
    }
    with pytest.raises(ValueError, match=r"'llama\.cpp' is no known program"):
        programs_with(model, ["llama.cpp=folder"])
    always[0] = int(model.forward(range(2, 8), last_only=True).argmin())
    with pytest.raises(ValueError, match="folder does not have the weights of"):
        programs_with(model, [f"{program.name}=folder"])
    always[0] = int(model.forward(range(2, 8), last_only=True).argmax())
    made, _ = programs_with(model, [f"{program.name}=folder"])
    assert made[program.name].prefill([2, 3]) == 2.0 and made[program.name].decode(4) == 0.5


def test_times_of_tokens():
    assert timed([1.0, 3.0, 3.5, 4.0]) == (2.0, 0.5)
    assert timed([1.0, 3.0]) == (2.0, 0.0)


def test_what_openvino_lacks_is_said(monkeypatch):
    monkeypatch.setattr("benchmarks.openvino.find_spec", lambda name: None if name == "openvino" else name)
    with pytest.raises(ImportError, match=r"^pip install openvino$"):
        OpenVINO(random_model(LOCAL_GLOBAL))
    monkeypatch.setattr("benchmarks.openvino.find_spec", lambda name: name)
    with pytest.raises(ImportError, match="RecurrentGemma has another"):
        OpenVINO(random_model(RECURRENT))
