"""Models that say what a test wants, without weights."""

from types import SimpleNamespace

import numpy as np

from minigemma.cache import Cache
from minigemma.files.tokenizer import StreamDecoder

BYTES, TURN = 4, 260  # the first byte's id; <start_of_turn>, <end_of_turn> behind the bytes


class ToyTokenizer:
    """Four control tokens, the 256 bytes, two turn tokens, then pieces of text that only a script uses."""

    bos, eos = 2, 1
    start_of_turn = TURN

    def __init__(self, pieces=()):
        self.pieces = [b""] * BYTES + [bytes([b]) for b in range(256)] + [b"", b""] + [p.encode() for p in pieces]
        self.size = len(self.pieces)

    def encode(self, text):
        return [BYTES + b for b in text.encode("utf-8", "replace")]

    def bytes_of(self, token):
        return self.pieces[token]

    def decode(self, ids):
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def stream(self):
        return StreamDecoder(self)


class ToyModel:
    """`rule` gives the logits [V] after a history of ids. The cache holds the history, and so shows what was fed."""

    def __init__(self, rule, tokenizer=None, context=200, family="gemma3", eos=(1, TURN + 1), banned=(), limit=None):
        self.rule, self.tokenizer, self.eos, self.banned = rule, tokenizer, eos, banned
        vocab = tokenizer.size if tokenizer else 300
        self.name, self.config = "toy", SimpleNamespace(context=context, family=family, vocab=vocab)
        self.vision = self.coarse_head = None
        self.weights = ()
        self.instruction_tuned, self.sampling, self.foreign_turns = False, {}, ""
        self.vocab_limit = limit or vocab
        self.fed = []  # tokens in each call
        self.interrupt_at = None  # number of the call that Ctrl-C ends

    def new_cache(self, max_tokens):
        return Cache((), max_tokens)

    def image_runs(self, ids):
        return []

    def forward(self, ids, cache=None, images=None, last_only=False, taps=None):
        self.fed.append(len(ids))
        if len(self.fed) - 1 == self.interrupt_at:
            raise KeyboardInterrupt
        cache = cache or self.new_cache(len(ids))
        cache.settle()
        assert cache.position + len(ids) <= cache.max_tokens
        history = [*cache.ids.tolist(), *map(int, ids)]
        rows = range(len(history) if last_only else cache.position + 1, len(history) + 1)
        logits = np.stack([self.rule(history[:end]) for end in rows]).astype(np.float32)
        logits.setflags(write=False)  # read-only
        cache.advance(ids)
        return logits


def chaotic(size, spread=3):
    """A rule under which one other token anywhere before changes everything after."""

    def rule(history):
        return np.random.default_rng([*history, len(history)]).standard_normal(size) * spread

    return rule


def scripted(ids, size, after):
    """A rule that gives `ids` one after the other to a prompt of `after` tokens."""

    def rule(history):
        return 20.0 * (np.arange(size) == ids[min(len(history) - after, len(ids) - 1)])

    return rule


def talker(**flags):
    return ToyModel(chaotic(TURN + 2), ToyTokenizer(), **flags)


def letters(**flags):
    """A talker of lower-case letters, so that what it says encodes to the tokens it chose; turns end on their own."""
    tokenizer = ToyTokenizer()
    wild = chaotic(tokenizer.size)
    speakable = [*(BYTES + b for b in b"abcdefghij"), TURN + 1]

    def rule(history):
        logits = wild(history)
        logits[speakable] += 100
        return logits

    return ToyModel(rule, tokenizer, **flags)
