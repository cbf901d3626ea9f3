"""Four bits from llama.cpp at the shape of a released model: python -m benchmarks.q4_k (needs the package gguf)

Writes a GGUF file of random weights with the matrices of all layers in Q4_K and the embedding in Q8_0, and prints what
running it costs compared with its own float32 weights, its speed compared with the same weights in int8, and how much
memory gemma-3-27b takes as llama.cpp's Q4_K_M.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import minigemma as mg
from minigemma.arrays import F32
from minigemma.files.convert import Stored, held_bytes
from minigemma.layouts import int8
from minigemma.models.decoder import Decoder
from minigemma.models.registry import FAMILIES, RELEASED, all_names

from .training import fastest

SUB_BLOCKS, LARGEST = 8, 63  # of a block of 256 weights, and of a 6-bit scale
Q6_K_ROLES = ("attention.v", "ffn.down")  # which Q4_K_M stores in Q6_K in about half of the layers


def q4_k(x: F32) -> NDArray[np.uint8]:
    """float32 [R, D] → Q4_K [R, D / 256 · 144]: each sub-block of 32 from its smallest to its largest weight."""
    x = x.reshape(-1, SUB_BLOCKS, 32)
    low = np.minimum(x.min(-1), 0)
    step = (x.max(-1) - low) / 15
    d, m = ((each.max(-1, keepdims=True) / LARGEST).astype(np.float16) for each in (step, -low))
    s, t = (np.clip(np.rint(a / b), 0, LARGEST).astype(np.uint8) for a, b in ((step, d), (-low, m)))
    scale, minimum = (a.astype(np.float32) * b for a, b in ((d, s), (m, t)))
    q = np.clip(np.rint((x + minimum[..., None]) / np.maximum(scale, 1e-20)[..., None]), 0, 15).astype(np.uint8)
    upper = [(each[:, 4:] >> 4) << 6 | each[:, :4] for each in (s, t)]
    lower = (s[:, 4:] & 15) | (t[:, 4:] & 15) << 4
    pairs = q.reshape(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(q), -1)
    return np.concatenate([d.view(np.uint8), m.view(np.uint8), *upper, lower, nibbles], axis=-1)


def write(path: Path, config: Any) -> None:
    """Writes random weights of this shape by the package gguf.

    Post-norms of 8 let the layers outweigh the embedding, else every token would predict itself; a final norm of 3
    gives logits the standard deviation of 3 that a trained model has.
    """
    import gguf

    family, rng = FAMILIES[config.family], np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, family.architecture)
    for name, value in family.to_gguf(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{family.architecture}.{name}", value)
    for ours, theirs, shape in all_names(config, 1):
        w = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
        if len(shape) == 1:
            gain = 8 if "post_norm" in ours else 3 if ours == "final_norm" else 1
            writer.add_tensor(theirs, np.float32(gain) + w)
        elif ours == "embedding":
            blocks = int8.pack(w).reshape(shape[0], -1)
            writer.add_tensor(theirs, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(theirs, q4_k(w).reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def mean_kl(exact: Decoder, other: Decoder, ids: NDArray) -> float:
    """Mean KL(exact ‖ other) in nats over the positions of ids, in float64."""
    p, q = (model.forward(ids).astype(np.float64) for model in (exact, other))
    p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def milliseconds(models: dict[str, Decoder], repeat: int) -> dict[str, float]:
    """The shortest time of one token after 16 others, all logits; the models take turns."""
    caches = {name: model.new_cache(32 + repeat) for name, model in models.items()}
    for name, model in models.items():
        model.forward(range(2, 18), caches[name])
    runs = {name: partial(model.forward, [5], caches[name]) for name, model in models.items()}
    return {name: 1e3 * seconds for name, seconds in fastest(runs, repeat).items()}


def q4_k_m_bytes(name: str) -> int:
    """Memory of a released model's weights as llama.cpp's Q4_K_M stores and minigemma runs them."""
    config, total = replace(RELEASED[name], vision=None), 0
    n, eighth = config.layers, config.layers // 8
    more = {i for i in range(n) if i < eighth or i >= 7 * n // 8 or (i - eighth) % 3 == 2}
    for ours, _, shape in all_names(config, 1):
        _, layer, *role = ours.split(".") if ours.startswith("blocks.") else ("", "-1", ours)
        wider = ours == "embedding" or (int(layer) in more and ".".join(role) in Q6_K_ROLES)
        kind = "F32" if len(shape) == 1 else "Q6_K" if wider else "Q4_K"
        total += held_bytes(ours, Stored(ours, kind, shape, np.empty(0)), None)
    return total


def main() -> None:
    """Prints the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=RELEASED, default="gemma-2-2b", help="default: gemma-2-2b")
    parser.add_argument("--layers", type=int, default=2, help="of this shape, vocabulary in proportion (default: 2)")
    parser.add_argument("-r", "--repeat", type=int, default=31, help="tokens timed (default: 31)")
    args = parser.parse_args()
    whole = RELEASED[args.shape]
    vocab = whole.vocab * args.layers // whole.layers // 16 * 16
    config = replace(whole, layers=args.layers, vocab=vocab, vision=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "q4_k.gguf"
        write(path, config)
        four, exact = mg.load(path), mg.load(path, dtype="f32")
        ids = np.random.default_rng(1).integers(2, vocab, 128)
        kl = mean_kl(exact, four, ids)
        del exact
        times = milliseconds({"int4": four, "int8": mg.load(path, dtype="int8")}, args.repeat)
    print(f"{args.shape}, {args.layers} of {whole.layers} layers, vocabulary of {vocab:,}, Q4_K:")
    print(f"  mean KL from its own float32 weights  {kl:.2g} nats, of {len(ids)} random tokens")
    print(f"  one token  {times['int4']:.2f} ms; as int8 {times['int8']:.2f} ms, {times['int8'] / times['int4']:.2f} x")
    cache, held = RELEASED["gemma-3-27b"].cache_bytes(8192) / 1e9, q4_k_m_bytes("gemma-3-27b") / 1e9
    print(f"gemma-3-27b as Q4_K_M: {held:.1f} GB of weights, {cache:.1f} GB of keys and values for 8,192 tokens")


if __name__ == "__main__":
    main()
