"""What transformers gives for a folder of ours, in float32 with its plainest attention: recorded, or asked live."""

from __future__ import annotations

import functools
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from support.oracles import answered_by

PROGRAMS = ("transformers", "torch")


@functools.cache
def libraries() -> tuple[Any, Any]:
    """(torch, transformers); one thread, since models this small gain nothing from a second one, and it would wait
    busily while ours work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other people's packages deprecate is not ours to mend
        import torch
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return torch, transformers


def model_of(folder: Path, attention: str = "eager", **changes: Any) -> Any:
    """transformers' model of a folder; `changes` replace fields of its text config.

    DeepMind ran everything in bf16 and so with √width rounded to bf16; minigemma rounds it wherever the embedding is
    stored in bf16. transformers keeps it as a float32 buffer, which it casts to the dtype of the weights at each use:
    unrounded once they are float32. So the buffer of a bf16 file is set to the rounded value here. RecurrentGemma has
    it as a bf16 constant, whatever the weights are; and its window counts the token itself, ours and DeepMind's do not.
    """
    torch, transformers = libraries()
    config = transformers.AutoConfig.from_pretrained(folder)
    stored_bf16, text = config.dtype == torch.bfloat16, config.get_text_config()
    if recurrent := config.model_type == "recurrent_gemma":
        changes = {"attention_window_size": config.attention_window_size + 1, "use_cache": False} | changes
    for name, value in changes.items():
        setattr(text, name, value)
    model, report = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    left = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    assert not left, f"transformers did not find its own tensors: {left}"
    if stored_bf16 and not recurrent:
        round_embedding_scale(model)
    return model.eval()


held = functools.lru_cache(maxsize=8)(model_of)  # for models that no test changes


def round_embedding_scale(model: Any) -> None:
    """√width as bf16 has it, in a model that runs in float32."""
    torch, _ = libraries()
    scale = model.get_input_embeddings().embed_scale
    scale.copy_(scale.to(torch.bfloat16).to(torch.float32))


def run(model: Any, ids: np.ndarray, images: np.ndarray | None = None, blocks: bool = True) -> np.ndarray:
    """Logits [T, V] of all of ids at once; without `blocks` an image's tokens see as those of text do."""
    torch, _ = libraries()
    tokens, more = torch.tensor(np.asarray(ids))[None], {}
    if model.config.model_type == "gemma3":
        more["token_type_ids"] = (tokens == model.config.image_token_id).long() if blocks else None
        more["pixel_values"] = None if images is None or not len(images) else torch.tensor(images)
    with torch.no_grad():  # without a cache, since RecurrentGemma would keep its state from one call to the next
        return model(tokens, use_cache=False, **more).logits[0].numpy()


def tower_and_soft_tokens(model: Any, images: np.ndarray) -> list[np.ndarray]:
    """The tower's last hidden states [n, P, C], and soft tokens [n, tokens, D]."""
    torch, _ = libraries()
    with torch.no_grad():
        found = model.get_image_features(torch.tensor(images), return_dict=True)
    return [found.last_hidden_state.numpy(), found.pooler_output.numpy()]


def tensors_seen(model: Any, wanted: Any, *prompt: Any) -> dict[str, float]:
    """How far logits move, relative to the largest, when a tensor's last axis is rolled by one: by its name."""
    torch, _ = libraries()
    right, seen = run(model, *prompt), {}
    for name, parameter in model.named_parameters():
        if wanted(name):
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.copy_(kept.roll(1, -1))
                seen[name] = float(np.abs(run(model, *prompt) - right).max() / np.abs(right).max())
                parameter.copy_(kept)
    return seen


def saved_again(folder: Path, to: Path) -> None:
    """A model of the same config, as transformers itself makes and saves it."""
    _, transformers = libraries()
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])(config)
    model.to(config.dtype).save_pretrained(to)


@answered_by(*PROGRAMS, file="text")
def text_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    return run(held(folder), ids)


