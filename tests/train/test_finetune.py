"""Fine-tuning: what counts of an example, that the adapter learns and loads, resuming, the short head, and errors."""

import json

import numpy as np
import pytest
from support.runs import toy, write_text
from support.tokenizers import ways_in

import minigemma as mg
from minigemma.cli import main
from minigemma.errors import FileError
from minigemma.files.save import save_model
from minigemma.formulas.cross_entropy import Targets
from minigemma.models.backward import Batch, loss
from minigemma.text.prompt import conversation_ids
from minigemma.train import finetune
from minigemma.train.examples import Layout, read_examples
from minigemma.train.initial import initial_parameters

SMALL = {"batch_tokens": 96, "micro_tokens": 64, "seq": 48, "eval_every": 4, "save_every": 100, "held_out": 0.2}


@pytest.fixture
def base(tmp_path):
    config, tokenizer = toy()
    save_model(tmp_path / "base", config, initial_parameters(config, 0), tokenizer, "f32")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    """Sums, most of whose tokens are prompts."""
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"what is {a} + {b}? ", "answer": f"{a + b} indeed"} for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def begin(base, data, out, **more):
    return mg.FineTuning(base, data, out, threads=2, **{"steps": 8, "lr": 0.01} | SMALL | more)


def test_answers_alone_count_and_turns_are_those_of_a_chat(tmp_path):
    tokenizer, path = ways_in()[1], tmp_path / "a.jsonl"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi \n"}]
    turns += [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]
    turns += [{"role": "model", "content": "See you!"}]
    rows = [{"prompt": "One\n", "completion": "\nTwo"}, {"messages": turns}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = read_examples([path], Layout(tokenizer, "gemma3", False, 200), 0.5)
    first, second = (slice(*corpus.documents[i : i + 2, 0]) for i in range(2))
    assert corpus.trained == 1
    assert corpus.ids[first].tolist() == [*tokenizer.encode("One\n"), *tokenizer.encode("\nTwo"), tokenizer.eos]
    assert corpus.counted[first].sum() == len(tokenizer.encode("\nTwo")) + 1
    whole = conversation_ids(tokenizer, "gemma3", turns, add_generation_prompt=False)
    assert [tokenizer.bos, *corpus.ids[second]] == whole[: -len(tokenizer.encode("\n"))]
    end = tokenizer.start_of_turn + 1
    answers = [*tokenizer.encode("Hello."), end, *tokenizer.encode("See you!"), end]
    assert corpus.ids[second][corpus.counted[second] == 1].tolist() == answers
    in_turns = read_examples([path], Layout(tokenizer, "gemma3", True, 200), 0)
    assert in_turns.ids[0] == tokenizer.start_of_turn and in_turns.tokens > corpus.documents[-1, 0]


def test_ten_examples_are_enough(base, tmp_path):
    path = tmp_path / "ten.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}? ", "answer": "yes"}) + "\n" for i in range(10)))
    tuning = mg.FineTuning(base, path, None, steps=2, seq=48, threads=1)
    assert 1 < tuning.corpus.tokens < tuning.settings.batch_tokens and len(list(tuning)) == 2


def test_an_adapter_learns_the_answers_and_loads_as_one(base, data, tmp_path):
    tuning = begin(base, data, tmp_path / "run", steps=40)
    steps = list(tuning)
    assert steps[-1].held_out < steps[3].held_out < 0.9 * steps[0].loss
    model = mg.load(base, adapter=tmp_path / "run")
    ids = [model.tokenizer.bos, *model.tokenizer.encode("what is 3 + 4? ")]
    np.testing.assert_allclose(model.forward(ids), tuning.model.forward(ids), atol=1e-5)
    told = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], len(told["target_modules"])) == (8, 16.0, 7)
    assert np.array_equal(mg.load(base).forward(ids), tuning.base.forward(ids))


