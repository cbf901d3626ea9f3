"""Logits recorded before the package was rearranged: whatever moves, the numbers stay.

    python tests/models/test_frozen_logits.py      records them again (tests/data/frozen_logits.npz)

The recording is commit 03e9519 on a processor with AVX2. The order in which sums are made depends on the width of a
vector, so the same machine repeats it to the last bit and others agree to within rounding.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # where pytest did not

from support.tensors import text_shapes

import minigemma as mg

PATH = Path(__file__).parents[1] / "data" / "frozen_logits.npz"
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 160,
    "max_position_embeddings": 640,
}
WINDOWED = {"sliding_window": 7, "query_pre_attn_scalar": 32}
CONFIGS = {
    "gemma": SIZES | {"model_type": "gemma", "num_hidden_layers": 2},
    "gemma2": SIZES | WINDOWED | {"model_type": "gemma2", "num_hidden_layers": 3},
    "gemma3": SIZES | WINDOWED | {"model_type": "gemma3_text", "num_hidden_layers": 7},
    "recurrentgemma": {
        "model_type": "recurrent_gemma",
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "lru_width": 64,
        "intermediate_size": 192,
        "vocab_size": 160,
        "attention_window_size": 7,
        "conv1d_width": 4,
    },
}
CHUNKS = (5, 1, 1, 2, 7, 1, 3, 20, 1, 17, 1)  # through windows of 7 several times
IDS = np.random.default_rng(5).integers(0, 160, sum(CHUNKS))
RUN = ("f32", "bf16", "int8", "int4-symmetric")
STORED = ("sfp8", "int8-row", "int4-row")
NAMED = {"int4-symmetric": "int4"}  # as it was called when this was recorded


def write(folder, family):
    """A checkpoint of true names with random weights, float32."""
    config, rng = CONFIGS[family], np.random.default_rng(3)
    tensors = {
        name: rng.standard_normal(shape, np.float32) * np.float32(0.1 if shape[1:] else 0.5)
        for name, shape in text_shapes(config)
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits(folder, dtype, backend="numba"):
    """Of every third of IDS, [2, T / 3, V]: in one call, then in CHUNKS over a cache."""
    model = mg.load(folder, dtype=dtype, backend=backend, threads=2 if backend == "numba" else 1)
    cache, chunks = model.new_cache(len(IDS)), np.split(IDS, np.cumsum(CHUNKS)[:-1])
    both = np.stack([model.forward(IDS), np.concatenate([model.forward(chunk, cache) for chunk in chunks])])
    return both[:, ::3]


@pytest.fixture(scope="module")
def frozen():
    with np.load(PATH) as file:
        return dict(file)


@pytest.fixture(scope="module", params=CONFIGS)
def written(request, tmp_path_factory):
    return request.param, write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("dtype", RUN)
def test_kernels_say_what_they_said(dtype, written, frozen):
    family, folder = written
    before, now = frozen[f"{family} {NAMED.get(dtype, dtype)} numba"], logits(folder, dtype)
    # int8 and int4 round activations: a last digit that differs before may fall on the other side of a half.
    off_by = {"f32": 1e-5, "bf16": 2e-3, "int8": 5e-3, "int4-symmetric": 5e-2}[dtype]
    np.testing.assert_allclose(now, before, atol=off_by * np.abs(before).max())


@pytest.mark.parametrize("dtype", RUN + STORED)
def test_definitions_say_what_they_said(dtype, written, frozen):
    family, folder = written
    before, now = frozen[f"{family} {NAMED.get(dtype, dtype)} numpy"], logits(folder, dtype, "numpy")
    # Another processor's sums round a key to the next bf16. Stored forms were recorded as they were; loading now rounds
    # them, SFP8 to bf16 and a row's scale to float16: by up to 1.4e-2, 6.2e-3 and 4.1e-3.
    off_by = {"f32": 2e-5, "sfp8": 2e-2, "int8-row": 1e-2, "int4-row": 1e-2}.get(dtype, 2e-3)
    np.testing.assert_allclose(now, before, atol=off_by * np.abs(before).max())


def record():
    """Write the recording."""
    arrays = {}
    for family in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), family)
            for dtype in RUN + STORED:
                for backend in ("numba", "numpy") if dtype in RUN else ("numpy",):
                    key = f"{family} {NAMED.get(dtype, dtype)} {backend}"
                    arrays[key] = logits(Path(folder), dtype, backend)
                    if "--equal" in sys.argv:
                        with np.load(PATH) as file:
                            before = file[key]
                        off = np.abs(arrays[key] - before).max() / np.abs(before).max()
                        print(f"{family} {dtype} {backend}: {off:.1e}")
    if "--equal" not in sys.argv:
        np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    record()
