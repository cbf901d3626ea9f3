"""How much memory a run takes, in a process of its own: the high-water mark that Linux keeps for it.

It is not ru_maxrss, which begins at what the process that started it had.
"""

import subprocess
import sys
from dataclasses import replace

from support.synthetic import write_gemma3

from minigemma.models.registry import RELEASED

PROGRAM = """
import re, sys
import minigemma as mg
model = mg.load(sys.argv[1])
mg.generate(model, list(range(5, 605)), max_new_tokens=20, temperature=0)
cache = model.new_cache(620)
model.forward(range(5, 605), cache, last_only=True)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]), cache.nbytes)
"""


def peak_of_a_run(folder):
    """(peak resident bytes, bytes of the cache) of a process that loads the model and generates."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, folder], capture_output=True, text=True, check=True)
    return tuple(map(int, run.stdout.split()))


def test_peak_memory_is_the_mapped_weights_the_cache_and_little_more(tmp_path, capsys):
    """Seven layers, a prompt of 600 tokens and 20 more; two caches exist for a moment. A run before has compiled the
    kernels, which takes about 100 MB more.
    """
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir(), large.mkdir()
    shape = replace(RELEASED["gemma-3-1b"], layers=7)
    write_gemma3(small, replace(shape, width=64, ffn_width=96, vocab=1000))
    peak_of_a_run(small)
    weights = write_gemma3(large, shape)
    peak, cache = peak_of_a_run(large)
    (large / "model.safetensors").unlink()
    with capsys.disabled():
        parts = f"weights {weights / 1e6:,.0f} MB, cache {cache / 1e6:.0f} MB"
        print(f"\npeak memory of generate at 1B's width: {peak / 1e6:,.0f} MB ({parts})")
    assert peak <= weights + cache + 300e6


LOOK = """
import re, sys
from dataclasses import replace
import numpy as np
from minigemma.models.registry import RELEASED
from minigemma.cli.measure import weight_bytes
from minigemma.cli.random_weights import random_model
config = RELEASED["gemma-3-4b"]
side = int(sys.argv[1])
few = replace(config.vision, layers=2, side=side)
model = random_model(replace(config, layers=1, vocab=1000, vision=few), "bf16")
pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
model.image_features(pixels)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]), weight_bytes(model.weights))
"""


def test_an_image_takes_the_towers_weights_and_little_more():
    """At SigLIP's true width, with two of its 27 layers: what one layer computes is gone before the next begins. The
    first run, of a small image, compiles the kernels, which takes memory of its own.
    """
    for side in ("224", "896"):
        run = subprocess.run([sys.executable, "-c", LOOK, side], capture_output=True, text=True, check=True)
    peak, weights = map(int, run.stdout.split())
    assert peak < weights + 700_000_000
