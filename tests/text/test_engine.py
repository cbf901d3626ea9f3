"""Requests answered together: each text equals that of its prompt alone, whichever others join, leave or fail."""

import queue
import threading

import numpy as np
import pytest

import minigemma as mg
from minigemma.cli.random_weights import random_model
from minigemma.text.engine import Engine, QueueFull, Request, Stopped
from minigemma.text.generation import look_at
from tests.support.small_models import EYES, LOCAL_GLOBAL, RECURRENT, SEEING

GREEDY = {"max_new_tokens": 30, "temperature": 0, "exact_logits": True}
WAIT = 300  # seconds, for kernels to compile on a busy machine
random = np.random.default_rng(5)
PROMPTS = [random.integers(3, 290, count).tolist() for count in (1, 6, 40, 130, 70)]


class Client:
    """One request, and what it was told."""

    def __init__(self, engine, ids, images=(), **settings):
        self.told = queue.Queue()
        request = Request(ids, GREEDY | settings, images, [i + 7 for i in range(len(images))])
        self.job = engine.submit(request, self.told.put)

    def tokens(self):
        """Those of the whole answer; raises what came instead."""
        found = []
        while not found or not found[-1].finish_reason:
            event = self.told.get(timeout=WAIT)
            if isinstance(event, Exception):
                raise event
            found.append(event)
        return [token.token for token in found]


def alone(model, ids, images=(), **settings):
    return [token.token for token in mg.stream_generate(model, ids, images, **(GREEDY | settings))]


@pytest.fixture(scope="module", params=[LOCAL_GLOBAL, RECURRENT], ids=lambda config: config.family)
def model(request):
    return random_model(request.param, "f32")


@pytest.mark.parametrize("most", [1, 3, 16])
def test_each_text_is_that_of_its_prompt_alone(model, most):
    """30 tokens pass the window of 8 three times; prompts are read in chunks while others decode."""
    with Engine(model, most, 10) as engine:
        clients = [Client(engine, ids) for ids in PROMPTS]
        assert [client.tokens() for client in clients] == [alone(model, ids) for ids in PROMPTS]
        assert engine.counts.answered == len(PROMPTS)
        assert engine.counts.prompt_tokens == sum(map(len, PROMPTS))


def test_seeds_and_stop_ids_are_of_each(model):
    settings = [{"temperature": 1.0, "top_k": 20, "seed": i} for i in range(len(PROMPTS))]
    with Engine(model, 4, 10) as engine:
        clients = [Client(engine, ids, **each) for ids, each in zip(PROMPTS, settings, strict=True)]
        for client, ids, each in zip(clients, PROMPTS, settings, strict=True):
            assert client.tokens() == alone(model, ids, **each)


def test_texts_that_begin_alike_are_not_read_again(model):
    """The second text of a kind leaves a copy where it parts from the first; the third and an exact repeat use it."""
    beginning = PROMPTS[3]
    prompts = [beginning + PROMPTS[1][:n] for n in (6, 5, 4, 6)]
    prompts[1][-1] = prompts[2][-1] = 291
    with Engine(model, 1, 10) as engine:
        for ids in prompts:
            client = Client(engine, ids)
            assert client.tokens() == alone(model, ids)
        assert client.job.cached >= len(beginning)
        assert engine.prefixes.nbytes > 0


def test_a_conversation_goes_on_in_its_cache(model):
    with Engine(model, 1, 10) as engine:
        first = Client(engine, PROMPTS[2]).tokens()
        second = Client(engine, PROMPTS[2] + first + [7, 8, 9])
        assert second.tokens() == alone(model, PROMPTS[2] + first + [7, 8, 9])
        assert second.job.cached == len(PROMPTS[2]) + len(first) - 1


