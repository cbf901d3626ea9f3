"""What a checkpoint states about tokens and turns: chat template, end tokens, sampling settings, added tokens.

All files that may state one of them are read and merged: the end tokens are the union of all. A chat template is a
program; it is never run, but the marks in it tell which turn format the model was trained on.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelFormatError
from .known_keys import GENERATION, GENERATION_VALUES, changes_results
from .safetensors_file import DAMAGED, read_json, read_start, short

GEMMA_TURN = "<start_of_turn>"
SAMPLING = {
    "do_sample": bool,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}
SPELT = {"temp": "temperature"}  # in a GGUF header
AROUND_TEXT = {"add_bos_token": ("<bos>", True), "add_eos_token": ("<eos>", False)}  # a text follows <bos>
STARTS_WITHIN = 1 << 23  # bytes of tokenizer.json; Gemma 3's 6,415 added tokens end at 1.3 million
PLACES = r'"SpecialToken"\s*:\s*\{\s*"id"\s*:\s*"%s"'  # in a post-processor
EDGES = ("single_word", "lstrip", "rstrip")  # what an added token requires of, or takes from, the text around it
GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id", "eos_token_ids")  # after "tokenizer.ggml."


class AddedToken(NamedTuple):
    """A token in addition to those of tokenizer.model, or another name for one of them."""

    id: int
    text: str
    special: bool  # recognized in text only with control=True


@dataclass(frozen=True)
class Statements:
    """What the files of a checkpoint state, joined."""

    names: str  # of the model, as folders and files have it
    ends: tuple[int | str, ...] = (1,)  # tokens that end a text, by id or by name
    taught_turns: bool = False  # a folder with several end tokens names that of a turn
    template: str = ""  # "" if there is none
    sampling: Mapping[str, Any] = field(default_factory=dict)  # the fields of SAMPLING that are stated
    added: tuple[AddedToken, ...] = ()
    not_done: str = ""  # settings of the tokenizer that are not applied

    @property
    def instruction_tuned(self) -> bool:
        """Whether the model was taught turns: it has a chat template, several ends, or "it" in its name."""
        return bool(self.template) or self.taught_turns or re.search(r"(?i)(?<![a-z])it\b", self.names) is not None

    @property
    def foreign_turns(self) -> str:
        """The first mark of a chat template that is not Gemma's, such as "<|im_start|>"; "" where it is Gemma's."""
        if not self.template or GEMMA_TURN in self.template:
            return ""
        mark = re.search(r"<\|?[\w/ ]+\|?>|\[/?[A-Z]+\]", self.template)
        return mark[0] if mark else short(self.template)


UNSAID = Statements("")  # of a model that was made here


def folder_statements(folder: Path, config: Mapping[str, Any]) -> Statements:
    """What a Hugging Face folder states; `config`: the fields of its config.json. ModelFormatError for broken JSON."""
    generation, described = (_json(folder / name) for name in ("generation_config.json", "tokenizer_config.json"))
    end_names = (_content(each.get("eos_token")) for each in (described, _json(folder / "special_tokens_map.json")))
    ends = [*_ids(folder / "config.json", config), *_ids(folder / "generation_config.json", generation)]
    ends += [name for name in end_names if name and name != "<eos>"]
    hub = next((part for part in folder.absolute().parts if part.startswith("models--")), "")
    names = f"{folder.name} {hub} {config.get('_name_or_path', '')}"
    sampling = _sampling(folder / "generation_config.json", generation)
    ends = list(dict.fromkeys(ends))
    start = _before_vocabulary(folder / "tokenizer.json")
    added, not_done = _added(folder, start.get("added_tokens"), described), _not_done(described, start)
    return Statements(names, tuple(ends), len(ends) > 1, _template(folder, described), sampling, added, not_done)


def gguf_statements(path: Path, metadata: Mapping[str, Any]) -> Statements:
    """The statements of a GGUF header, arrays as lists; raises ModelFormatError for an end that is not an id."""
    tokens, ends = _under("tokenizer.ggml.", metadata), list[int]()
    for name in GGUF_ENDS:
        stated = tokens.get(name, [])
        for end in stated if isinstance(stated, list) else [stated]:
            if not isinstance(end, int):
                problem = f"tokenizer.ggml.{name} is {short(end)}; it must be an integer"
                raise ModelFormatError(path, problem, DAMAGED)
            ends.append(end)
    templates = [str(value) for key, value in metadata.items() if re.match(r"tokenizer\.chat_template\b", key)]
    names = " ".join(str(metadata.get(f"general.{key}", "")) for key in ("name", "finetune"))
    sampling = _sampling(path, {SPELT.get(k, k): v for k, v in _under("general.sampling.", metadata).items()})
    not_done, ends = _not_done(tokens, {}), list(dict.fromkeys(ends)) or [1]
    return Statements(f"{names} {path.name}", tuple(ends), False, "\n".join(templates), sampling, not_done=not_done)


def _under(prefix: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _not_done(stated: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """What the tokenizer's settings say about tokens around a text, where it differs from BOS before and none after.

    `start`: fields of tokenizer.json, whose post-processor alone says it in what transformers 5 writes.
    """
    other = []
    for name, (token, usual) in AROUND_TEXT.items():
        if name in stated:
            other += [f"{name} {short(stated[name])}"] if stated[name] != usual else []
        elif "post_processor" in start and (re.search(PLACES % token, start["post_processor"]) is not None) != usual:
            other.append(f"a post_processor {'without' if usual else 'with'} {token}")
    if _content(stated.get("bos_token")) not in (None, "<bos>"):
        other.append(f"bos_token {short(_content(stated['bos_token']))}")
    return ", ".join(other)


def _content(token: Any) -> str | None:
    """The text of a token that is given as text or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _ids(path: Path, stated: Mapping[str, Any]) -> list[int | str]:
    """The ids in eos_token_id, one or a list; 1 where it is absent, none where it is null."""
    ends = stated.get("eos_token_id", 1)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, int):
            raise ModelFormatError(path, f"eos_token_id has {short(end)}; ids are integers", DAMAGED)
    return ends


