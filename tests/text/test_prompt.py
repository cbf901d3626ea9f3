"""Conversations against the released chat templates, and texts that cannot break out of their turn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import CASES, NAMES, gemma2, gemma3

from minigemma.files.tokenizer import stop_ids
from minigemma.text.prompt import conversation_ids, text_ids

CONVERSATIONS = CASES["conversations"]  # [[role, text], …], generation prompt?, Gemma 3's ids, Gemma 2's or null
FAMILIES = ["gemma", "gemma2", "recurrentgemma", "gemma3"]


@pytest.fixture(scope="session", name="gemma3")
def _gemma3(demo_file):
    return gemma3(demo_file)


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def user(text):
    return {"role": "user", "content": text}


def test_gemma_3_conversations_are_those_of_its_template(gemma3):
    for turns, prompt, ids, _ in CONVERSATIONS:
        assert conversation_ids(gemma3, "gemma3", messages(turns), prompt) == ids, turns


@pytest.mark.parametrize("family", ["gemma", "gemma2", "recurrentgemma"])
def test_the_other_families_are_laid_out_as_gemma_2(family):
    tokenizer, real = gemma2()
    for turns, prompt, _, ids in CONVERSATIONS:
        if ids is None:  # the template refuses a system text
            with pytest.raises(ValueError, match=r"was trained without a system role; put .* first user message"):
                conversation_ids(tokenizer, family, messages(turns), prompt)
        else:
            assert [real[i] for i in conversation_ids(tokenizer, family, messages(turns), prompt)] == ids, turns


def test_by_hand():
    """The ids as they are in the whole of Gemma 2's vocabulary: 108 is a newline, 1645 user, 2516 model, 2151 Hi."""
    tokenizer, real = gemma2()
    ids = conversation_ids(tokenizer, "gemma2", [user("Hi")])
    assert [real[i] for i in ids] == [2, 106, 1645, 108, 2151, 107, 108, 106, 2516, 108]
    ids = conversation_ids(tokenizer, "gemma2", [user(" Hi\n")], add_generation_prompt=False)
    assert [real[i] for i in ids] == [2, 106, 1645, 108, 2151, 107, 108]


def test_assistant_is_model(gemma3):
    one, two = ([user("a"), {"role": role, "content": "b"}, user("c")] for role in ("assistant", "model"))
    assert conversation_ids(gemma3, "gemma3", one) == conversation_ids(gemma3, "gemma3", two)


def test_the_newlines_of_a_system_text_join_that_of_the_role(gemma3):
    ids = conversation_ids(gemma3, "gemma3", messages([("system", "\n\nBe"), ("user", "\n\nHi")]), False)
    three, two = gemma3.id_of("\n\n\n"), gemma3.id_of("\n\n")
    assert ids == [2, 105, 2364, three, *gemma3.encode("Be"), two, *gemma3.encode("Hi"), 106, 107]


pieces = st.sampled_from([*NAMES, " ", "\n", "\n\n", "user", "model\n", "<", ">", "a", "é🙂"])
texts = st.lists(pieces | st.text(max_size=4), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, min_size=1, max_size=5), texts | st.none())
def test_no_text_breaks_out_of_its_turn(contents, system):
    """Every control token is one of the layout, whatever is typed; with what is typed between them."""
    tokenizer = gemma2()[0]
    turns = [("user" if i % 2 == 0 else "model", text) for i, text in enumerate(contents)]
    before = [] if system is None else [("system", system)]
    ids = conversation_ids(tokenizer, "gemma3", messages(before + turns))
    assert [i for i in ids if tokenizer.decode([i]) == ""] == [2, *[106, 107] * len(turns), 106]
    bodies = [text.strip() for text in contents]
    bodies[0] = ("" if system is None else f"{system}\n\n") + bodies[0]
    whole = "".join(f"{role}\n{body}\n" for (role, _), body in zip(turns, bodies, strict=True))
    assert tokenizer.decode(ids) == plain(f"{whole}model\n")


