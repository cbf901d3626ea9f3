"""The embeddings of texts, of an encoder: EmbeddingGemma (models/embeddinggemma.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import F32
from ..models.decoder import Decoder
from ..models.embeddinggemma import EmbeddingGemma
from .prompt import text_ids


def embed(model: Decoder, texts: str | Sequence[str], prompt_name: str | None = None) -> F32:
    """The embedding of each text, a row of length 1: float32 [texts, E], whose dot products are cosines.

    prompt_name: the task, one of the checkpoint's prompts ("query", "document", …), whose text is put in front; None
    takes the default one, if the checkpoint names one.

    Raises ValueError for a model that is no encoder, an unknown prompt, and a text longer than the context.
    """
    if not isinstance(model, EmbeddingGemma):
        raise ValueError(f"{model.name or 'this model'} is no encoder; take EmbeddingGemma, embeddinggemma-300m")
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer.model")
    prompts, tokenizer, rows = model.config.prompts, model.tokenizer, []
    if prompt_name is not None and prompt_name not in prompts:
        known = ", ".join(sorted(filter(None, prompts))) or "none"
        raise ValueError(f"prompt_name is {prompt_name!r}; this checkpoint has {known}")
    prompt = prompts.get(prompt_name or "", "")
    for text in [texts] if isinstance(texts, str) else texts:
        ids = [*text_ids(tokenizer, (prompt + text).strip()), tokenizer.eos]
        if len(ids) > model.config.context:
            told = f"a text has {len(ids):,} tokens and the context holds {model.config.context:,}"
            raise ValueError(f"{told}; shorten it: {text[:40]!r} …")
        rows.append(model.embed(ids))
    return np.stack(rows) if rows else np.empty((0, model.config.outputs), np.float32)