def _template(folder: Path, described: Mapping[str, Any]) -> str:
    """The chat template, from the three files that may hold one; of several templates, all of them."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_bytes()[: 1 << 20].decode("utf-8", "replace")
    stated = described.get("chat_template") or _json(folder / "chat_template.json").get("chat_template") or ""
    if isinstance(stated, list):
        stated = "\n".join(str(each.get("template")) for each in stated if isinstance(each, dict))
    return str(stated)


def _sampling(path: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The stated sampling settings, as numbers; unsupported ones are named in a warning."""
    others = {name: value for name, value in stated.items() if name not in SAMPLING and value is not None}
    ignored = [name for name, value in others.items() if changes_results(name, value, GENERATION, GENERATION_VALUES)]
    if ignored:
        told = ", ".join(f"{short(name)[1:-1]} {short(stated[name])}" for name in ignored)
        warnings.warn(f"{path}: {told} is not applied; minigemma has no such setting", stacklevel=2)
    found = {}
    for name, kind in SAMPLING.items():
        value = stated.get(name)
        if isinstance(value, (int, float)) and not (name == "top_k" and value == 0):  # transformers' 0: all tokens
            found[name] = kind(value)
    return found


def _added(folder: Path, listed: Any, described: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """The added tokens of tokenizer.json, tokenizer_config.json and added_tokens.json; of one id the first."""
    found: dict[int, AddedToken] = {}
    edges: list[str] = []

    def add(number: Any, text: Any, special: Any) -> None:
        if isinstance(text, str) and text and re.fullmatch(r"[0-9]{1,9}", str(number)):
            found.setdefault(int(number), AddedToken(int(number), text, bool(special)))

    tables = [(entry.get("id"), entry) for entry in listed or [] if isinstance(entry, dict)]
    for number, entry in [*tables, *_items(described.get("added_tokens_decoder"))]:
        if isinstance(entry, dict):
            add(number, entry.get("content"), entry.get("special", True))
            edges += [f"{name} of {short(entry.get('content'))}" for name in EDGES if entry.get(name)]
    for text, number in _items(_json(folder / "added_tokens.json")):
        add(number, text, True)
    if edges and (folder / "tokenizer.model").exists():  # else read_tokenizer_json refuses them
        told = ", ".join(dict.fromkeys(edges))
        warnings.warn(f"{folder}: {told} is not applied; only the name itself is found", stacklevel=2)
    return tuple(found.values())


def _before_vocabulary(path: Path) -> dict[str, Any]:
    """The list added_tokens and the JSON of post_processor, from the start of a tokenizer.json of 33 MB in Gemma 3."""
    start = read_start(path, STARTS_WITHIN).decode("utf-8", "ignore") if path.exists() else ""
    found: dict[str, Any] = {}
    for name, what in {"added_tokens": "list of added tokens", "post_processor": "post_processor"}.items():
        if place := re.search(rf'"{name}"\s*:\s*(?=[\[{{n])', start):
            try:
                value, end = json.JSONDecoder().raw_decode(start, place.end())
            except (ValueError, RecursionError):
                raise ModelFormatError(path, f"has a {what} that is not JSON, or not closed", DAMAGED) from None
            found[name] = value if name == "added_tokens" else start[place.end() : end]
    return found


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, dict) else ()