def plain(text):
    """As a text comes back: without halves of characters, and with blanks where pieces spell them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\u2581", " ")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.sampled_from(" \n\tab<>/é12."), max_size=12), min_size=1, max_size=5))
def test_the_ids_are_those_of_the_whole_text_at_once(contents):
    tokenizer = gemma2()[0]
    turns = [("user" if i % 2 == 0 else "model", text) for i, text in enumerate(contents)]
    whole = "".join(f"<start_of_turn>{role}\n{text.strip()}<end_of_turn>\n" for role, text in turns)
    expected = [2, *tokenizer.encode(f"{whole}<start_of_turn>model\n", control=True)]
    assert conversation_ids(tokenizer, "gemma", messages(turns)) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "turns, cause",
    [
        ([], "at least one message"),
        ([("model", "a")], "message 1 is of role 'model'; user and model must take turns, a user first"),
        ([("user", "a"), ("user", "b")], "message 2 is of role 'user'"),
        ([("user", "a"), ("assistant", "b"), ("model", "c")], "message 3 is of role 'model'"),
        ([("user", "a"), ("system", "b")], "message 2 is of role 'system'"),
        ([("tool", "a")], "message 1 is of role 'tool'"),
        ([("User", "a")], "message 1 is of role 'User'"),
        ([(None, "a")], "message 1 is of role None"),
        ([(["user"], "a")], "message 1 is of role"),
        ([("user", None)], "content of a message must be text, not NoneType"),
        ([("user", "a"), ("model", 3)], "must be text, not int"),
    ],
)
def test_what_is_no_conversation(turns, cause, family):
    with pytest.raises(ValueError, match=cause):
        conversation_ids(gemma2()[0], family, messages(turns))


@pytest.mark.parametrize(
    "turns, cause",
    [
        ([("system", "a")], "after the system message a user message must follow"),
        ([("system", "a"), ("model", "b")], "message 2 is of role 'model'"),
        ([("system", "a"), ("system", "b"), ("user", "c")], "message 2 is of role 'system'"),
        ([("system", "a"), ("user", "b"), ("user", "c")], "message 3 is of role 'user'"),
        ([("system", ["a"]), ("user", "b")], "must be text, not list"),
    ],
)
def test_what_is_no_conversation_after_a_system_text(turns, cause):
    with pytest.raises(ValueError, match=cause):
        conversation_ids(gemma2()[0], "gemma3", messages(turns))


def test_a_message_without_its_parts():
    for message in ({}, {"content": "a"}, {"role": "user"}):
        with pytest.raises(ValueError, match=r"role None|must be text"):
            conversation_ids(gemma2()[0], "gemma2", [message])


def test_a_family_without_turns():
    with pytest.raises(ValueError, match="family 'griffin' has no turn format"):
        conversation_ids(gemma2()[0], "griffin", [user("a")])


def test_messages_are_left_alone(gemma3):
    given_messages = messages([("system", " a "), ("user", " b ")])
    conversation_ids(gemma3, "gemma3", given_messages)
    assert given_messages == messages([("system", " a "), ("user", " b ")])


@pytest.mark.parametrize("text", ["", "<bos>", "<bos><bos>Hi", "Hi", " \n", "a<eos>"])
def test_bos_stands_once(text, gemma3):
    for tokenizer in (gemma3, gemma2()[0]):
        ids = text_ids(tokenizer, text)
        assert ids[0] == 2 and ids.count(2) == 1
        assert tokenizer.decode(ids) == text
        ids = conversation_ids(tokenizer, "gemma3", [user(text)])
        assert ids[0] == 2 and ids.count(2) == 1


def test_what_ends_an_answer(gemma3):
    assert stop_ids(gemma3, [1]) == (1, 106) == stop_ids(gemma3, (1, 106)) == stop_ids(gemma3, [106])
    assert stop_ids(gemma3, [1], turns=False) == (1,)
    assert stop_ids(gemma2()[0], [], turns=True) == (1, 107)
    assert stop_ids(gemma3, [7, 1]) == (1, 7, 106)
