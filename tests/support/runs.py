"""What trainings in tests begin with: a vocabulary of bytes, a model of a few thousand parameters, a text."""

import numpy as np

from minigemma.arrays import Strings
from minigemma.files.save import save_model
from minigemma.files.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, Tokenizer
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig
from minigemma.train.initial import initial_parameters

WORDS = ("the", "and", "of", "\u2581the", "\u2581and", "\u2581of", "in", "\u2581in")
NURSERY = (
    "Humpty Dumpty sat on a wall,\nHumpty Dumpty had a great fall.\nAll the king's horses and all the king's men\n"
    "Couldn't put Humpty together again.\n\nJack and Jill went up the hill\nTo fetch a pail of water.\n"
    "Jack fell down and broke his crown,\nAnd Jill came tumbling after.\n\n"
)
SIZES = {"width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn_width": 48, "context": 64, "window": 8}


def tokenizer(words=WORDS):
    """Bytes, letters and a few words; 4 + 256 + some pieces."""
    letters = [chr(c) for c in range(33, 127)] + ["\u2581", "\n"]
    parts = sorted({word[:n] for word in words for n in range(2, len(word) + 1)}, key=len)
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *parts, *letters]
    kinds = [CONTROL, CONTROL, CONTROL, UNKNOWN, *[BYTE] * 256, *[NORMAL] * (len(parts) + len(letters))]
    scores = -np.arange(len(pieces), dtype=np.float32)
    return Tokenizer.from_vocabulary(
        Strings.of([piece.encode() for piece in pieces]), scores, np.array(kinds, np.int32)
    )


def toy(kind="gemma3"):
    """A config and a tokenizer."""
    made = tokenizer()
    if kind == "gemma3":
        return Gemma3Config(name="toy", layers=2, vocab=made.size, pattern=2, **SIZES), made
    more = {"lru_width": 32, "gate_blocks": 2}
    return RecurrentGemmaConfig(name="toy", layers=3, vocab=made.size, **more, **SIZES), made


def write_text(folder, times=6):
    """A text of some thousand tokens."""
    path = folder / "text.txt"
    path.write_text(NURSERY * times, "utf-8")
    return path


def write_teacher(folder):
    """Writes a toy model whose distributions are far from flat; returns the folder's name."""
    config, made = toy()
    parameters = initial_parameters(config, 5)
    parameters["final_norm"] += 2
    save_model(folder, config, parameters, made, dtype="f32")
    return str(folder)
