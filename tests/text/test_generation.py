"""Generation with a toy in place of the model, whose next token is a function of all tokens before it."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from support.toy_models import BYTES, TURN, ToyModel, ToyTokenizer, chaotic, scripted, talker

import minigemma as mg
from minigemma.formulas.sampling import log_softmax
from minigemma.models.decoder import PREFILL_CHUNK
from minigemma.text.generation import prompt_ids, sampler_for, stream_generate
from minigemma.text.prompt import conversation_ids, text_ids
from minigemma.text.scoring import score


def saying(*pieces, end=True, **flags):
    """A model that answers the prompt "?" with these pieces, a token each, and then ends its turn."""
    tokenizer = ToyTokenizer(pieces)
    ids = list(range(TURN + 2, tokenizer.size)) + [TURN + 1] * end
    return ToyModel(scripted(ids, tokenizer.size, 2), tokenizer, **flags)


def continued(model, ids, count):
    """What greedy decoding is: the argmax, appended, again."""
    ids = list(ids)
    for _ in range(count):
        allowed = model.rule(ids).astype(np.float32)
        allowed[[*model.banned, *range(model.vocab_limit, len(allowed))]] = -np.inf
        ids.append(int(np.argmax(allowed)))
    return ids[-count:]


# --------------------------------------------------------------------------------------------------------- tokens


def test_greedy_generation_is_argmax_again_and_again():
    model = talker(eos=())
    pieces = list(stream_generate(model, "Hello", max_new_tokens=20, temperature=0))
    expected = continued(model, [2, *model.tokenizer.encode("Hello")], 20)
    assert [p.token for p in pieces] == expected
    assert "".join(p.text for p in pieces) == model.tokenizer.decode(expected)
    assert mg.generate(model, "Hello", max_new_tokens=20, temperature=0) == model.tokenizer.decode(expected)


def test_logprobs_are_the_models_own_at_any_temperature_and_those_of_score():
    model = talker(eos=(), banned=(70, 71), limit=200)
    settings = {"temperature": 3.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 4}
    pieces = list(stream_generate(model, "Hi", max_new_tokens=15, **settings))
    ids = text_ids(model.tokenizer, "Hi")
    history = list(ids)
    for piece in pieces:
        own = log_softmax(model.rule(history)[None].astype(np.float32))[0, piece.token]
        assert piece.logprob == pytest.approx(own, abs=1e-5)
        history.append(piece.token)
    scored = score(model, [*ids, *(p.token for p in pieces)]).logprobs[-len(pieces) :]
    np.testing.assert_allclose([p.logprob for p in pieces], scored, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_banned_ids_and_rows_without_a_token_are_never_chosen(temperature):
    wanted = np.zeros(300, np.float32)
    wanted[[50, 260, 299]] = 30  # a banned one, and two that no token has
    model = ToyModel(lambda history: wanted, ToyTokenizer(), eos=(), banned=(50,), limit=200)
    tokens = {p.token for p in stream_generate(model, "?", max_new_tokens=60, temperature=temperature, seed=1)}
    assert 50 not in tokens and max(tokens) < 200


def test_a_seed_gives_the_same_text_again():
    model, settings = talker(eos=()), {"max_new_tokens": 30, "temperature": 2.0}
    first = mg.generate(model, "x", seed=7, **settings)
    assert first == mg.generate(model, "x", seed=7, **settings) != mg.generate(model, "x", seed=8, **settings)
    assert mg.generate(model, "x", seed=2**64, **settings)


def test_a_text_gets_bos_and_ids_are_taken_as_they_are():
    model = talker()
    caches = [model.new_cache(50) for _ in range(4)]
    prompts = ["é", "", [9, 8], np.array([9, 8])]
    for cache, prompt in zip(caches, prompts, strict=True):
        next(stream_generate(model, prompt, cache=cache, temperature=0))
    assert [c.ids.tolist() for c in caches] == [[2, BYTES + 0xC3, BYTES + 0xA9], [2], [9, 8], [9, 8]]


# ------------------------------------------------------------------------------------------------- how it ends


def test_the_reason_stands_on_the_last_piece_only():
    pieces = list(stream_generate(saying("a", "b"), "?", temperature=0))
    assert [(p.text, p.finish_reason) for p in pieces] == [("a", None), ("b", None), ("", "stop")]
    pieces = list(stream_generate(saying("a", "b"), "?", max_new_tokens=2, temperature=0))
    assert [(p.text, p.finish_reason) for p in pieces] == [("a", None), ("b", "length")]


def test_an_end_token_that_has_letters_does_not_show_them():
    model = saying("a", "THE END", "b")
    model.eos = (TURN + 3,)
    assert mg.generate(model, "?", temperature=0) == "a"


def test_prompt_and_answer_fill_the_context_exactly():
    model = talker(eos=(), context=12)
    pieces = list(stream_generate(model, [2] * 9, max_new_tokens=100, temperature=0))
    assert len(pieces) == 3 and pieces[-1].finish_reason == "length"


@pytest.mark.parametrize("length", [12, 13, 40])
def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(length):
    with pytest.raises(ValueError, match=rf"the prompt has {length} tokens and the context holds 12\b"):
        stream_generate(talker(context=12), [2] * length, temperature=0)


def test_a_small_cache_ends_the_answer_or_is_refused():
    model = talker(eos=())
    pieces = list(stream_generate(model, [2] * 5, cache=model.new_cache(7), temperature=0))
    assert len(pieces) == 2 and pieces[-1].finish_reason == "length"
    with pytest.raises(ValueError, match=r"the prompt has 7 tokens and the cache holds 7\b"):
        stream_generate(model, [2] * 7, cache=model.new_cache(7), temperature=0)


# ------------------------------------------------------------------------------------------------------------ text


def splits(text):
    """All ways to cut a text into pieces."""
    for cuts in product([False, True], repeat=len(text) - 1):
        pieces = [text[0]]
        for letter, cut in zip(text[1:], cuts, strict=True):
            if cut:
                pieces.append(letter)
            else:
                pieces[-1] += letter
        yield pieces


@pytest.mark.parametrize(
    "text, stop",
    [
        ("xySTOPz", ["STOP"]),
        ("xySTOz", ["STOP"]),
        ("STSTOPz", ["STOP"]),
        ("xaaab", ["aab"]),
        ("xySTO", ["STOP"]),
        ("one two", ["two", "e t"]),
        ("abcdefg", ["cdefgh", "de"]),
        ("a\n\nb", "\n\n"),
        ("ü–🙂e", ["–🙂"]),
    ],
)
def test_a_stop_string_ends_the_text_however_it_is_cut_into_pieces(text, stop):
    stops = [stop] if isinstance(stop, str) else stop
    for pieces in splits(text):
        # Among several, the one that is complete first ends it; within one piece, the one that begins first.
        ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
        expected = text
        for end in ends:
            found = [text[:end].find(s) for s in stops if s in text[:end]]
            if found:
                expected = text[: min(found)]
                break
        shown, reasons = "", []
        for piece in stream_generate(saying(*pieces), "?", stop=stop, temperature=0):
            shown += piece.text
            reasons.append(piece.finish_reason)
            assert expected.startswith(shown), (pieces, shown)
        assert shown == expected, pieces
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_only_what_may_become_a_stop_string_is_held_back():
    texts = [p.text for p in stream_generate(saying("ab", "S", "T", "x", "ST"), "?", stop=["STOP"], temperature=0)]
    assert texts == ["ab", "", "", "STx", "", "ST"]


def test_held_text_is_shown_when_the_length_ends_it():
    pieces = list(stream_generate(saying("ab", "ST"), "?", stop=["STOP"], max_new_tokens=2, temperature=0))
    assert [(p.text, p.finish_reason) for p in pieces] == [("ab", None), ("ST", "length")]


def test_characters_come_whole():
    tokenizer, text = ToyTokenizer(), "é–🙂a\u200db"
    ids = tokenizer.encode(text)
    model = ToyModel(scripted([*ids, TURN + 1], tokenizer.size, 2), tokenizer)
    texts = [p.text for p in stream_generate(model, "?", temperature=0)]
    assert "".join(texts) == text and "\ufffd" not in "".join(texts)
    assert [t for t in texts if t] == list(text)


def test_half_a_character_at_the_end_becomes_a_replacement_character():
    tokenizer = ToyTokenizer()
    model = ToyModel(scripted([BYTES + 0xF0, BYTES + 0x9F], tokenizer.size, 2), tokenizer)
    assert (
        mg.generate(model, "?", max_new_tokens=2, temperature=0)
        == tokenizer.decode([BYTES + 0xF0, BYTES + 0x9F])
        == "\ufffd"
    )


def test_without_a_tokenizer_ids_go_in_and_tokens_come_out():
    model = ToyModel(chaotic(300), None, eos=())
    pieces = list(stream_generate(model, [5, 6], max_new_tokens=4, temperature=0))
    assert [p.token for p in pieces] == continued(model, [5, 6], 4)
    assert {p.text for p in pieces} == {""}
    with pytest.raises(ValueError, match=r"no tokenizer; give the prompt as token ids"):
        stream_generate(model, "text", temperature=0)
    with pytest.raises(ValueError, match=r"no tokenizer, so .* stop string"):
        stream_generate(model, [5], stop="x", temperature=0)


# ------------------------------------------------------------------------------------------------ cache and counts


@pytest.mark.parametrize("first", [1, 2, 9])
def test_an_answer_taken_up_again_over_its_cache_is_the_answer_in_one(first):
    model, ids = talker(eos=()), [2, 40, 41]
    cache = model.new_cache(60)
    begun = [p.token for p in stream_generate(model, ids, max_new_tokens=first, cache=cache, temperature=0)]
    assert cache.ids.tolist() == [*ids, *begun[:-1]] and cache.position == len(cache.ids)
    rest = [p.token for p in stream_generate(model, begun[-1:], max_new_tokens=10, cache=cache, temperature=0)]
    assert begun + rest == continued(model, ids, first + 10)


@pytest.mark.parametrize("call", [0, 1, 4])
def test_an_interrupt_leaves_a_cache_that_can_be_continued(call):
    model, ids = talker(eos=()), [2, 40, 41]
    expected, cache, seen = continued(model, ids, 12), model.new_cache(60), []
    model.interrupt_at = call
    with pytest.raises(KeyboardInterrupt):
        seen.extend(p.token for p in stream_generate(model, ids, max_new_tokens=12, cache=cache, temperature=0))
    assert seen == expected[:call]
    missing = [*ids, *seen][cache.position :]
    rest = stream_generate(model, missing, max_new_tokens=12 - len(seen), cache=cache, temperature=0)
    assert seen + [p.token for p in rest] == expected


def test_progress_counts_the_prompt_to_its_end_in_bounded_steps():
    model, told = talker(eos=(), context=2000), []
    ids = [2 + i % 200 for i in range(1200)]
    with_progress = list(
        stream_generate(model, ids, max_new_tokens=2, progress=lambda *at: told.append(at), temperature=0)
    )
    steps = [min(PREFILL_CHUNK, 1200 - at) for at in range(0, 1200, PREFILL_CHUNK)]
    assert told == [(sum(steps[: i + 1]), 1200) for i in range(len(steps))]
    assert model.fed == [*steps, 1] and len(steps) > 2
    without = list(stream_generate(model, ids, max_new_tokens=2, temperature=0))
    assert [p.token for p in without] == [p.token for p in with_progress]


def test_pieces_count_tokens_and_speeds():
    pieces = list(stream_generate(talker(eos=()), [2, 3, 4], max_new_tokens=5, temperature=0))
    assert [p.generation_tokens for p in pieces] == [1, 2, 3, 4, 5]
    assert {p.prompt_tokens for p in pieces} == {3}
    assert pieces[0].generation_tps == 0 and all(p.generation_tps > 0 for p in pieces[1:])
    assert all(p.prompt_tps > 0 for p in pieces)
    with pytest.raises(AttributeError):
        pieces[0].text = ""


# ------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    "prompt, message",
    [
        (None, "the prompt is None"),
        (np.array([[2, 5]]), r"an array of shape \[1, 2\]; give one row"),
        ([{"role": "user", "content": "x"}], r"a list of messages; mg\.Chat"),
    ],
)
def test_what_other_programs_take_as_a_prompt_is_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        stream_generate(talker(), prompt)


@pytest.mark.parametrize(
    "name, meant", [("max_length", "max_new_tokens"), ("temp", "temperature"), ("max_tokens", "max_new_tokens")]
)
def test_settings_of_other_programs_are_named_with_ours(name, meant):
    for call in (lambda **more: stream_generate(talker(), "x", **more), lambda **more: mg.Chat(talker(), **more)):
        with pytest.raises(TypeError, match=f"no setting '{name}'; did you mean {meant}"):
            call(**{name: 3})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"stop": ""}, "stop string is empty"),
        ({"stop": ["a", ""]}, "stop string is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"prompt": []}, "the prompt has no ids"),
        (
            {"images": ["cow.jpg"]},
            "^toy has no vision tower, but 1 image was given; use gemma-3-4b or larger$",
        ),
        ({"images": ["a", "b"]}, "^toy has no vision tower, but 2 images were given; use gemma-3-4b or larger$"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments, message):
    model = talker()
    with pytest.raises(ValueError, match=message):
        stream_generate(model, **{"prompt": "x", **arguments})
    assert not model.fed


# ------------------------------------------------------------------------------- what the checkpoint states, or not


@pytest.mark.parametrize(
    "stated, given, expected",
    [
        ({}, {}, (1.0, 64, 0.95, None)),
        ({"temperature": 0.7, "min_p": 0.1}, {}, (0.7, 64, 0.95, 0.1)),
        ({"temperature": 0.7}, {"temperature": 1.5, "top_k": 5}, (1.5, 5, 0.95, None)),
        ({"do_sample": False}, {}, (0.0, None, None, None)),
        ({"do_sample": False}, {"temperature": 0.5}, (0.5, 64, 0.95, None)),
        ({"temperature": 0.0}, {}, (0.0, None, None, None)),
        ({}, {"temperature": 0}, (0.0, None, None, None)),
    ],
)
def test_settings_are_those_given_then_the_checkpoints_then_the_released(stated, given, expected):
    model = talker()
    model.sampling = stated
    sampler = sampler_for(model, **given)
    assert (sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p) == expected


@pytest.mark.parametrize("name, value", [("top_k", 5), ("top_p", 0.5), ("min_p", 0.1)])
def test_a_setting_without_effect_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} has no effect at temperature 0"):
        stream_generate(talker(), "x", temperature=0, **{name: value})


def test_an_instruction_tuned_model_gets_a_turn_unless_raw():
    model = talker(context=2000)
    as_text, as_turn = (
        text_ids(model.tokenizer, "hi"),
        conversation_ids(model.tokenizer, "gemma3", [{"role": "user", "content": "hi"}]),
    )
    assert prompt_ids(model, "hi") == as_text and prompt_ids(model, "hi", raw=False) == as_turn
    model.instruction_tuned = True
    assert prompt_ids(model, "hi") == as_turn and prompt_ids(model, "hi", raw=True) == as_text
    cache = model.new_cache(500)
    next(stream_generate(model, "hi", cache=cache, temperature=0))
    assert cache.ids.tolist() == as_turn


def test_a_foreign_chat_template_makes_the_caller_choose():
    model = talker(context=2000)
    model.instruction_tuned, model.foreign_turns = True, "<|im_start|>"
    with pytest.raises(ValueError, match=r"writes <\|im_start\|>, not Gemma's turns; choose --raw"):
        mg.generate(model, "hi")
    for raw in (True, False):
        assert mg.generate(model, "hi", raw=raw, max_new_tokens=1) is not None


def test_a_text_after_a_filled_cache_gets_no_second_bos():
    model = talker(context=2000)
    cache = model.new_cache(100)
    model.forward([2, 9, 8], cache)
    next(stream_generate(model, "é", cache=cache, temperature=0))
    assert cache.ids.tolist() == [2, 9, 8, BYTES + 0xC3, BYTES + 0xA9]


@pytest.mark.parametrize(
    "prompt, why",
    [
        (b"hi", "bytes"),
        (bytearray(b"hi"), "bytes"),
        (memoryview(b"hi"), "bytes"),
        (["a", "b"], "list of texts"),
        (None, "no ids"),
        (5, "of type int"),
        (Path("x"), "of type Posix"),
        ([2, 3.5], "ids are integers"),
        (np.array([2.0]), "ids are integers"),
        ([True], "ids are integers"),
        (np.array([[2, 3]]), "ids are integers"),
    ],
)
def test_prompts_that_are_neither_text_nor_ids_are_refused(prompt, why):
    with pytest.raises(ValueError, match=why):
        mg.generate(talker(), prompt)


def test_a_misspelt_setting_of_a_chat_is_refused():
    with pytest.raises(TypeError, match="'temprature'"):
        mg.Chat(talker(), temprature=0.2)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"temperature": "0.5"}, "temperature is '0.5'; it must be a number"),
        ({"top_p": [0.5]}, "it must be a number"),
        ({"temperature": True}, "it must be a number"),
        ({"min_p": b"1"}, "it must be a number"),
        ({"raw": "yes"}, "raw is 'yes'; it must be True, False or None"),
        ({"exact_logits": 1}, "exact_logits is 1; it must be True, False or None"),
        ({"seed": 1.5}, "seed is 1.5; it must be an integer"),
        ({"seed": "1"}, "it must be an integer"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be an integer"),
        ({"stop": b"x"}, "a stop string is no text"),
        ({"stop": [b"x"]}, "a stop string is no text"),
        ({"stop": ["x", 5]}, "a stop string is no text"),
        ({"stop": 5}, "stop is 5; give a text"),
        ({"cache": "a.cache"}, "cache is of type str; give one that model.new_cache made"),
        ({"taps": ["*"]}, "taps is of type list; give mg.Taps"),
        ({"progress": True}, "progress is of type bool; give a function"),
        ({"logits_processors": max}, "logits_processors must be a list of functions"),
    ],
)
def test_settings_of_another_type_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        stream_generate(talker(), "Hello", **settings)


@pytest.mark.parametrize("call", [mg.generate, mg.score])
def test_a_name_is_no_model(call):
    with pytest.raises(ValueError, match="the model is the name 'gemma-3-270m'; load it first"):
        call("gemma-3-270m", "Hello")


@pytest.mark.parametrize("call", [mg.Chat, lambda model: mg.generate_batch(model, ["Hello"])])
def test_a_name_is_no_model_for_others_either(call):
    with pytest.raises(ValueError, match="load it first"):
        call("gemma-3-270m")


def test_nothing_is_none_and_a_text_may_be_numpys():
    settings = {"max_new_tokens": 3, "temperature": 0}
    plain = mg.generate(talker(), "Hello", **settings)
    assert mg.generate(talker(), "Hello", images=None, stop=None, **settings) == plain
    for text in (np.str_("Hello"), np.array("Hello")):
        assert mg.generate(talker(), text, **settings) == plain


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda m: m.forward("Hello"), "ids is a text"),
        (lambda m: m.forward([2], taps="blocks.*"), "taps is of type str"),
        (lambda m: m.forward([2], cache={}), "cache is of type dict"),
        (lambda m: m.tokenizer.encode(5), "the text is of type int"),
        (lambda m: mg.load("anything", threads="2"), "threads is '2'"),
        (lambda m: mg.load("anything", context=0), "context is 0"),
        (lambda m: mg.Taps(5), "a pattern of values is 5"),
        (lambda m: mg.Edits({"logits": 5}), "edits are a table of functions"),
        (lambda m: mg.choose(m, "Hello", []), "answers is empty"),
        (lambda m: mg.generate_batch(m, None), "prompts is None"),
    ],
)
def test_arguments_of_another_type_are_refused_in_a_sentence(call, why):
    with pytest.raises(ValueError, match=why):
        call(mg.load("tiny-gemma-3", backend="numpy"))
