"""Models: a paper a page. A new variant is a new page and its name here."""

from . import embeddinggemma, gemma, gemma2, gemma3, recurrentgemma, vaultgemma
from .registry import register

for page in (gemma, gemma2, vaultgemma, gemma3, embeddinggemma, recurrentgemma):
    register(page.FAMILY)
