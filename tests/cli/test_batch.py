"""`minigemma batch`: every line is answered once, however often the run is stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from minigemma import cli
from minigemma.cli import batch


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def answer(demo_file, tmp_path, capsys):
    """Runs the command on these lines and returns exit code, answers by their line, and stderr."""

    def run(rows, *flags):
        source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
        flags = flags or ("-n", "4", "--temperature", "0")
        code = cli.main(["batch", str(source), str(target), "-m", str(demo_file), *flags])
        rows = read(target) if target.exists() else []
        assert len({row["line"] for row in rows}) == len(rows)
        return code, {row["line"]: row for row in rows}, capsys.readouterr()

    return run


def test_lines_of_both_forms_and_wrong_ones(answer):
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "max_tokens": 3}
    rows = [
        {"prompt": "The capital of France is", "id": "fr"},
        {"prompt": [2, 818, 5279], "max_tokens": 2},
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "x", "prompt": "One, two,"}},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        "{",
        [1],
        {"prompt": "x", "grammar": "a"},
        {"prompt": "x", "temperature": "hot"},
        {"custom_id": "c", "body": {"prompt": "x", "n": 2}},
        {"messages": "x"},
        {},
        {"prompt": "x", "temperature": 10**400},
        {"prompt": [10**30]},
        {"prompt": "x", "logprobs": 2},
        {"custom_id": "d", "method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}},
        {"custom_id": "e", "url": "/v1/chat/completions", "body": {"prompt": "x"}},
        {"temperature": 1, "body": {"prompt": "x"}},
    ]
    code, rows, told = answer(rows)
    assert code == 1
    assert "13 of its lines could not be answered" in told.err
    assert told.out == ""
    assert rows[1] == {
        "line": 1,
        "id": "fr",
        "text": rows[1]["text"],
        "finish_reason": "length",
        "prompt_tokens": 6,
        "generation_tokens": 4,
    }
    assert "Paris" in rows[1]["text"] or rows[1]["text"]
    assert rows[2]["generation_tokens"] == 2
    body = rows[3]["response"]["body"]
    assert (rows[3]["custom_id"], rows[3]["response"]["status_code"], body["object"]) == ("a", 200, "text_completion")
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 4
    assert rows[4]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert "line 5 is not JSON" in rows[5]["error"]
    assert "line 6 is no object" in rows[6]["error"]
    assert "'grammar' is not supported" in rows[7]["error"]
    assert "temperature is 'hot'" in rows[8]["error"]
    assert rows[9]["response"]["status_code"] == 400
    assert "n is 2" in rows[9]["response"]["body"]["error"]["message"]
    assert "messages must be a list" in rows[10]["error"]
    assert "either a prompt or messages" in rows[11]["error"]
    assert "temperature is 1000" in rows[12]["error"] and "token ids must be" in rows[13]["error"]
    assert "logprobs are shown in OpenAI's" in rows[14]["error"]
    told = [rows[number]["response"]["body"]["error"]["message"] for number in (15, 16, 17)]
    assert "line 15 is no POST of a prompt" in told[0] and "line 16 is no POST" in told[1]
    assert told[2] == "line 17 has 'temperature' beside its body; put it inside"


def test_texts_are_those_of_each_alone(answer, demo_file, capsys):
    prompts = ["The capital of France is", "Once upon a time", "2 + 2 ="]
    _, rows, _ = answer([{"prompt": text} for text in prompts])
    for number, text in enumerate(prompts, 1):
        flags = ["-n", "4", "--temperature", "0", "-q", "--exact-logits"]
        cli.main(["generate", text, "-m", str(demo_file), *flags])
        assert rows[number]["text"].strip() == capsys.readouterr().out.strip()


def test_killed_three_times_no_line_is_lost_or_doubled(demo_file, tmp_path):
    count = 36
    source = write(tmp_path / "in.jsonl", [{"prompt": f"Number {i}:", "id": i} for i in range(count)])
    target = tmp_path / "out.jsonl"
    flags = ["-n", "6", "--temperature", "0", "--parallel", "8", "-q"]
    command = [sys.executable, "-m", "minigemma", "batch", str(source), str(target), "-m", str(demo_file), *flags]
    for stop_at in (8, 16, 24):
        process = subprocess.Popen(command)
        while process.poll() is None:
            if target.exists() and target.read_bytes().count(b"\n") >= stop_at:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)
        process.wait()
    with target.open("ab") as file:
        file.write(b'{"line": 35, "te')  # as a kill within a write leaves it
    assert subprocess.run(command, check=False).returncode == 0
    rows = read(target)
    assert sorted(row["id"] for row in rows) == list(range(count))
    assert all(row["line"] == row["id"] + 1 for row in rows)


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "has no lines"),
        (b"\n\n", "has no lines"),
        (b'{"prompt": "\xff"}\n', "is not UTF-8 (near byte 12)"),
    ],
)
def test_an_input_that_cannot_be_read(tmp_path, capsys, content, told):
    (tmp_path / "in.jsonl").write_bytes(content)
    assert cli.main(["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_an_input_that_is_not_there(tmp_path, capsys):
    assert cli.main(["batch", str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")]) == 1
    assert "none.jsonl: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["notes of mine", '{"a": 1}', '{"lines": 1}', '{"line": 1}\nnotes', "x\r"])
def test_a_file_that_no_run_has_written_stays_as_it_is(tmp_path, capsys, content):
    """Its last line has no line break, as one that a kill has cut off."""
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "x"}]), tmp_path / "out.jsonl"
    target.write_bytes(content.encode())
    assert cli.main(["batch", str(source), str(target)]) == 1
    assert "answers no line of this input" in capsys.readouterr().err
    assert target.read_bytes() == content.encode()


def test_answers_go_into_a_file_of_their_own(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"line": 1, "prompt": "x"}')
    for target, told in ((source, "is the input"), (tmp_path, "is no file"), ("-", "is no file")):
        assert cli.main(["batch", str(source), str(target)]) == 1
        assert told in capsys.readouterr().err
    assert source.read_text() == '{"line": 1, "prompt": "x"}'


@pytest.mark.parametrize("old", ['{"line": 1, "id": "other"}', '{"line": 7}', "no JSON", "[1]"])
def test_an_output_of_another_input_stays_as_it_is(tmp_path, capsys, old):
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "x", "id": "own"}]), tmp_path / "out.jsonl"
    write(target, [old])
    assert cli.main(["batch", str(source), str(target)]) == 1
    assert "answers no line of this input" in capsys.readouterr().err
    assert target.read_text() == old + "\n"


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "x"}]), write(tmp_path / "out.jsonl", [{"line": 1}])
    monkeypatch.setattr(batch, "open_model", None)
    assert cli.main(["batch", str(source), str(target)]) == 0
