"""The command line with a stand-in for the model: which flag reaches what, what goes to which stream, exit codes."""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support.calls import Terminal, run

import minigemma.text.chat
from minigemma.cli import chat, generate, inspect, opening, score
from minigemma.cli.main import main
from minigemma.cli.progress import COMPILED, Progress, share_done
from minigemma.kernels import peaks
from minigemma.models.registry import RELEASED
from minigemma.text import generation
from minigemma.text.generation import Token
from minigemma.text.processors import Steering


class Tokenizer:
    """One token per character; ids are code points."""

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


@pytest.fixture
def calls(monkeypatch):
    """Put stand-ins where the commands import the library from, and record what they were given."""
    unused = {"vision": False, "mmproj": None, "context": None, "force": False, "adapter": []}
    seen = SimpleNamespace(unused=unused, instruction_tuned=False, pieces=["Hel", "lo"], error=None)

    def load(name, dtype=None, **flags):
        flags.pop("progress")(50, 100)
        flags["dtype"] = dtype
        seen.load = (name, flags)
        seen.model = SimpleNamespace(
            config=RELEASED["gemma-3-270m"],
            tokenizer=Tokenizer(),
            name="toy",
            instruction_tuned=seen.instruction_tuned,
            vision=None,
            foreign_turns="",
        )
        return seen.model

    def look_at(model, images, pan_and_scan, notes):
        seen.images, seen.pan_and_scan = images, pan_and_scan
        notes("turned upright")
        return SimpleNamespace(crops=(0,) * len(images))

    def stream_generate(model, prompt, images, **settings):
        seen.prompt, seen.settings = prompt, settings
        for at, text in enumerate(seen.pieces):
            end = "length" if at == len(seen.pieces) - 1 else None
            yield Token(text, at, -1.0, end, len(prompt), at + 1, 100.0, 10.0)
        if seen.error:
            raise seen.error

    def text_ids(tokenizer, text, vision=None, images=(), control=False):
        return [2, *map(ord, text)]

    def conversation_ids(tokenizer, family, messages, vision):
        return [2, *(ord(c) for m in messages for c in f"[{m['role']}]{m['content']}")]

    def score_ids(model, ids, stride):
        return SimpleNamespace(logprobs=[-0.5] * (len(ids) - 1), perplexity=1.6487)

    class Chat:
        save = minigemma.text.chat.Chat.save

        def __init__(self, model, system=None):
            self.model, self.system, self.messages = model, system, []

        def reset(self, system=None):
            self.messages, self.system = [], system
            seen.system = system

        def stream(self, text, images, **settings):
            seen.settings = settings
            self.messages += [{"role": "user", "content": text}, {"role": "model", "content": "Hello"}]
            yield from stream_generate(self.model, text, images, **settings)

    monkeypatch.setattr(opening, "load", load)
    monkeypatch.setattr(opening, "look_at", look_at)
    monkeypatch.setattr(generate, "stream_generate", stream_generate)
    monkeypatch.setattr(generation, "text_ids", text_ids)
    monkeypatch.setattr(generation, "conversation_ids", conversation_ids)
    monkeypatch.setattr(score, "text_ids", text_ids)
    monkeypatch.setattr(score, "score", score_ids)
    monkeypatch.setattr(chat, "Chat", Chat)
    return seen


