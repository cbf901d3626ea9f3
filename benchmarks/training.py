"""A training step against PyTorch's: python -m benchmarks.training [gemma3 | recurrentgemma] [--rounds N] [--compile]

Loss, gradients of every parameter, clipping and AdamW for a "mini" (6 layers, width 256, 8,192 pieces; 8 sequences of
256 tokens) in float32, from the same weights and ids: minigemma, transformers on torch with its sdpa attention and
fused AdamW, with --compile also through torch.compile. RecurrentGemma's scan is a loop over time in transformers. All
take turns; other programs on the machine make a round slower, so the minimum counts. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minigemma.arrays import F32
from minigemma.config import TextConfig
from minigemma.formulas.cross_entropy import Targets
from minigemma.kernels.parallel import default_threads
from minigemma.models.backward import Batch, loss_and_gradients
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.parameters import model_of, refresh
from minigemma.models.recurrentgemma import RecurrentGemmaConfig
from minigemma.models.registry import all_names
from minigemma.train.optimizer import AdamW

SEQUENCES, LENGTH, RATE = 8, 256, 1e-5
SIZES = {"width": 256, "layers": 6, "heads": 4, "kv_heads": 1, "head_dim": 64, "ffn_width": 768, "vocab": 8192}
MINIS: dict[str, TextConfig] = {
    "gemma3": Gemma3Config(**SIZES, window=64, context=LENGTH),
    "recurrentgemma": RecurrentGemmaConfig(**SIZES, window=64, context=LENGTH, lru_width=256, gate_blocks=4),
}
Step = Callable[[], float]


def random_parameters(config: TextConfig) -> dict[str, F32]:
    """Random weights by our names, which keep the sizes of what passes through them."""
    rng, found = np.random.default_rng(0), {}
    for name, _, shape in all_names(config, 0):
        shape = (shape[2], shape[0]) if name.endswith("recurrent.conv") else shape
        size = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        found[name] = rng.standard_normal(shape, np.float32) * np.float32(size)
    return found


def our_step(config: TextConfig, parameters: dict[str, F32], ids: np.ndarray) -> Step:
    """minigemma: forward, backward, AdamW; returns the mean loss."""
    adam = AdamW(parameters)
    model = model_of(config, adam.parameters)
    starts = np.arange(0, SEQUENCES * LENGTH, LENGTH, dtype=np.int32)
    batch = Batch(np.ascontiguousarray(ids[:, :-1]).reshape(-1), starts)
    following = np.ascontiguousarray(ids[:, 1:]).reshape(-1, 1)
    targets = Targets(following, np.ones(following.shape, np.float32))

    def step() -> float:
        losses = loss_and_gradients(model, batch, targets, 1 / len(following), adam.gradients)
        adam.step(RATE, clip=1.0)
        refresh(model, adam.parameters)
        return float(losses.mean())

    return step


def torch_model(config: TextConfig, parameters: dict[str, F32]) -> Any:
    """transformers' model with the same weights."""
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    torch.set_num_threads(default_threads())
    torch.set_grad_enabled(True)
    c = config
    sizes: dict[str, Any] = {"hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads}
    sizes |= {"num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "vocab_size": c.vocab}
    sizes |= {"max_position_embeddings": c.context, "use_cache": False, "pad_token_id": 0}
    if isinstance(c, Gemma3Config):
        sizes |= {"intermediate_size": c.ffn_width, "sliding_window": c.window, "query_pre_attn_scalar": c.head_dim}
        made = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))
    else:
        assert isinstance(c, RecurrentGemmaConfig)
        sizes |= {"intermediate_size": 2 * c.ffn_width, "lru_width": c.lru_width}
        sizes |= {"attention_window_size": c.window + 1}  # its window counts the token itself
        made = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**sizes))
    tensors = {f"model.{theirs}": torch.tensor(parameters[ours]) for ours, theirs, _ in all_names(c, 0)}
    for name, tensor in tensors.items():
        if name.endswith("conv_1d.weight"):
            tensors[name] = tensor.T[:, None].contiguous()
    made.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return made.float().train()


def torch_step(model: Any, ids: np.ndarray, compiled: bool) -> Step:
    """The same through torch, its forward pass and loss compiled or not."""
    torch = importlib.import_module("torch")
    given, following = (torch.tensor(part).long() for part in (ids[:, :-1], ids[:, 1:]))

    def loss_of() -> Any:
        logits = model(given, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())

    run = torch.compile(loss_of) if compiled else loss_of
    return adam_step(model, RATE, run, weight_decay=0.1)


def adam_step(model: Any, rate: float, loss_of: Callable[[], Any], **settings: Any) -> Step:
    """A step of torch's AdamW on the loss that `loss_of` computes; returns the loss."""
    torch = importlib.import_module("torch")
    trained = [each for each in model.parameters() if each.requires_grad]
    adam = torch.optim.AdamW(trained, rate, (0.9, 0.95), fused=True, **settings)

    def step() -> float:
        adam.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        return float(loss.detach())

    return step


def fastest(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest time of each in seconds, over rounds in which they take turns; prints each time as it goes."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
            print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: min(seen) for name, seen in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=MINIS, default="gemma3")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="also through torch.compile, which takes minutes first")
    parser.add_argument("--alone", action="store_true", help="without torch")
    args = parser.parse_args()
    config = MINIS[args.family]
    parameters = random_parameters(config)
    ids = np.random.default_rng(1).integers(0, config.vocab, (SEQUENCES, LENGTH + 1)).astype(np.int32)
    steps = {"minigemma": our_step(config, parameters, ids)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses = {"minigemma": steps["minigemma"]()}
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if not args.alone:
        steps["torch"] = torch_step(torch_model(config, parameters), ids, compiled=False)
        if args.compile:
            steps["torch.compile"] = torch_step(torch_model(config, parameters), ids, compiled=True)
        losses |= {name: step() for name, step in steps.items() if name not in losses}
    times = fastest(steps, args.rounds)
    print(f"{args.family} mini, {SEQUENCES} x {LENGTH} tokens, {default_threads()} threads; {args.rounds} rounds")
    print("| program | first loss | ms, fastest round | tokens/s | minigemma is |\n|--|--|--|--|--|")
    for name, best in times.items():
        speed, ratio = SEQUENCES * LENGTH / best, best / times["minigemma"]
        print(f"| {name} | {losses[name]:.5f} | {1e3 * best:.0f} | {speed:,.0f} | {ratio:.2f} x as fast |")
    print(
        f"memory that minigemma's first step adds to weights, gradients and moments, kernels included: {memory:.0f} MB"
    )


if __name__ == "__main__":
    main()
