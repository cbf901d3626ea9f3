"""Answers of a given form, from a model that knows no form at all."""

import json
import re
import sys

import pytest
from support.toy_models import TURN, letters, talker

import minigemma as mg
from minigemma.text.generation import stream_generate

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}
LONG = {"max_new_tokens": 150, "temperature": 2.0}


@pytest.fixture(autouse=True)
def library(request):
    if "missing" not in request.node.name:
        pytest.importorskip("llguidance", reason="the extra [structured]")


def said(model, **settings):
    pieces = list(stream_generate(model, "Hello", **{**LONG, **settings}))
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason


@pytest.mark.parametrize("seed", range(8))
def test_json_follows_its_schema(seed):
    text, reason = said(talker(), json_schema=SCHEMA, seed=seed)
    found = json.loads(text)
    assert reason == "stop" and list(found) == ["name", "age", "ok"]
    assert isinstance(found["age"], int) and len(found["name"]) <= 8
    assert said(talker(), json_schema=json.dumps(SCHEMA), seed=seed) == (text, reason)


@pytest.mark.parametrize("seed", range(4))
def test_a_text_matches_its_expression_as_a_whole(seed):
    text, reason = said(talker(), regex=r"[a-c]{2,5}-\d{3}", seed=seed)
    assert reason == "stop" and re.fullmatch(r"[a-c]{2,5}-\d{3}", text)


def test_one_of_some_choices():
    choices = ["yes", 'no "really"', "naïve 🙂\n"]
    found = {said(talker(), choices=choices, seed=seed)[0] for seed in range(30)}
    assert found == set(choices)


def test_an_answer_that_is_cut_says_so_and_is_a_beginning():
    text, reason = said(talker(), choices=["a long answer"], max_new_tokens=5)
    assert (text, reason) == ("a lon", "length")


def test_a_chat():
    model = letters(context=500)
    chat = mg.Chat(model, choices=["one", "two"], **LONG)
    assert {chat.send("x"), chat.send("y")} <= {"one", "two"}
    list(chat.stream("x", max_new_tokens=1))
    with pytest.raises(ValueError, match="cannot be continued"):
        chat.go_on()


def test_a_model_with_several_ends_may_use_each():
    model = letters(eos=(1, TURN + 1))
    assert said(model, regex="[a-j]+", max_new_tokens=400)[1] == "stop"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"json_schema": {"type": "strin"}}, "json_schema cannot be used: Invalid type: strin$"),
        ({"json_schema": {"unevaluatedItems": False}}, "cannot be used: Unimplemented keys"),
        ({"json_schema": "{'a'}"}, "json_schema is not JSON"),
        ({"json_schema": "[]"}, "json_schema is list; it must be an object"),
        ({"json_schema": {"const": float("nan")}}, "json_schema cannot be used: expected value"),
        ({"json_schema": 5}, "json_schema is int"),
        ({"regex": "(a"}, "regex cannot be used: .*unclosed group"),
        ({"regex": ""}, "regex must be a text that is not empty"),
        ({"choices": "yes"}, "choices must be a list"),
        ({"choices": []}, "choices must be a list"),
        ({"choices": ["a", ""]}, "choices must be a list"),
    ],
)
def test_a_form_that_is_none_is_refused_at_once_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as found:
        stream_generate(talker(), "Hello", **settings)
    assert "\n" not in str(found.value)


def test_a_model_without_an_end_is_refused():
    with pytest.raises(ValueError, match="no token that ends a text"):
        stream_generate(letters(eos=()), "Hello", choices=["a"])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"choices takes llguidance, .*pip install 'minigemma\[structured\]'"):
        stream_generate(talker(), "Hello", choices=["a"])