def test_images_are_told_apart_and_looked_at_once():
    model = random_model(SEEING, "f32")
    pictures = [random.integers(0, 255, (56, 56, 3)).astype(np.uint8) for _ in range(2)]
    run = [EYES.start_token, *[EYES.image_token] * EYES.tokens, EYES.end_token]
    ids = [2, *PROMPTS[2], *run, 5, *run, 6]
    looks = []
    with pytest.MonkeyPatch.context() as patch, Engine(model, 2, 10) as engine:
        patch.setattr("minigemma.text.engine.look_at", lambda *args: looks.append(args[1]) or look_at(*args))
        for images in ([0, 1], [0, 0], [0, 0]):
            told = queue.Queue()
            request = Request(ids, GREEDY | {"max_new_tokens": 3}, [pictures[i] for i in images], images)
            job = engine.submit(request, told.put)
            found = [told.get(timeout=WAIT) for _ in range(3)]
            expected = alone(model, ids, [pictures[i] for i in images], max_new_tokens=3)
            assert [token.token for token in found] == expected
        assert job.cached == len(ids) - 1 or job.cached >= len(PROMPTS[2])
    assert sum(map(len, looks)) < 6


def test_a_request_that_fails_harms_no_other(model):
    with Engine(model, 4, 10) as engine:
        good = Client(engine, PROMPTS[2])
        bad = [Client(engine, [10**6]), Client(engine, PROMPTS[1], top_k=-1), Client(engine, [])]
        for client in bad:
            with pytest.raises(ValueError):
                client.tokens()
        assert good.tokens() == alone(model, PROMPTS[2])
        assert engine.counts.failed == 3


def test_a_step_that_fails_ends_its_answers_and_not_the_engine(model, monkeypatch):
    with Engine(model, 4, 10) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("minigemma.text.engine.next_logits", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                Client(engine, PROMPTS[2]).tokens()
        assert Client(engine, PROMPTS[2]).tokens() == alone(model, PROMPTS[2])


def test_what_is_cancelled_stops_and_makes_room(model):
    with Engine(model, 1, 10) as engine:
        endless = Client(engine, PROMPTS[1], max_new_tokens=10**6)
        waiting = Client(engine, PROMPTS[2])
        behind = Client(engine, PROMPTS[3])
        endless.told.get(timeout=WAIT)
        waiting.job.cancel()
        endless.job.cancel()
        assert behind.tokens() == alone(model, PROMPTS[3])
        assert engine.counts.cancelled == 2 and waiting.told.empty()


def test_a_full_queue_refuses(model):
    with Engine(model, 1, 1) as engine:
        first = Client(engine, PROMPTS[1], max_new_tokens=10**6)
        first.told.get(timeout=WAIT)
        second = Client(engine, PROMPTS[2])
        with pytest.raises(QueueFull) as refusal:
            Client(engine, PROMPTS[2])
        assert 1 <= refusal.value.seconds <= 60 and engine.counts.refused == 1
        first.job.cancel()
        assert second.tokens() == alone(model, PROMPTS[2])


def test_a_long_prompt_does_not_hold_up_an_answer(model):
    """Between two chunks of the prompt every answer gets a token."""
    order = []
    with Engine(model, 2, 10) as engine:
        short = threading.Event()
        request = Request(PROMPTS[1], GREEDY | {"max_new_tokens": 20})
        engine.submit(request, lambda _: (order.append("short"), short.set()))
        short.wait(WAIT)
        done = threading.Event()
        engine.submit(Request(PROMPTS[3] * 5, GREEDY), lambda _: (order.append("long"), done.set()))
        done.wait(WAIT)
    assert order.index("long") >= 10


def test_all_are_told_when_the_engine_stops(model):
    engine = Engine(model, 1, 10)
    running, waiting = (Client(engine, PROMPTS[1], max_new_tokens=10**6) for _ in range(2))
    running.told.get(timeout=WAIT)
    engine.close()
    for client in (running, waiting):
        with pytest.raises(Stopped):
            client.tokens()
    with pytest.raises(Stopped):
        Client(engine, PROMPTS[1])


@pytest.mark.parametrize(
    "request_, told",
    [
        (Request([2], {"top_p": 7}), "top_p is 7"),
        (Request([], {}), "no ids"),
        (Request([2] * 2**20, {}), "the context holds"),
        (Request([2], {}, [np.zeros((4, 4, 3), np.uint8)]), "no vision tower"),
    ],
)
def test_a_wrong_request_is_refused_before_it_waits(model, request_, told):
    with Engine(model, 1, 1) as engine, pytest.raises(ValueError, match=told):
        engine.check(request_)