def test_the_first_step_sees_the_model_as_it_is_and_all_of_its_head_is_measured(base, data, monkeypatch):
    """A head of the ids that occur predicts no worse; held-out losses are of the whole one."""
    losses = {}
    for frequent in (0, 1 << 20):
        monkeypatch.setattr(finetune, "FREQUENT", frequent)
        tuning = begin(base, data, None)
        losses[frequent], held_out = tuning.step().loss, begin(base, data, None).evaluate()
    assert losses[0] < losses[1 << 20]
    windows = tuning.order.take(0, 96)
    ids, following, starts = tuning.corpus.inputs(windows, tuning.tokenizer.bos)
    weights = tuning.corpus.weights(windows)[:, None]
    model = mg.load(base, "f32")
    expected = loss(model, Batch(ids, starts), Targets(following[:, None], weights)).sum() / weights.sum()
    assert losses[1 << 20] == pytest.approx(expected, rel=1e-5)
    some = tuning.corpus.windows(48, held_out=True)
    ids, following, starts = tuning.corpus.inputs(some, tuning.tokenizer.bos)
    weights = tuning.corpus.weights(some)[:, None]
    expected = loss(model, Batch(ids, starts), Targets(following[:, None], weights)).sum() / weights.sum()
    assert held_out == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", [{}, {"full": True}])
def test_a_run_resumed_half_way_equals_one_that_was_not_stopped(base, data, tmp_path, how):
    whole = begin(base, data, tmp_path / "whole", **how)
    list(whole)
    half = begin(base, data, tmp_path / "half", **how)
    for _ in range(3):
        half.step()
    half.save()
    again = mg.FineTuning.resume(tmp_path / "half")
    assert [step.number for step in again] == [4, 5, 6, 7, 8]
    for name in ("weights", "means", "squares"):
        np.testing.assert_array_equal(getattr(again.adam, name), getattr(whole.adam, name))
    assert (again.lora is None) == bool(how)


def test_text_trains_on_every_token_and_modules_can_be_chosen(base, tmp_path):
    lora = mg.Lora(rank=2, alpha=4, modules=("q_proj", "v_proj"))
    tuning = begin(base, write_text(tmp_path), tmp_path / "run", lora=lora, steps=2)
    assert tuning.corpus.counted is None and len(tuning.adam.parameters) == 8
    list(tuning)
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match="no module 'w'; its linear maps are down_proj"):
        begin(base, write_text(tmp_path), None, lora=mg.Lora(modules=("w",)))


def test_the_command_trains_stops_resumes_and_merges(base, data, tmp_path, capsys):
    out, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    flags = ["--rank", "4", "--alpha", "8", "--target-modules", "q_proj,down_proj", "--lr", "0.01", "--seq", "48"]
    flags += ["--batch-tokens", "96", "-t", "2"]
    begun = ["finetune", "-m", str(base), "--data", str(data), "--out", out, "--steps", "6", "--stop-after", "3"]
    assert main([*begun, *flags]) == 0
    assert "minigemma finetune --resume --out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--resume", "--out", out, "--rank", "3"])
    assert "--rank cannot change" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--out", out, "--merge", merged, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"]
    ids = np.arange(4, 40)
    expected = mg.load(base, adapter=out).forward(ids)
    np.testing.assert_allclose(mg.load(merged).forward(ids), expected, atol=1e-4 * abs(expected).max())
    assert main(["train", "--resume", "--out", out]) == 1
    assert "is a run of `minigemma finetune`; resume it with that" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "-m", str(base), "--out", out, "--steps", "3"])
    assert "--data is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lines, problem",
    [
        (['{"prompt": "a", "answer": "b"}', ""], "line 2 is empty"),
        (['{"prompt": "a", "answer": "b"}', "{"], "line 2 is not JSON"),
        (['{"prompt": "a", "answer": " "}'], "line 1 has no text in 'prompt' and 'answer'"),
        (['{"question": "a", "answer": "b"}'], 'but {"question": "a", "answer": "b"}'),
        (['{"messages": [{"role": "user", "content": "a"}]}'], "do not end with an answer"),
        (['{"messages": 3}'], "no list of turns"),
        (['{"messages": [{"role": "model", "content": "a"}]}'], "in which the user says nothing"),
        (['{"prompt": "text", "answer": "b"}', "{"], "line 2 is not JSON"),
        ([], "has no example"),
        (['{"prompt": "a", "answer": "%s"}' % ("b c " * 40)], "tokens, and a window 48"),
        (['["a", "b"]'], 'line 1 is ["a", "b"]'),
        (['{"prompt": "a", "answer": "b"}'], "fewer than a batch"),
    ],
)
def test_bad_examples_are_named_by_their_line(base, tmp_path, lines, problem):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(FileError) as error:
        begin(base, path, tmp_path / "run")
    assert problem in str(error.value) and str(path) in str(error.value) and not (tmp_path / "run").exists()
