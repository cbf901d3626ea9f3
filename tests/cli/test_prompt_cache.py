"""--prompt-cache: what was read once is not read again, and the answer is the same; --draft."""

import io
import json
import sys

import pytest

from minigemma.cli import main

GREEDY = ("-n", "3", "--temperature", "0", "--json", "--raw")


@pytest.fixture
def answer(demo_file, tmp_path, capsys):
    """Runs `generate` with a cache file: text, tokens that were in it, how long it is then."""

    def run(text, *flags):
        path = tmp_path / "x.cache"
        code = main(["generate", text, "-m", str(demo_file), "--prompt-cache", str(path), *GREEDY, *flags])
        told = capsys.readouterr()
        assert code == 0, told.err
        report = json.loads(told.out)
        return report["text"], report["cached_tokens"], report["prompt_tokens"]

    return run


def test_the_beginning_that_fits_is_used_and_written_back(answer, demo_file, capsys, tmp_path):
    first = answer("One, two, three, four")
    assert first[1:] == (0, 8)
    assert answer("One, two, three, four") == (first[0], 7, 8)
    assert answer("One, two, three, four, five", "--draft", "prompt")[1:] == (7, 10)
    assert answer("One, two, six")[1] == 5
    assert answer("Nothing of it")[1] == 1  # <bos>
    (tmp_path / "x.cache").write_bytes(b"x" * 100)
    assert main(["generate", "One", "-m", str(demo_file), "--prompt-cache", str(tmp_path / "x.cache")]) == 1
    told = capsys.readouterr()
    assert "x.cache" in told.err and told.err.count("\n") == 1 and not told.out


def test_a_chat_reopens(demo_file, tmp_path, monkeypatch, capsys):
    def talk(text, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        path = str(tmp_path / "talk.cache")
        assert main(["chat", "-m", str(demo_file), "-n", "3", "--temp", "0", "--prompt-cache", path, "-q", *flags]) == 0
        return capsys.readouterr().out

    together = talk("Hello\nAnd you?\n/exit\n")
    (tmp_path / "talk.cache").unlink()
    assert talk("Hello\n") + talk("And you?\n") == together
    assert talk("") == ""
    with pytest.raises(AssertionError):
        talk("", "--system", "Be brief")
    assert "has another system text; leave --system out" in capsys.readouterr().err
