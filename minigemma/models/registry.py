"""The families that can be loaded: what a model's page says about itself, and the names of all tensors of a model.

A page ends with `FAMILY = Family(...)`, and models/__init__.py registers it. Loading, prompts, the command line and the
list of released models read only these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import TextConfig
from .decoder import Decoder
from .fields import Fields, Json
from .vision import VISION, VISION_LAYER, vision_axes

Table = dict[str, tuple[str, str, str]]  # our name → (name in a folder, name in a GGUF file or "", shape in letters)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a page says: its model, the tables of its paper and how its files are read."""

    name: str  # `config.family`
    title: str  # the paper's name of it
    model: type[Decoder]
    released: tuple[TextConfig, ...] = ()
    hub_ids: str = ""  # the released checkpoints, as Hugging Face names them, after "google/"
    tensors: Table  # of no layer
    layer_tensors: Callable[[Any, int], Table]  # of a layer of a config
    model_types: tuple[str, ...]  # of config.json
    flags: dict[str, Any] = field(default_factory=dict)  # what tells it from a family of the same model_type
    json_files: tuple[str, ...] = ()  # in the same folder; `from_json` finds each as a field of its name
    json_defaults: dict[str, Any]  # what config.json means by leaving a field out
    from_json: Callable[[Fields], TextConfig]
    architecture: str = ""  # of a GGUF header
    from_gguf: Callable[[Fields, int], TextConfig] | None = None  # its fields, rows of the embedding
    to_json: Callable[[Any], Json] | None = None  # the fields that `from_json` reads as this config
    to_gguf: Callable[[Any], Json] | None = None  # the fields that `from_gguf` reads, after the architecture's name
    system_turn: bool = False  # trained with a system text


FAMILIES: dict[str, Family] = {}
RELEASED: dict[str, TextConfig] = {}  # in the order of the reports


def register(family: Family) -> None:
    """Make a page's family loadable."""
    FAMILIES[family.name] = family
    RELEASED.update({config.name: config for config in family.released})


def released_ids() -> list[str]:
    """The released models as the hub names them: google/gemma-3-1b-it."""
    return [f"google/{name}" for family in FAMILIES.values() for name in family.hub_ids.split()]


def named(config: TextConfig) -> TextConfig:
    """The config with the name of the released model of these sizes, if there is one."""

    def sizes(c: TextConfig) -> tuple[Any, ...]:
        return c.family, c.width, c.layers, c.heads, c.kv_heads, c.head_dim, c.ffn_width

    return next((replace(config, name=r.name) for r in RELEASED.values() if sizes(r) == sizes(config)), config)


def layer_tensors(config: TextConfig, layer: int) -> Table:
    """The table of one layer of a model: our name → (folder's name, GGUF's name, shape)."""
    return FAMILIES[config.family].layer_tensors(config, layer)


def all_names(config: TextConfig, column: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, the file's name, shape) of every tensor of a model with this config.

    column: 0 for the names in a Hugging Face folder, without the prefix that they have there; 1 for those of GGUF.
    """
    tables = [("", "", FAMILIES[config.family].tensors)]
    prefix = ("layers.", "blk.")[column]
    tables += [(f"blocks.{i}.", f"{prefix}{i}.", layer_tensors(config, i)) for i in range(config.layers)]
    yield from _named(tables, column, config.axes)
    if vision := config.vision:
        prefix = ("vision_tower.encoder.layers.", "v.blk.")[column]
        tower = [("vision.", "", VISION)]
        tower += [(f"vision.blocks.{i}.", f"{prefix}{i}.", VISION_LAYER) for i in range(vision.layers)]
        yield from _named(tower, column, vision_axes(vision, config.width))


def _named(
    tables: list[tuple[str, str, Table]], column: int, axes: dict[str, int]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for ours, theirs, table in tables:
        for name, row in table.items():
            yield ours + name, theirs + row[column], tuple(axes[axis] for axis in row[2].split())