def test_the_answer_alone_is_on_stdout(calls, capsys):
    assert main(["generate", "Once"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello\n"
    assert "prompt 5 tokens" in err and "answer 2 tokens" in err and "ended by length" in err and err.count("\n") == 1


def test_quiet_leaves_stderr_empty(calls, capsys):
    assert main(["generate", "Once", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_an_answer_that_ends_its_line_gets_no_second_newline(calls, capsys):
    calls.pieces = ["Hello\n"]
    main(["generate", "Once"])
    assert capsys.readouterr().out == "Hello\n"


def test_images_are_looked_at_and_what_is_done_to_them_is_said(calls, capsys):
    flags = "--image x.png --image y.jpg --pan-and-scan --mmproj eyes.gguf"
    assert main(["generate", "Once", *flags.split()]) == 0
    assert calls.images == ["x.png", "y.jpg"]
    assert calls.pan_and_scan.max_crops == 4
    assert calls.load[1]["vision"] and calls.load[1]["mmproj"] == "eyes.gguf"
    assert "minigemma: turned upright" in capsys.readouterr().err
    assert main(["generate", "Once", "--image", "x.png", "-q"]) == 0
    assert calls.pan_and_scan is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("source", ["positional", "-p", "-f", "-", "-p -"])
def test_every_source_gives_the_same_prompt(source, calls, monkeypatch, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Née\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Née\n".encode())))
    words = {"positional": ["Née\n"], "-p": ["-p", "Née\n"], "-f": ["-f", str(file)], "-": ["-"], "-p -": ["-p", "-"]}
    assert main(["generate", *words[source]]) == 0
    assert calls.prompt == [2, *map(ord, "Née\n")]


def test_flags_reach_the_library(calls):
    machine = "-m there -t 1 --dtype int8"
    flags = "-n 7 --temp 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 -s 11 --stop a --stop b"
    assert main(["generate", "Once", *machine.split(), *flags.split()]) == 0
    assert calls.load == ("there", {"dtype": "int8", "threads": 1} | calls.unused)
    assert calls.settings == {
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 11,
        "stop": ["a", "b"],
        "exact_logits": False,
    }


def test_flags_that_steer_reach_the_library(calls, tmp_path, capsys):
    flags = (
        "--repetition-penalty 1.2 --frequency-penalty 0.5 --presence-penalty -1 --logit-bias 5-2.5 --logit-bias 7-inf"
    )
    assert main(["generate", "Once", *flags.split(), "--choice", "a", "--choice", "b c"]) == 0
    assert {name: value for name, value in calls.settings.items() if name in Steering.__annotations__} == {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": -1,
        "logit_bias": {5: -2.5, 7: -np.inf},
        "choices": ["a", "b c"],
    }
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    main(["generate", "Once", "--json", "--top-logprobs", "2", "--json-schema", str(schema)])
    assert calls.settings["json_schema"] == {"type": "object"} and calls.settings["top_logprobs"] == 2
    schema.write_text("{")
    assert main(["generate", "Once", "--json-schema", str(schema)]) == 1
    assert str(schema) in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--logit-bias 5", "5 is no id with what is added to its logit, such as 1234-2.5"),
        ("--logit-bias 5+x", "could not convert|invalid bias value"),
        ("--repetition-penalty 0", "0 is not above 0"),
        ("--regex a --choice b", "not allowed with argument --regex"),
        ("--top-logprobs 3", "--top-logprobs goes with --json"),
    ],
)
def test_wrong_flags_that_steer_are_wrong_usage(flags, told, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "Once", *flags.split()])
    assert re.search(told, capsys.readouterr().err)


def test_sampling_is_left_to_the_library_unless_flags_say_otherwise(calls, monkeypatch, capsys):
    main(["generate", "Once"])
    assert calls.settings["temperature"] is None and calls.settings["top_k"] is None
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    main(["chat"])
    assert [calls.settings[name] for name in ("temperature", "top_k", "top_p")] == [None, None, None]


def test_instruction_tuned_models_get_turns_unless_raw(calls):
    calls.instruction_tuned = True
    main(["generate", "Hi", "--system", "Be brief"])
    assert calls.prompt == [2, *map(ord, "[system]Be brief[user]Hi")]
    main(["generate", "Hi", "--raw"])
    assert calls.prompt == [2, *map(ord, "Hi")]


def test_a_system_text_without_turns_is_refused(calls, capsys):
    assert main(["generate", "Hi", "--system", "Be brief"]) == 1
    assert "pretrained only" in capsys.readouterr().err


def test_the_context_is_the_models_or_what_c_asks_for(calls, capsys):
    main(["generate", "Once"])
    assert calls.model.config.context == 32_768
    main(["generate", "Once", "-c", "10"])
    assert calls.model.config.context == 10
    assert main(["generate", "Once", "-c", "40000"]) == 1
    assert "32,768 tokens and -c asks for 40,000" in capsys.readouterr().err


def test_json_is_one_object(calls, capsys):
    assert main(["generate", "Once", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == "Hello" and report["tokens"] == [0, 1] and report["finish_reason"] == "length"


def test_score_prints_perplexity_and_each_token_when_verbose(calls, capsys):
    assert main(["score", "ab", "-v"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  -0.5000  'a'",
        "  -0.5000  'b'",
        "perplexity 1.6487 over 2 tokens",
    ]
    main(["score", "ab", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "perplexity": 1.6487,
        "tokens": 2,
        "logprobs": [["a", -0.5], ["b", -0.5]],
    }


def test_ctrl_c_exits_130(calls, capsys):
    calls.error = KeyboardInterrupt()
    assert main(["generate", "Once"]) == 130
    assert capsys.readouterr().out.startswith("Hello")


def test_an_error_is_one_line_and_debug_shows_where(calls, capsys):
    calls.error = KeyError("wrong\nthing")
    assert main(["generate", "Once", "-m", "here"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("minigemma: here: KeyError") and err.count("\n") == 1
    with pytest.raises(KeyError):
        main(["generate", "Once", "--debug"])


@pytest.mark.parametrize(
    "words",
    [
        "",
        "generate",
        "generate a -p b",
        "generate a -f b",
        "generate a --temp -1",
        "generate a --temp nan",
        "generate a --top-p 0",
        "generate a --top-p 1.1",
        "generate a --top-k 0",
        "generate a --top-k 5 --temp 0",
        "generate a --raw --turns",
        "generate a --stream",
        "generate a --min-p 2",
        "generate a -n 0",
        "generate a -n 1.5",
        "generate a -t 0",
        "generate a -s -1",
        "generate a -s 18446744073709551616",
        "generate a --dtype fp8",
        "generate a --stop=",
        "chat --raw",
        "chat --stream",
        "bench -r 0",
        "download",
    ],
)
def test_wrong_usage_exits_2_before_anything_is_loaded(words, calls, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2 and not hasattr(calls, "load")
    assert "usage: minigemma" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- chat


def converse(monkeypatch, *lines, flags=()):
    """Type lines into a chat."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", *flags])


def test_chat_answers_each_line_and_leaves_at_the_end_of_input(calls, monkeypatch, capsys):
    assert converse(monkeypatch, "hi", "", "and you?") == 0
    assert capsys.readouterr().out == "Hello\nHello\n"
    assert calls.prompt == "and you?"


def test_chat_warns_about_a_pretrained_model_alone(calls, monkeypatch, capsys):
    converse(monkeypatch)
    assert "pretrained only" in capsys.readouterr().err
    calls.instruction_tuned = True
    converse(monkeypatch)
    assert "pretrained only" not in capsys.readouterr().err


def test_chat_saves_and_resets(calls, monkeypatch, tmp_path, capsys):
    file = tmp_path / "talk.json"
    converse(
        monkeypatch, "hi", f"/save {file}", "/system Be brief", f"/save {tmp_path / 'empty.json'}", "/exit", "more"
    )
    assert json.loads(file.read_text()) == [{"role": "user", "content": "hi"}, {"role": "model", "content": "Hello"}]
    assert json.loads((tmp_path / "empty.json").read_text()) == [] and calls.system == "Be brief"
    assert capsys.readouterr().out == "Hello\n"  # nothing after /exit


def test_chat_names_an_unknown_command_and_goes_on(calls, monkeypatch, capsys):
    assert converse(monkeypatch, "/rest", "hi") == 0
    out, err = capsys.readouterr()
    assert "'/rest' is no command" in err and "/reset" in err and out == "Hello\n"


def test_chat_cannot_save_and_goes_on(calls, monkeypatch, tmp_path, capsys):
    assert converse(monkeypatch, "hi", f"/save {tmp_path / 'no' / 'talk.json'}", "hi") == 0
    out, err = capsys.readouterr()
    assert "nothing was saved" in err and out == "Hello\nHello\n"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(calls, monkeypatch, capsys):
    calls.error = KeyboardInterrupt()
    assert converse(monkeypatch, "hi", "again") == 0
    assert capsys.readouterr().out.split() == ["Hello", "Hello"]


# ------------------------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize(
    "stream, quiet, compiling, said",
    [
        (Terminal, False, False, ["loading x …", "\r\x1b[K"]),
        (Terminal, False, True, ["minigemma: compiling", "once", "loading x …", "\r\x1b[K"]),
        (Terminal, True, True, []),
        (io.StringIO, False, False, []),
        (io.StringIO, False, True, ["minigemma: compiling", "once"]),
    ],
)
def test_a_wait_of_more_than_a_second_is_explained(stream, quiet, compiling, said, monkeypatch):
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(quiet) as progress:
        progress("loading x")
        time.sleep(0.3)
        assert err.getvalue() == "", "a short wait needs no word"
        progress.compilations = SimpleNamespace(count=int(compiling), duration=0.0, latest=-100.0)
        progress.since -= 2
        time.sleep(0.3)
    text = err.getvalue()
    assert bool(text) == bool(said)
    places = [text.index(part) for part in said]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "done, total, spent, said",
    [
        (0, 10, 5, "0 %"),
        (1, 4, 0.5, "25 %"),
        (1, 4, 20, "25 %, 60 s left"),
        (1, 4, 200, "25 %, 10 min left"),
        (4, 4, 20, "100 %"),
        (0, 0, 20, "0 %"),
        (200, 130, 0, "99 %"),
    ],
)
def test_how_much_is_done_and_how_long_the_rest_takes(done, total, spent, said):
    assert share_done(done, total, time.monotonic() - spent) == said


def test_a_prompt_shows_how_far_it_is_on_a_terminal_alone(calls, monkeypatch):
    main(["generate", "Once"])
    assert "progress" not in calls.settings
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    main(["generate", "Once"])
    assert "progress" in calls.settings


def test_kernels_that_are_compiled_are_counted(monkeypatch):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(quiet=False)
    progress("loading x")
    progress.compilations = SimpleNamespace(count=COMPILED // 2, duration=30.0, latest=time.perf_counter())
    progress.say()
    assert "loading x (kernels: 50 %, 30 s left) …" in err.getvalue()


def test_numba_compiling_a_kernel_is_noticed():
    import numba

    progress = Progress(quiet=True)
    progress.watch_compiler()
    assert progress.compiled() == (0, 0)
    numba.njit(lambda x: x + 1)(1)
    count, seconds = progress.compiled()
    assert count and 0 < seconds < 10


def test_more_threads_than_cores_are_cut_with_a_word(calls, capsys):
    assert main(["generate", "Once", "-t", "5000"]) == 0
    assert 1 <= calls.load[1]["threads"] < 5000 and "5000 threads" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- inspect


@pytest.fixture
def described(monkeypatch, tmp_path):
    """A file that claims to hold Gemma 3 1B in bf16."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 1000)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (6912, 1152), 6912 * 1152 * 2) for i in range(26)}
    tensors["model.norm.weight"] = ("BF16", (1152,), 2304)
    about = SimpleNamespace(
        config=RELEASED["gemma-3-1b"],
        files=(file,),
        tensors=tensors,
        held={name: ("bf16", size) for name, (_, _, size) in tensors.items()},
        weight_bytes=2_000_000_000,
        instruction_tuned=True,
    )
    monkeypatch.setattr(inspect, "describe", lambda path, dtype=None, mmproj=None: about)
    monkeypatch.setattr(inspect, "resolve", lambda name: file)
    return file


def test_inspect_adds_up_weights_and_cache(described, capsys):
    assert main(["inspect", "--json", "-c", "4096"]) == 0
    report = json.loads(capsys.readouterr().out)
    # 22 local layers keep 512 tokens, 4 global ones all 4,096; keys and values, 1 head of 256, two bytes each
    cache = (22 * 512 + 4 * 4096) * 2 * 256 * 2
    assert report["memory"] == {"weights": 2_000_000_000, "cache": cache, "total": 2_000_000_000 + cache}
    assert report["pattern"] == "lllllg" * 4 + "ll" and report["kind"] == "instruction-tuned"
    assert report["tensors"][0]["count"] == 26 and report["tensors"][0]["bytes"] == 26 * 6912 * 1152 * 2
    assert report["tensors"][0]["runs_as"] == "bf16" and report["tensors"][0]["memory"] == 26 * 6912 * 1152 * 2
    assert round(report["parameters"] / 1e6) == 1000 and report["embedding_parameters"] == 262_144 * 1152


@pytest.mark.parametrize("forced", [False, True])
def test_inspect_tells_which_kernels_run(forced, monkeypatch, capsys):
    if forced:
        monkeypatch.setenv("MINIGEMMA_CPU", "generic")
    monkeypatch.setattr(peaks, "PEAKS", dict.fromkeys(peaks.PEAKS, lambda: 123e9))
    assert main(["inspect", "--cpu"]) == 0
    out = capsys.readouterr().out
    assert "peak, 8-bit integers        123 GFLOP/s" in out
    assert ("MINIGEMMA_CPU=generic" in out) == forced
    assert main(["inspect", "--cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["regions"] in ("omp", "tbb", "workqueue")


def test_inspect_for_people(described, capsys):
    assert main(["inspect"]) == 0
    out = capsys.readouterr().out
    for part in [f"{described}  1.0 kB", "26 × BF16", "model.layers.*.mlp.up_proj.weight", "cache of 32,768 tokens"]:
        assert part in out


# ----------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_imports_no_numerical_library(words):
    program = (
        "import sys; from minigemma.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "sys.exit(', '.join({'numpy', 'numba', 'llvmlite', 'sentencepiece', 'PIL'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("usage: minigemma", "minigemma "))


def test_python_m_minigemma_is_the_command():
    assert run("--version").stdout.startswith("minigemma ")
    assert run().returncode == 2


def test_a_closed_pipe_ends_quietly(demo_file):
    shell = f"{sys.executable} -m minigemma generate 'Once upon a time' -n 5 -q | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_ctrl_c_that_gets_lost_in_compiled_code_is_raised_all_the_same(calls, monkeypatch, capsys):
    """As where Python calls back from a destructor: the exception is printed by the interpreter and goes no further."""

    class Swallowed(list):
        def __iter__(self):
            for text in ("Hel", "lo", " you"):
                if text == "lo":
                    with contextlib.suppress(KeyboardInterrupt):
                        signal.raise_signal(signal.SIGINT)
                yield text

        def __len__(self):
            return 3

    calls.pieces = Swallowed()
    assert main(["generate", "Once"]) == 130
    assert capsys.readouterr().out == "Hel"


def test_an_interrupted_process_exits_130_without_a_traceback():
    command = [sys.executable, "-m", "minigemma", "generate", "Once upon a time", "-n", "5000", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(10)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"\n")
