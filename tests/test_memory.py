"""How much memory a run takes, measured from outside on a file of Gemma 3 1B's true shape."""

import subprocess
import sys

from synthetic import write_gemma3

from minigemma.config import RELEASED

PROGRAM = """
import resource, sys
import minigemma as mg
model = mg.load(sys.argv[1])
mg.generate(model, list(range(5, 605)), max_new_tokens=20)
cache = model.new_cache(620)
model.forward(range(5, 605), cache, last_only=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, cache.nbytes)
"""


def test_peak_memory_is_the_mapped_weights_the_cache_and_little_more(tmp_path, capsys):
    """A prompt of 600 tokens and 20 more; two caches exist for a moment."""
    weights = write_gemma3(tmp_path, RELEASED["gemma-3-1b"])
    run = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=True)
    (tmp_path / "model.safetensors").unlink()
    peak, cache = map(int, run.stdout.split())
    with capsys.disabled():
        parts = f"weights {weights / 1e6:,.0f} MB, cache {cache / 1e6:.0f} MB"
        print(f"\npeak memory of generate at 1B's shape: {peak / 1e6:,.0f} MB ({parts})")
    assert peak <= weights + cache + 300e6
