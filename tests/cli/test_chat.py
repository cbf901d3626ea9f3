"""The chat, from a pipe and at a terminal: commands, texts of several lines, Ctrl-C, history, a full context."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.toy_models import TURN, ToyModel, ToyTokenizer, chaotic

from minigemma.cli import chat
from minigemma.cli.main import main
from minigemma.cli.terminal import Prompt

ROOT = Path(__file__).parents[2]


def toy(context=2000, eos=(1, TURN + 1)):
    """A model that says lower-case letters and ends its turns."""
    tokenizer = ToyTokenizer()
    wild, speakable = chaotic(tokenizer.size), [*tokenizer.encode("abcdefghij"), TURN + 1]

    def rule(history):
        logits = wild(history)
        logits[speakable] += 100
        return logits

    return ToyModel(rule, tokenizer, context, eos=eos)


@pytest.fixture
def converse(monkeypatch, capsys):
    """Type lines into a chat with a toy; what it said on stdout and on stderr."""

    def typed(*lines, flags="--temp 0 -n 12", model=None):
        monkeypatch.setattr(chat, "open_model", lambda *_, **__: model or toy())
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", *flags.split()]) == 0
        return capsys.readouterr()

    return typed


def saved(path):
    return json.loads(path.read_text("utf-8"))


def test_a_block_of_several_lines_is_one_message(converse, tmp_path):
    converse('"""one', "  two", "", 'three"""', '"""', "four", '"""', '"""five"""', f"/save {tmp_path / 'talk'}")
    assert [message["content"] for message in saved(tmp_path / "talk")[::2]] == ["one\n  two\n\nthree", "four", "five"]


def test_a_conversation_is_loaded_and_goes_on(converse, tmp_path):
    converse("hi", f"/save {tmp_path / 'talk'}")
    err = converse(f"/load {tmp_path / 'talk'}", "more", f"/save {tmp_path / 'longer'}").err
    assert f"loaded 2 messages from {tmp_path / 'talk'}" in err
    assert saved(tmp_path / "longer")[:2] == saved(tmp_path / "talk") and len(saved(tmp_path / "longer")) == 4
    assert "no such file" in (err := converse("/load nowhere").err) and "stays as it was" in err


@pytest.mark.parametrize(
    "line, said",
    [
        ("/set temperature 0.7", "temperature is 0.7"),
        ("/set temp=0.7", "temperature is 0.7"),
        ("/set max-new-tokens 3", "max_new_tokens is 3"),
        ("/set temperature default", "temperature is the model's own"),
        ("/set temperature -1", "temperature stays 0.0: -1 is not at least 0"),
        ("/set temperature warm", "temperature stays 0.0: could not convert"),
        ("/set top_k 5", "top_k stays the model's own: top_k has no effect at temperature 0"),
        ("/set warmth 5", "the names are temperature, top_k"),
        ("/set top 5", "the names are temperature, top_k"),
        ("/set seed", "the names are temperature, top_k"),
        ("/set", "max_new_tokens     12"),
        ("/set", "seed               another each time"),
        ("/set parameter temperature 0.7", "temperature is 0.7"),
        ("/sav x", "'/sav x' is no command; did you mean /save?; /help lists them"),
        ("/?", "/help         this list"),
        ("/clear", "forgotten"),
        ("/regenerate", "at temperature 0"),
        ("/system", "give the instruction"),
        ("/image", "give the picture"),
        ("/save", "give a name"),
        ("/load", "give a name"),
        ("/again", "at temperature 0 the answer is always the same"),
        ("/continue", "there is no answer yet"),
        ("/take hi", "'/take hi' is no command"),
        ("/", "'/' is no command"),
    ],
)
def test_commands_say_what_they_did(line, said, converse):
    assert said in converse(line).err


def test_a_setting_holds_for_the_answers_that_follow(converse):
    out = converse("hi", "/set max_new_tokens 2", "hi", model=toy(eos=())).out.split("\n")
    assert len(out[0]) > 2 == len(out[1])


def test_an_answer_cut_short_says_so_and_goes_on(converse):
    whole = converse("hi", model=toy(eos=())).out
    out, err = converse("hi", "/continue", flags="--temp 0 -n 6", model=toy(eos=()))
    assert err.count("the answer was cut at 6 tokens (-n): /continue goes on") == 2
    assert out.replace("\n", "") == whole.strip()


def test_another_answer_takes_the_next_seed(converse, tmp_path):
    out = converse("hi", "/again", "/again", f"/save {tmp_path / 'talk'}", flags="--temp 2 -s 5 -n 12").out.split("\n")
    assert len(set(out[:3])) == 3 and saved(tmp_path / "talk")[1]["content"] == out[2]


def test_a_full_context_offers_to_drop_the_oldest_turns(converse):
    out, err = converse("one", "two", "x" * 150, "/drop", model=toy(context=200))
    [told] = [line for line in err.splitlines() if "holds" in line]
    assert "/reset" in told and "/drop" in told and "-c" in told
    assert "left out the 4 oldest messages, 0 are kept" in err and len(out.split()) == 3, "the message is answered then"
    [told] = [line for line in converse("x" * 300, model=toy(context=200)).err.splitlines() if "holds" in line]
    assert "shorten the message" in told
    assert "the context is full" in converse("hi", flags="--temp 0 -n 500", model=toy(200, eos=())).err


def test_a_message_that_is_too_long_alone_costs_no_conversation(converse, tmp_path):
    err = converse("one", "x" * 300, "/drop", f"/save {tmp_path / 'talk'}", model=toy(context=200)).err
    assert "shorten the message" in err and "left out the 0 oldest messages, 2 are kept" in err
    assert saved(tmp_path / "talk")[0]["content"] == "one"


def test_a_message_that_is_not_utf_8_is_left_out_and_the_conversation_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(chat, "open_model", lambda *_, **__: toy())
    piped = io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9\ntwo\n/quit\nthree\n"), "utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", piped)
    assert main(["chat", "--temp", "0", "-n", "5"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "the message is not UTF-8 (near byte 3); it was not sent" in err


def test_json_has_an_object_for_each_answer_and_each_error(converse):
    out = converse("hi", "x" * 300, "hi", flags="--json --temp 0 -n 3 -q", model=toy(200, eos=())).out
    first, error, second = map(json.loads, out.splitlines())
    assert len(first["tokens"]) == len(first["logprobs"]) == 3 == second["generation_tokens"]
    assert "the context holds 200" in error["error"]


def test_commands_files_and_settings_are_completed(tmp_path, monkeypatch):
    (tmp_path / "talk one.json").write_text("")
    (tmp_path / "folder").mkdir()
    prompt = Prompt(chat.COMMANDS, ("temperature", "top_k", "top_p"))

    def completed(line):
        at = line.rfind(" ") + 1
        prompt.readline = SimpleNamespace(get_line_buffer=lambda: line, get_begidx=lambda: at)
        found = [prompt.complete(line[at:], i) for i in range(20)]
        return found[: found.index(None)]

    assert completed("/re") == ["/reset "] and completed("/s") == ["/system ", "/set ", "/save "]
    assert completed("/set top") == ["top_k ", "top_p "]
    assert completed(f"/load {tmp_path}/") == [f"{tmp_path}/folder/", f"{tmp_path}/talk one.json"]
    assert completed("re") == completed("/reset x") == completed("/set top_k 1") == []


# ------------------------------------------------------------------------------------------------- at a terminal

SCRIPT = """
import sys
from types import SimpleNamespace
sys.path[:0] = ["tests", "tests/text", "tests/cli"]
import importlib.util
spec = importlib.util.spec_from_file_location("cli_test_chat", "tests/cli/test_chat.py")
toys = importlib.util.module_from_spec(spec); spec.loader.exec_module(toys)
from minigemma.cli import chat
from minigemma.cli.main import main
chat.open_model = lambda *_, **__: toys.toy()
sys.exit(main(["chat", "--temp", "0", "-n", "5"]))
"""


class Session:
    """A chat in a terminal of its own."""

    def __init__(self, cache):
        self.master, other = pty.openpty()
        environment = os.environ | {"MINIGEMMA_CACHE": str(cache), "TERM": "xterm", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SCRIPT]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, cwd=ROOT, env=environment, start_new_session=True
        )
        os.close(other)
        self.shown = b""
        self.until("> ")

    def until(self, text, seconds=60):
        """Wait for a text, and forget what was shown up to it."""
        end = time.monotonic() + seconds
        while text.encode() not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 1)[0]:
                self.shown += os.read(self.master, 4096)
        self.shown = self.shown.partition(text.encode())[2]

    def type(self, text):
        os.write(self.master, text.encode())

    def leave(self):
        self.type("\x04")
        assert self.process.wait(30) == 0
        os.close(self.master)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def test_a_terminal_pastes_clears_the_line_and_remembers(tmp_path):
    history = tmp_path / "chat_history"
    history.write_text("/set seed 7\n")
    history.chmod(0o600)
    with Session(tmp_path) as session:
        session.type("\x1b[A\r")  # the last line of the session before
        session.until("seed is 7")
        session.until("> ")
        session.type("\x1b[200~first\nsecond\x1b[201~\r")
        session.until("cut at 5 tokens")
        session.until("> ")
        session.type("never sent")
        session.until("never sent")
        time.sleep(1)  # readline overlooks a signal in the microseconds between an echo and the wait for the next key
        os.killpg(session.process.pid, signal.SIGINT)  # as Ctrl-C does in a terminal of one's own
        session.until("> ")
        session.type(f"/sa\t{tmp_path / 'talk'}\r")
        session.until("saved 2 messages")
        session.until("> ")  # else the end of input may come while no line is read, and be lost
        session.leave()
    assert saved(tmp_path / "talk")[0] == {"role": "user", "content": "first\nsecond"}
    assert "/save" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
