"""The real Gemma 3 270M: what it makes of prose is what transformers makes of it with the same weights.

The weights are the demo's GGUF file. The `gguf` package turns its blocks into float32, transformers runs those in
float32, and neither has a line in common with minigemma.
"""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import minigemma as mg  # noqa: E402

LENGTHS = (66, 300, 1300)  # tokens; the window is 512, so that the last one passes it twice
PROMPTS = ("Once upon a time", "The three laws of thermodynamics are")
NEW_TOKENS = 40

SIZES: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32_768,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Oracle(NamedTuple):
    """What transformers says, by number of tokens and by prompt."""

    logprobs: dict[int, np.ndarray]
    continuations: dict[str, list[int]]


def dequantized(path: Path) -> dict[str, Any]:
    """Every tensor of the file in float32, by transformers' names."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.endswith("norm.weight"):
            values = values - np.float32(1)  # llama.cpp stores 1 + w
        *layer, ours, _ = tensor.name.removeprefix("blk.").split(".")
        prefix = "model." + "".join(f"layers.{i}." for i in layer)
        tensors[f"{prefix}{NAMES[ours]}.weight"] = torch.from_numpy(values)
    return tensors


def transformers_model(path: Path) -> Any:
    """transformers in float32 on those tensors, with √640 rounded to bf16, as minigemma has it here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        model, report = Gemma3ForCausalLM.from_pretrained(
            None,
            config=Gemma3TextConfig(**SIZES),
            state_dict=dequantized(path),
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    scale = model.get_input_embeddings().embed_scale
    assert float(scale) == np.float32(640**0.5)
    scale.fill_(25.25)
    return model.eval()


def log_softmax_at(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log p(target) of each row."""
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    return logits[np.arange(len(targets)), targets] - top - np.log(total)


def ids_of_transformers(model: Any, ids: list[int]) -> list[int]:
    """The greedy continuation."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def logprobs_of_transformers(model: Any, ids: np.ndarray) -> np.ndarray:
    hidden = model.model(torch.from_numpy(ids)[None]).last_hidden_state[0, :-1]
    pieces = [
        log_softmax_at(model.lm_head(hidden[i : i + 256]).numpy(), ids[i + 1 : i + 257])
        for i in range(0, len(hidden), 256)
    ]
    return np.concatenate(pieces)


def logprobs_of_ours(model: Any, ids: np.ndarray) -> np.ndarray:
    cache = model.new_cache(len(ids))
    pieces = [
        log_softmax_at(model.forward(ids[i : i + 256], cache=cache)[: len(ids) - 1 - i], ids[i + 1 : i + 257])
        for i in range(0, len(ids) - 1, 256)
    ]
    return np.concatenate(pieces)


@pytest.fixture(scope="module")
def as_stored(demo_file):
    return mg.load(demo_file)


@pytest.fixture(scope="module")
def exact(demo_file, oracle):  # after the oracle, whose own gigabyte is free again by then
    return mg.load(demo_file, dtype="f32")


@pytest.fixture(scope="module")
def texts(as_stored, prose) -> dict[int, np.ndarray]:
    """Token ids by length: a piece each from other pages of the prose, BOS first."""
    ids = as_stored.tokenizer.encode(prose)
    starts = {66: 700, 300: 1700, 1300: 0}
    made = {n: np.array([2, *ids[starts[n] : starts[n] + n - 1]]) for n in LENGTHS}
    assert all(len(piece) == n for n, piece in made.items()), f"the prose has only {len(ids)} tokens"
    return made


@pytest.fixture(scope="module")
def prompts(as_stored) -> dict[str, list[int]]:
    return {prompt: [2, *as_stored.tokenizer.encode(prompt)] for prompt in PROMPTS}


@pytest.fixture(scope="module")
def oracle(demo_file, texts, prompts) -> Oracle:
    """transformers runs once; only its answers stay."""
    model = transformers_model(demo_file)
    answers = Oracle(
        {n: logprobs_of_transformers(model, ids) for n, ids in texts.items()},
        {prompt: ids_of_transformers(model, ids) for prompt, ids in prompts.items()},
    )
    del model
    gc.collect()
    return answers


def test_the_oracle_reads_prose_as_a_language_model_does(oracle):
    """A wrong oracle would agree with nothing but the same mistake: this one finds Austen and Carroll likely."""
    assert -4 < np.concatenate(list(oracle.logprobs.values())).mean() < -1


@pytest.mark.parametrize("tokens", LENGTHS)
def test_log_probabilities_as_stored(as_stored, texts, oracle, tokens):
    """The default mode: blocks of 8 bits, activations rounded where that is faster; 0.02 nats a token on average."""
    apart = np.abs(logprobs_of_ours(as_stored, texts[tokens]) - oracle.logprobs[tokens])
    assert apart.shape == (tokens - 1,)
    assert apart.mean() <= 0.02


@pytest.mark.parametrize("tokens", LENGTHS)
def test_log_probabilities_in_float32(exact, texts, oracle, tokens):
    apart = np.abs(logprobs_of_ours(exact, texts[tokens]) - oracle.logprobs[tokens])
    assert apart.shape == (tokens - 1,)
    assert apart.mean() <= 1e-3


def test_greedy_continuation_in_float32(exact, prompts, oracle):
    """Token by token through a cache, the likeliest each time."""
    ids = prompts[PROMPTS[0]]
    cache = exact.new_cache(len(ids) + NEW_TOKENS)
    made = [int(exact.forward(ids, cache=cache, last_only=True).argmax())]
    while len(made) < NEW_TOKENS:
        made.append(int(exact.forward(made[-1:], cache=cache).argmax()))
    assert made == oracle.continuations[PROMPTS[0]]


def test_generate_writes_the_continuation_of_transformers(exact, oracle):
    text = mg.generate(exact, PROMPTS[1], max_new_tokens=NEW_TOKENS, temperature=0.0)
    assert text == exact.tokenizer.decode(oracle.continuations[PROMPTS[1]])
