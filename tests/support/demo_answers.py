"""What transformers gives for the demo's Gemma 3 270M in float32: recorded, or asked live."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from support.compare import log_softmax_at
from support.oracles import answered_by
from support.transformers_answers import libraries

PROGRAMS = ("transformers", "torch", "gguf")
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


def dequantized(path: Path) -> dict[str, Any]:
    """Every tensor of the file in float32, by transformers' names."""
    import gguf
    import torch

    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.endswith("norm.weight"):
            values = values - np.float32(1)  # llama.cpp stores 1 + w
        *layer, ours, _ = tensor.name.removeprefix("blk.").split(".")
        prefix = "model." + "".join(f"layers.{i}." for i in layer)
        tensors[f"{prefix}{NAMES[ours]}.weight"] = torch.from_numpy(values)
    return tensors


@functools.lru_cache(maxsize=1)
def model_of(path: Path) -> Any:
    """transformers in float32 on those tensors, with √640 rounded to bf16, as minigemma has it here."""
    torch, transformers = libraries()
    model, report = transformers.Gemma3ForCausalLM.from_pretrained(
        None,
        config=transformers.Gemma3TextConfig(**SIZES),
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


@answered_by(*PROGRAMS, file="demo")
def continuation(path: Path, ids: list[int], tokens: int) -> list[int]:
    """The greedy one."""
    torch, _ = libraries()
    out = model_of(path).generate(
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


@answered_by(*PROGRAMS, file="demo")
def logprobs(path: Path, ids: np.ndarray) -> np.ndarray:
    """log p of every token but the first."""
    torch, _ = libraries()
    model = model_of(path)
    with torch.no_grad():
        hidden = model.model(torch.from_numpy(ids)[None]).last_hidden_state[0, :-1]
        chunks = [
            log_softmax_at(model.lm_head(hidden[i : i + 256]).numpy(), ids[i + 1 : i + 257])
            for i in range(0, len(hidden), 256)
        ]
    return np.concatenate(chunks)
