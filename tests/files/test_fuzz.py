"""Damaged checkpoints: loading one ends in a model that runs or in ModelFormatError, in seconds, whatever the bytes.

A few seconds of it run always. `pytest tests/test_fuzz.py --fuzz-minutes 30` goes on for so long, and prints how many
mutations it tried and how they ended. Seeds are tiny valid checkpoints: a folder (config.json, index, two shards, a
tokenizer.model) and a GGUF file.
"""

import json
import random
import shutil
import time
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from support.folders import CONFIGS, random_weights, write_folder, write_gguf
from support.tokenizers import trained

import minigemma as mg
from minigemma.files.safetensors_file import write_safetensors

EDGES = [
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63,
    2**64 - 1,
]
SECONDS = 4  # for each seed, unless more are asked for
LIMIT = 5  # seconds that one load may take, on a busy machine


def folder(at):
    config = replace(CONFIGS["gemma3"], vocab=720)
    write_folder(at, config, random_weights(config))
    (at / "tokenizer.model").write_bytes(trained())
    weights = list(random_weights(config).items())
    shards = {f"model-0000{i + 1}-of-00002.safetensors": weights[i::2] for i in range(2)}
    for name, some in shards.items():
        write_safetensors(at / name, [(n, "F32", v.shape) for n, v in some], ([v] for _, v in some))
    index = {n: name for name, some in shards.items() for n, _ in some}
    (at / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (at / "model.safetensors").unlink()
    return at


def gguf(at):
    at.mkdir()
    config = CONFIGS["gemma2"]
    write_gguf(at / "model.gguf", config, random_weights(config), "Q8_0")
    return at / "model.gguf"


def mutated(data, choose):
    """Bytes with a few of: a bit turned, a number put in, a piece cut out, doubled or cut off. Headers come first."""
    data = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2, 5])):
        if not data:
            break
        reach = len(data) if choose.random() < 0.2 else min(len(data), 4000)
        at = choose.randrange(reach)
        kind = choose.randrange(6)
        if kind == 0:
            data[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            size = choose.choice([1, 2, 4, 8])
            data[at : at + size] = (choose.choice(EDGES) % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 2:
            data[at : at + 1] = str(choose.choice(EDGES)).encode()  # in JSON
        elif kind == 3:
            del data[at : at + choose.choice([1, 8, 100])]
        elif kind == 4:
            data[at:at] = data[at : at + choose.choice([1, 8, 100])]
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("make", [folder, gguf], ids=["folder", "gguf"])
def test_damaged_checkpoints(make, tmp_path, request, capsys):
    whole, minutes = make(tmp_path / "seed"), request.config.getoption("--fuzz-minutes")
    files = [whole] if whole.is_file() else sorted(whole.iterdir())
    originals = {file: file.read_bytes() for file in files}
    assert mg.load(whole).forward([1, 2, 3]).shape[0] == 3
    choose, ends = random.Random(time.time_ns() if minutes else 8), Counter()
    until = time.monotonic() + (minutes * 30 if minutes else SECONDS)
    while time.monotonic() < until:
        file = choose.choice(files)
        damaged = mutated(originals[file], choose)
        file.write_bytes(damaged)
        began = time.monotonic()
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                mg.load(whole, backend="numpy").forward([1, 2, 3])
            ends["ran"] += 1
        except mg.ModelFormatError as error:
            assert "\n" not in str(error)
            ends["refused"] += 1
        except Exception as error:
            kept = tmp_path / f"found-{file.name}"
            kept.write_bytes(damaged)
            raise AssertionError(f"{type(error).__name__}: {error} from {kept}") from error
        assert time.monotonic() - began < LIMIT, file.name
        file.write_bytes(originals[file])
    shutil.rmtree(tmp_path / "seed")
    assert ends["refused"] > 5 and ends["ran"]
    if minutes:
        with capsys.disabled():
            print(f"\n{make.__name__}: {sum(ends.values()):,} mutations, {dict(ends)}")
