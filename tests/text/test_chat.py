"""Conversations over one cache: always what re-reading the whole conversation would give."""

import json

import pytest
from support.toy_models import BYTES, TURN, ToyModel, ToyTokenizer, chaotic, letters, scripted, talker

import minigemma as mg
from minigemma.cache import Cache
from minigemma.text.generation import stream_generate
from minigemma.text.prompt import conversation_ids

GREEDY = {"temperature": 0.0, "max_new_tokens": 12}
SAMPLED = {"temperature": 1.5, "top_k": 7, "top_p": None, "seed": 3, "max_new_tokens": 9}


def from_scratch(model, messages, **settings):
    """The answer to a conversation that is read from its beginning."""
    ids = conversation_ids(model.tokenizer, model.config.family, messages)
    return "".join(p.text for p in stream_generate(model, ids, **settings))


@pytest.mark.parametrize("make", [letters, talker], ids=["canonical tokens", "any bytes"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family, system", [("gemma3", None), ("gemma3", " Be brief. "), ("gemma2", None)])
def test_every_answer_is_that_of_the_whole_conversation(make, settings, family, system):
    model = make(context=2000, family=family)
    chat = mg.Chat(model, system=system, **settings)
    for text in ("hello", "  and then? ", "", "né🙂"):
        answer = chat.send(text)
        assert chat.messages[-2:] == [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        assert answer == from_scratch(model, chat.messages[:-1], **settings)


def test_a_turn_reads_only_what_is_new():
    model = letters(context=2000)
    chat = mg.Chat(model, **GREEDY)
    for text in ("hello", "go on", "more"):
        held = chat._cache.ids.tolist() if chat._cache else []
        before = len(model.fed)
        chat.send(text)
        ids = conversation_ids(model.tokenizer, "gemma3", chat.messages[:-1])
        assert model.fed[before] == len(ids) - len(held)
        assert ids[: len(held)] == held
    assert held


@pytest.mark.parametrize("words", [b"yes \n", b"\n yes", b"", b"  "])
def test_answers_that_the_turn_format_trims_do_not_mislead_the_cache(words):
    tokenizer = ToyTokenizer()
    first = conversation_ids(tokenizer, "gemma3", [{"role": "user", "content": "a"}])
    script = scripted([*(BYTES + b for b in words), TURN + 1], tokenizer.size, len(first))
    wild = chaotic(tokenizer.size)
    model = ToyModel(lambda h: script(h) if len(h) <= len(first) + len(words) else wild(h), tokenizer)
    chat = mg.Chat(model, **GREEDY)
    assert chat.send("a") == words.decode()
    assert chat.send("b") == from_scratch(model, chat.messages[:-1], **GREEDY)


def test_an_answer_ended_by_a_stop_string_does_not_mislead_the_cache():
    model = letters(context=2000, eos=())
    whole = mg.Chat(model, **GREEDY).send("hello")
    chat = mg.Chat(model, **GREEDY)
    assert chat.send("hello", stop=whole[2:5]) == whole[:2]
    assert chat.send("next") == from_scratch(model, chat.messages[:-1], **GREEDY)


def test_edited_messages_are_what_the_next_answer_is_to():
    model = letters(context=2000)
    chat = mg.Chat(model, **GREEDY)
    chat.send("hello")
    chat.messages[1]["content"] = "something else"
    assert chat.send("next") == from_scratch(model, chat.messages[:-1], **GREEDY)


# ---------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_an_answer_left_by_the_caller_stays_as_far_as_it_was_said(pieces):
    model = letters(context=2000, eos=())
    chat = mg.Chat(model, **GREEDY)
    stream = chat.stream("hello")
    said = "".join(next(stream).text for _ in range(pieces))
    stream.close()
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    assert chat.send("next") == from_scratch(model, chat.messages[:-1], **GREEDY)


@pytest.mark.parametrize("turn, call", [(1, 0), (2, 0), (1, 3), (2, 3)])
def test_ctrl_c_in_the_model_keeps_what_was_said_and_drops_a_turn_without_any(turn, call):
    model = letters(context=2000, eos=())
    chat = mg.Chat(model, **GREEDY)
    for i in range(turn - 1):
        chat.send(f"hello {i}")
    before, said = list(chat.messages), ""
    model.interrupt_at = len(model.fed) + call
    with pytest.raises(KeyboardInterrupt):
        for piece in chat.stream("wait"):
            said += piece.text
    turn_kept = [{"role": "user", "content": "wait"}, {"role": "assistant", "content": said}] if call else []
    assert chat.messages == before + turn_kept
    assert chat.send("next") == from_scratch(model, chat.messages[:-1], **GREEDY)


def test_ctrl_c_while_the_cache_moves_on_counts_the_tokens_it_will_hold():
    """The ring of one layer is interrupted in `commit`; the cache finishes the move at its next use."""
    model, chat = letters(context=2000, eos=()), None

    class Ring:
        calls = 0

        def commit(self, count):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt

    chat = mg.Chat(model, **GREEDY)
    model.new_cache = lambda max_tokens: Cache((Ring(),), max_tokens)
    with pytest.raises(KeyboardInterrupt):
        list(chat.stream("hello"))
    assert chat._cache.position == len(chat._cache.ids) > 0
    assert chat.send("next") == from_scratch(letters(context=2000, eos=()), chat.messages[:-1], **GREEDY)


def test_two_answers_begun_at_once_do_not_share_a_cache():
    model = letters(context=2000)
    chat = mg.Chat(model, **GREEDY)
    chat.send("hello")
    history = list(chat.messages)
    streams = [(text, chat.stream(text)) for text in ("left", "right")]
    for text, stream in streams:
        answer = "".join(p.text for p in stream)
        assert answer == from_scratch(model, [*history, {"role": "user", "content": text}], **GREEDY)
    assert chat.send("next") == from_scratch(model, chat.messages[:-1], **GREEDY)


def test_a_conversation_beyond_the_context_is_refused_with_numbers_and_forgets_nothing():
    model = letters(context=90)
    chat = mg.Chat(model, **GREEDY)
    chat.send("hello")
    before = list(chat.messages)
    length = len(conversation_ids(model.tokenizer, "gemma3", [*before, {"role": "user", "content": "x" * 80}]))
    with pytest.raises(ValueError, match=rf"the prompt has {length} tokens and the context holds 90\b"):
        chat.send("x" * 80)
    assert chat.messages == before
    assert chat.send("b") == from_scratch(model, chat.messages[:-1], **GREEDY)


# ----------------------------------------------------------------------------- again, further, and a full context


def test_another_answer_replaces_the_last_and_is_that_of_the_whole_conversation():
    model = letters(context=2000)
    chat = mg.Chat(model, **SAMPLED)
    chat.send("hello")
    first = chat.send("and then?")
    answer = "".join(piece.text for piece in chat.again(seed=8))
    assert answer != first and chat.messages[-1]["content"] == answer and len(chat.messages) == 4
    assert answer == from_scratch(model, chat.messages[:-1], **SAMPLED | {"seed": 8})
    assert chat.send("next") == from_scratch(model, chat.messages[:-1], **SAMPLED)


@pytest.mark.parametrize("make", [letters, talker], ids=["canonical tokens", "any bytes"])
def test_an_answer_cut_in_parts_and_continued_is_the_answer_of_one_go(make):
    whole = mg.Chat(make(context=2000, eos=()), temperature=0.0, max_new_tokens=12).send("hello")
    model = make(context=2000, eos=())
    chat = mg.Chat(model, temperature=0.0, max_new_tokens=4)
    parts = [chat.send("hello")]
    for _ in range(2):
        before = len(model.fed)
        parts.append("".join(piece.text for piece in chat.go_on()))
        assert model.fed[before] == 1, "the last token of the part before"
    if "\ufffd" not in whole:
        assert "".join(parts) == whole
    assert [message["content"] for message in chat.messages] == ["hello", "".join(parts)]


def test_an_answer_that_was_left_or_edited_can_be_continued_and_a_complete_one_cannot():
    model = letters(context=2000, eos=())
    chat = mg.Chat(model, **GREEDY)
    stream = chat.stream("hello")
    next(stream), next(stream), stream.close()
    chat.messages[1]["content"] = "edited"
    ids = conversation_ids(model.tokenizer, "gemma3", chat.messages[:1]) + model.tokenizer.encode("edited")
    more = "".join(piece.text for piece in chat.go_on())
    assert more == "".join(piece.text for piece in stream_generate(model, ids, **GREEDY))
    assert chat.messages[1]["content"] == "edited" + more
    complete = mg.Chat(letters(context=2000), **GREEDY | {"max_new_tokens": 100})
    complete.send("hello")
    with pytest.raises(ValueError, match="the last answer is complete"):
        complete.go_on()


@pytest.mark.parametrize("call", ["again", "go_on"])
def test_there_must_be_an_answer(call):
    with pytest.raises(ValueError, match="there is no answer yet"):
        getattr(mg.Chat(letters(), system="Be brief"), call)()


@pytest.mark.parametrize("system", [None, "Be brief"])
def test_the_oldest_messages_go_and_the_rest_is_a_conversation(system):
    model = letters(context=200)
    chat = mg.Chat(model, system=system, **GREEDY)
    for text in ("one", "two", "three"):
        chat.send(text)
    with pytest.raises(ValueError, match=r"context holds 200\b.*; drop_oldest\(\) leaves out the oldest"):
        chat.send("x" * 150)
    last, kept = chat.messages[-2:], chat.messages[: 1 if system else 0]
    one = len(conversation_ids(model.tokenizer, "gemma3", [*kept, *last]))
    assert chat.drop_oldest(one) == 4 and chat.messages == [*kept, *last]
    assert chat.send("next") == from_scratch(model, chat.messages[:-1], **GREEDY)
    assert chat.drop_oldest(0) == 4 and chat.messages == kept


def test_an_image_for_a_text_model_leaves_the_history_as_it_was():
    chat = mg.Chat(letters())
    with pytest.raises(ValueError, match="no vision tower, but 1 image was given"):
        chat.send("what is this?", images=["cow.jpg"])
    assert chat.messages == []


# --------------------------------------------------------------------------------------------------------- settings


def test_sampling_is_as_released_unless_the_chat_or_the_answer_says_otherwise():
    model, message = talker(context=2000), [{"role": "user", "content": "hi"}]
    released = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "seed": 5, "max_new_tokens": 20}
    assert mg.Chat(model).send("hi", seed=5, max_new_tokens=20) == from_scratch(model, message, **released)
    chat = mg.Chat(model, temperature=0.0, max_new_tokens=20)
    assert chat.send("hi") == from_scratch(model, message, **GREEDY | {"max_new_tokens": 20})
    chat.reset()
    assert chat.send("hi", temperature=1.0, seed=5) == from_scratch(model, message, **released)


def test_gemma_2_refuses_a_system_text_when_the_chat_is_made():
    with pytest.raises(ValueError, match="trained without a system role"):
        mg.Chat(letters(family="gemma2"), system="Be brief")


def test_a_model_without_a_tokenizer_cannot_converse():
    with pytest.raises(ValueError, match="which a conversation needs"):
        mg.Chat(ToyModel(chaotic(300))).send("hi")


def test_reset_begins_a_conversation_that_knows_nothing_of_the_last():
    model = letters(context=2000)
    chat = mg.Chat(model, system="Be brief", **GREEDY)
    chat.send("hello")
    chat.reset()
    assert chat.messages == []
    assert chat.send("again") == from_scratch(model, [{"role": "user", "content": "again"}], **GREEDY)
    chat.reset("Be long")
    assert chat.messages == [{"role": "system", "content": "Be long"}]


# ----------------------------------------------------------------------------------------------------------- saving


def test_saved_messages_are_those_of_the_chat_also_with_half_a_surrogate_pair(tmp_path):
    chat = mg.Chat(letters(context=2000), **GREEDY)
    chat.send("né🙂")
    chat.send("half \ud83d pair \\ud83d")
    chat.save(tmp_path / "talk.json")
    text = (tmp_path / "talk.json").read_text("utf-8")
    assert json.loads(text) == chat.messages and "né🙂" in text
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    chat = mg.Chat(letters(), **GREEDY)
    (tmp_path / "talk.json").mkdir()
    with pytest.raises(OSError):
        chat.save(tmp_path / "talk.json")
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]
    with pytest.raises(OSError):
        chat.save(tmp_path / "nowhere" / "talk.json")


def test_a_saved_conversation_goes_on(tmp_path):
    model = letters(context=2000)
    chat, other = mg.Chat(model, system="Be brief", **GREEDY), mg.Chat(model, **GREEDY)
    chat.send("né🙂")
    chat.save(tmp_path / "talk.json")
    other.send("something else")
    assert other.load(tmp_path / "talk.json") == 0 and other.messages == chat.messages
    assert other.send("next") == from_scratch(model, other.messages[:-1], **GREEDY)


def test_images_are_not_in_a_saved_conversation(tmp_path):
    messages = [{"role": "user", "content": "<start_of_image>What is it?", "images": [0, 2]}]
    messages += [{"role": "assistant", "content": "a cow"}]
    (tmp_path / "talk.json").write_text(json.dumps(messages))
    chat = mg.Chat(letters(context=2000), **GREEDY)
    assert chat.load(tmp_path / "talk.json") == 2
    assert chat.messages[0] == {"role": "user", "content": "What is it?"}


@pytest.mark.parametrize(
    "text, says",
    [
        ("{}", "object"),
        ("[1", "not JSON"),
        ("[1]", "messages must be a list"),
        ('[{"role": "user", "content": "hi"}]', "user and model must take turns"),
        ('[{"role": "user", "content": 5}, {"role": "assistant", "content": "hi"}]', "must be text"),
        ("", "not JSON|empty"),
    ],
)
def test_what_is_no_conversation_is_refused_and_leaves_the_history(text, says, tmp_path):
    (tmp_path / "talk.json").write_text(text)
    chat = mg.Chat(letters(context=2000), **GREEDY)
    chat.send("hello")
    before = list(chat.messages)
    with pytest.raises(ValueError, match=says):
        chat.load(tmp_path / "talk.json")
    assert chat.messages == before
