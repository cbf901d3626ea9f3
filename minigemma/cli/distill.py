"""`minigemma distill`: a small model that learns a larger one's distribution of the next token."""

from .train import run

__all__ = ["run"]