@answered_by(*PROGRAMS, file="embeddings")
def embedding(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Of a folder of sentence-transformers, its modules in torch: mean, two matrices, normalize."""
    torch, _ = libraries()
    from safetensors.torch import load_file

    with torch.no_grad():
        x = held(folder)(torch.tensor(ids)[None]).last_hidden_state.mean(1)
        for part in ("2_Dense", "3_Dense"):
            x = x @ load_file(folder / part / "model.safetensors")["linear.weight"].float().T
        return torch.nn.functional.normalize(x, dim=-1)[0].numpy()


@answered_by(*PROGRAMS, file="recurrent")
def recurrent_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    return run(held(folder), ids)


@answered_by(*PROGRAMS, file="recurrent")
def logits_of_other_weights(folder: Path, ids: np.ndarray, name: str, _weights: dict[str, np.ndarray]) -> np.ndarray:
    """With some of the weights replaced: by those that are left of them in the format `name`."""
    torch, _ = libraries()
    model = model_of(folder)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in _weights.items():
            tensors[name].copy_(torch.from_numpy(values))
    return run(model, ids)


@answered_by(*PROGRAMS, file="vision")
def vision_logits(folder: Path, ids: np.ndarray, images: np.ndarray | None = None) -> np.ndarray:
    return run(held(folder), ids, images)


@answered_by(*PROGRAMS, file="vision_long")
def every_ninth_logit(folder: Path, ids: np.ndarray, images: np.ndarray) -> np.ndarray:
    return run(held(folder), ids, images)[:, ::9]


@answered_by(*PROGRAMS, file="towers")
def image_features(folder: Path, images: np.ndarray) -> list[np.ndarray]:
    return tower_and_soft_tokens(held(folder), images)


@answered_by(*PROGRAMS, file="facts")
def says_the_same(folder: Path, other: Path, ids: np.ndarray, images: np.ndarray | None = None) -> bool:
    """Whether transformers gives the same bits for two folders."""
    return bool(np.array_equal(run(held(folder), ids, images), run(held(other), ids, images)))


@answered_by(*PROGRAMS, file="facts")
def parameters(folder: Path, module: str = "") -> int:
    """How many numbers a model, or a module of it, holds."""
    return sum(parameter.numel() for parameter in held(folder).get_submodule(module).parameters())


@answered_by("transformers", file="facts")
def stated(folder: Path, names: list[str]) -> list[Any]:
    """Fields of a config, dotted where they are inside another, as transformers completes it."""
    _, transformers = libraries()
    config = transformers.AutoConfig.from_pretrained(folder)
    return [functools.reduce(getattr, name.split("."), config) for name in names]


@answered_by(*PROGRAMS, file="gradients")
def gradients(folder: Path, ids: np.ndarray, starts: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> list[Any]:
    """Each token's loss [T] for targets [T, k] and their weights, then by autograd the gradient of its sum by each
    tensor, in the order of the tensors' names: some of its numbers. Each sequence goes through the model by itself.
    """
    torch, _ = libraries()
    model, losses = model_of(folder), []
    with torch.enable_grad():
        for first, last in pairwise([*starts.tolist(), len(ids)]):
            z = model(torch.tensor(ids[first:last])[None], use_cache=False).logits[0].double()
            some = z.gather(1, torch.tensor(chosen[first:last]).long())
            loss = (torch.tensor(weights[first:last]) * (z.logsumexp(-1, keepdim=True) - some)).sum(-1)
            loss.sum().backward()
            losses.append(loss.detach().float().numpy())
    found = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}
    return [np.concatenate(losses), np.concatenate([sample(found[name]) for name in sorted(found)])]


def sample(x: np.ndarray) -> np.ndarray:
    """At most 300 numbers from all over an array, the largest first."""
    flat = x.reshape(-1)
    return np.concatenate([flat[[np.abs(flat).argmax()]], flat[:: -(-flat.size // 299)]])
