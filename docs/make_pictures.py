"""Draws docs/architecture/*.svg from the configs: one page for each family, and the way of one token through the 270M.

python docs/make_pictures.py           write the drawings
python docs/make_pictures.py --check   exit 1 if a drawing is older than the code
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from math import prod
from pathlib import Path
from typing import Any

from minigemma.config import TextConfig, VisionConfig
from minigemma.models.registry import FAMILIES, RELEASED, all_names

FOLDER = Path(__file__).parent / "architecture"
DRAWN = {"gemma": "gemma-2b", "gemma2": "gemma-2-2b", "gemma3": "gemma-3-4b", "recurrentgemma": "recurrentgemma-2b"}
PAPERS = {"gemma": "2403.08295", "gemma2": "2408.00118", "gemma3": "2503.19786", "recurrentgemma": "2404.07839"}
INK, SOFT, PAPER, LINE = "#1b1f24", "#57606a", "#ffffff", "#8b949e"
LOCAL, GLOBAL, RECURRENT = "#2f6db3", "#e07b39", "#3a9a6d"  # as in notebooks/figures.py
KINDS = {"local": LOCAL, "global": GLOBAL, "recurrent": RECURRENT}
PARTS = {"embedding": "#8c8c8c", "attention": LOCAL, "recurrent": RECURRENT, "feed-forward": "#8a5fb0", "norms": GLOBAL}
NORM, MATRIX, PLAIN, STATE = "#fff4e5", "#e9f0fa", "#f3f5f8", "#e8f5ee"
BRANCH = 290  # width of a branch's boxes
STEP = 46  # from a box to the next one below


class Page:
    """An SVG that is drawn from the top down."""

    def __init__(self, width: int) -> None:
        self.width, self.height, self.shapes = width, 0.0, list[str]()

    def text(self, x: float, y: float, words: str, size: float = 12, color: str = INK, **more: Any) -> None:
        """Words; `anchor` and `weight` as in SVG."""
        anchor, weight = more.get("anchor", "start"), more.get("weight", "normal")
        self.height = max(self.height, y)
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, width: float, words: str, fill: str = PLAIN, **more: Any) -> None:
        """A box 28 high around words, or around nothing."""
        high, stroke = more.get("height", 28), more.get("stroke", LINE)
        self.height = max(self.height, y + high)
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{high:g}" rx="4" fill="{fill}" stroke="{stroke}"/>'
        )
        if words:
            self.text(x + width / 2, y + high / 2 + 4, words, 12, anchor="middle")

    def line(self, *points: tuple[float, float], arrow: bool = True, dashed: bool = False) -> None:
        """A line through points, with an arrow at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        style = ' marker-end="url(#arrow)"' * arrow + ' stroke-dasharray="4 3"' * dashed
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.3"{style}/>')

    def column(self, x: float, y: float, width: float, steps: Sequence[tuple[str, str, str]]) -> float:
        """Boxes from the top down: (words, fill, shape that leaves the box). Returns the y below the last arrow."""
        for words, fill, shape in steps:
            self.box(x, y, width, words, fill)
            self.line((x + width / 2, y + 28), (x + width / 2, y + STEP - 1))
            self.text(x + width / 2 + 7, y + 41, shape, 11, SOFT)
            y += STEP
        return y

    def plus(self, x: float, y: float) -> None:
        """⊕, where a branch is added to the residual stream."""
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="{PAPER}" stroke="{LINE}"/>')
        self.text(x, y + 5, "+", 15, anchor="middle")

    def svg(self, description: str) -> str:
        """The drawing."""
        high = self.height + 20
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {high:g}" width="{self.width}" '
            f'height="{high:g}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img">'
        )
        mark = (
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
        )
        paper = f'<rect width="{self.width}" height="{high:g}" fill="{PAPER}"/>'
        return "\n".join([head, f"<title>{escape(description)}</title>", mark, paper, *self.shapes, "</svg>"]) + "\n"


def parameters(config: TextConfig) -> dict[str, int]:
    """The text model's parameters by part, counted from the table of tensors that loading uses."""
    found: Counter[str] = Counter()
    for name, _, shape in all_names(config, 0):
        part = name.removeprefix("blocks.").partition(".")[2] if name.startswith("blocks.") else name
        if not name.startswith("vision."):
            norm = part.endswith("norm") and "q_norm" not in part and "k_norm" not in part
            kind = {"ffn": "feed-forward", "final_norm": "norms"}.get(part.split(".")[0], part.split(".")[0])
            found["norms" if norm else kind] += prod(shape)
    return {part: found[part] for part in PARTS if found[part]}


def millions(count: int) -> str:
    """2,614,341,888 → "2,614 M"; below ten millions with two decimals."""
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.2f} M"


def pattern(config: TextConfig) -> str:
    """The layers in words: "5 local, 1 global, and so on"."""
    kinds = [config.kind(i) for i in range(config.layers)]
    if len(set(kinds)) == 1:
        return f"{config.layers} layers, all {kinds[0]}"
    period = next(n for n in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))
    runs: list[list[Any]] = []
    for kind in kinds[:period]:
        if runs and runs[-1][0] == kind:
            runs[-1][1] += 1
        else:
            runs.append([kind, 1])
    return f"{config.layers} layers: " + ", ".join(f"{count} {kind}" for kind, count in runs) + ", …"


def attention_steps(config: TextConfig, layer: int) -> Iterator[tuple[str, str, str]]:
    """The boxes of an attention branch, from the norm to what is added to the residual stream."""
    a, D, N, K, H = config.attention(layer), config.width, config.heads, config.kv_heads, config.head_dim
    heads = f"q [T, {N}, {H}]  k, v [T, {K}, {H}]"
    yield "RMSNorm", NORM, f"[T, {D:,}]"
    yield "W_q, W_k, W_v", MATRIX, heads
    if config.head_norms:
        yield "RMSNorm of each q and k head", NORM, heads
    part = "" if a.rope_fraction == 1 else f" of {a.rotated} of {H} numbers"
    yield f"rope{part}, {bases(config)}", PLAIN, heads
    capped = f", scores capped at {a.soft_cap:g}" if a.soft_cap else ""
    yield f"attention to the keys in the cache{capped}", PLAIN, f"[T, {N} · {H}]"
    yield ("W_o + b" if config.family == "recurrentgemma" else "W_o"), MATRIX, f"[T, {D:,}]"
    if config.norms_per_block == 4:
        yield "RMSNorm", NORM, f"[T, {D:,}]"


def bases(config: TextConfig) -> str:
    """The rope bases of a model's kinds of layers, and what divides positions."""
    layers = [config.attention(i) for i in range(config.layers) if config.kind(i) != "recurrent"]
    scales = [f" (position / {a.rope_scale:g})" if a.rope_scale != 1 else "" for a in layers]
    found = dict.fromkeys(f"{a.rope_base:,.0f}{scale}" for a, scale in zip(layers, scales, strict=True))
    return f"base{'s' * (len(found) > 1)} " + " and ".join(found)


def recurrent_steps(config: Any) -> Iterator[tuple[str, str, str]]:
    """The boxes of a recurrent branch."""
    D, E, M = config.width, config.lru_width, config.gate_blocks
    yield "RMSNorm", NORM, f"[T, {D:,}]"
    yield "W_x + b, W_y + b", MATRIX, f"two of [T, {E:,}]"
    yield f"conv1d over {config.conv_width} tokens (x branch)", PLAIN, f"[T, {E:,}]"
    yield f"gates r, i: {M} blocks of {E // M} x {E // M}", MATRIX, f"x, r, i [T, {E:,}]"
    yield "RG-LRU: h = a · h + √(1 − a²) · i · x", STATE, f"h [T, {E:,}]"
    yield "times gelu(y branch)", PLAIN, f"[T, {E:,}]"
    yield "W_out + b", MATRIX, f"[T, {D:,}]"


def feed_forward_steps(config: TextConfig) -> Iterator[tuple[str, str, str]]:
    """The boxes of the feed-forward branch."""
    D, F, bias = config.width, config.ffn_width, " + b" if config.family == "recurrentgemma" else ""
    yield "RMSNorm", NORM, f"[T, {D:,}]"
    yield f"W_gate{bias}, W_up{bias}", MATRIX, f"two of [T, {F:,}]"
    yield "gelu(gate) · up", PLAIN, f"[T, {F:,}]"
    yield f"W_down{bias}", MATRIX, f"[T, {D:,}]"
    if config.norms_per_block == 4:
        yield "RMSNorm", NORM, f"[T, {D:,}]"


def branch(page: Page, x: float, y: float, title: str, steps: Sequence[tuple[str, str, str]]) -> float:
    """A branch beside the residual stream, which runs along its left side and to which it is added."""
    page.text(x + 20, y + 4, title, 12, weight="bold")
    begin = y + 22
    page.line((x, begin - 14), (x, begin - 6), arrow=False)
    middle = x + 30 + BRANCH / 2
    page.line((x, begin - 6), (middle, begin - 6), (middle, begin + 5))
    end = page.column(x + 30, begin + 6, BRANCH, steps) + 6
    page.line((middle, end - 7), (middle, end + 4), (x + 10, end + 4))
    page.line((x, begin - 6), (x, end - 6))
    page.plus(x, end + 4)
    return end + 13


def model_column(page: Page, config: TextConfig, y: float) -> None:
    """ids → embedding → layers → norm → head → logits."""
    D, V = config.width, config.vocab
    stream = f"x [T, {D:,}]"
    page.text(30, y, "the model", 13, weight="bold")
    y = page.column(30, y + 12, 230, [("token ids", PLAIN, "[T]"), (f"embedding [{V:,}, {D:,}], · √D", MATRIX, stream)])
    each = min(13.0, 360 / config.layers)
    for i in range(config.layers):
        kind = config.kind(i)
        page.box(30, y + i * each, 230, "", KINDS[kind], height=each - 1.5, stroke="none")
    page.text(30, y + config.layers * each + 14, pattern(config), 11.5)
    y += config.layers * each + 22
    page.line((145, y), (145, y + 16))
    page.text(152, y + 12, stream, 11, SOFT)
    cap = f", capped at {config.logit_cap:g}" if config.logit_cap else ""
    steps = [("RMSNorm", NORM, stream), (f"head = embedding{cap}", MATRIX, f"logits [T, {V:,}]")]
    y = page.column(30, y + 18, 230, steps) + 16
    for kind in dict.fromkeys(config.kind(i) for i in range(config.layers)):
        page.box(30, y, 14, "", KINDS[kind], height=12, stroke="none")
        layer = next(i for i in range(config.layers) if config.kind(i) == kind)
        window = config.attention(layer).window if kind != "recurrent" else None
        local = f"sees {window:,} tokens, its own included" if window else ""
        what = {"local": local, "global": "sees all tokens before"}
        page.text(50, y + 10, f"{kind}: {what.get(kind, 'one state per channel, no keys')}", 11.5)
        y += 19


def vision_column(page: Page, x: float, y: float, config: TextConfig, v: VisionConfig) -> None:
    """Pixels → patches → tower → soft tokens."""
    P, C = v.grid**2, v.width
    page.text(x, y, "images", 13, weight="bold")
    steps = [
        (f"image, {v.side} x {v.side} pixels", PLAIN, f"[3, {v.side}, {v.side}]"),
        (f"patches of {v.patch} x {v.patch}", PLAIN, f"[{P:,}, {3 * v.patch**2}]"),
        ("W_patch + b + position", MATRIX, f"[{P:,}, {C:,}]"),
        (f"{v.layers} blocks, {v.heads} heads of {C // v.heads}", MATRIX, f"[{P:,}, {C:,}]"),
        ("LayerNorm, means of 4 x 4", NORM, f"[{v.tokens}, {C:,}]"),
        ("RMSNorm, W", MATRIX, f"[{v.tokens}, {config.width:,}] into x"),
    ]
    page.column(x, y + 12, 210, steps)


def parameter_bars(page: Page, x: float, y: float, config: TextConfig) -> float:
    """Parameters per part as bars; returns the y below them."""
    counts = parameters(config)
    total = sum(counts.values())
    page.text(x, y, f"parameters of {config.name}: {total:,}", 13, weight="bold")
    for part, count in counts.items():
        y += 22
        page.text(x, y + 4, part, 11.5)
        page.box(x + 82, y - 7, max(1.0, 150 * count / max(counts.values())), "", PARTS[part], height=14, stroke="none")
        words = f"{millions(count)}, {count / total:.0%}" if count / total > 0.005 else millions(count)
        page.text(x + 88 + 150 * count / max(counts.values()), y + 4, words, 11.5, SOFT)
    if config.vision:
        page.text(x, y + 24, f"and {millions(config.vision.parameters)} in the image encoder", 11.5, SOFT)
        y += 22
    return y + 24


def sizes_table(page: Page, x: float, y: float, family: str) -> None:
    """The released sizes of a family, by letter."""
    columns = ("", "layers", "D", "N", "K", "H", "F", "V", "weights")
    ends = (0, 158, 202, 228, 254, 286, 336, 396, 470)
    page.text(x, y, "released sizes", 13, weight="bold")
    rows: list[tuple[str, ...]] = [columns]
    for c in (c for c in RELEASED.values() if c.family == family):
        sizes = (c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn_width, c.vocab)
        rows.append((c.name, *(f"{size:,}" for size in sizes), millions(sum(parameters(c).values()))))
    for i, row in enumerate(rows):
        for end, cell in zip(ends, row, strict=True):
            page.text(x + end, y + 22 + 18 * i, cell, 11.5, INK if i else SOFT, anchor="end" if end else "start")


def family_page(family: str) -> str:
    """One family on a page: the model, one layer, parameters and sizes."""
    config, page = RELEASED[DRAWN[family]], Page(1210)
    title = FAMILIES[family].title
    page.text(30, 38, f"{title}, drawn with the sizes of {config.name}", 20, weight="bold")
    letters = (
        "T tokens · D width · N query heads · K key/value heads · H head width · F feed-forward width · V vocabulary"
    )
    page.text(30, 60, f"{letters} · arXiv {PAPERS[family]}", 12, SOFT)
    model_column(page, config, 100)
    page.text(320, 100, "one layer", 13, weight="bold")
    attends, stream = next(i for i in range(config.layers) if config.kind(i) != "recurrent"), f"x [T, {config.width:,}]"
    page.text(320, 120, stream, 11, SOFT)
    y, right, top = branch(page, 320, 134, "attention", list(attention_steps(config, attends))), 720, 100.0
    if family == "recurrentgemma":
        page.text(right, 120, stream, 11, SOFT)
        top = branch(page, right, 134, "or recurrence, in two of three layers", list(recurrent_steps(config))) + 36
        page.line((right, top - 36), (right, top - 27))
        page.text(right + 7, top - 24, f"{stream}, to the same feed-forward", 11, SOFT)
        top += 16
    y = branch(page, 320, y + 14, "feed-forward", list(feed_forward_steps(config)))
    page.line((320, y), (320, y + 16))
    page.text(327, y + 14, f"{stream}, to the next layer", 11, SOFT)
    if config.vision:
        vision_column(page, right, top, config, config.vision)
        top += 330
    top = parameter_bars(page, right, top, config)
    sizes_table(page, right, top + 22, family)
    return page.svg(f"{title}: the model, one layer with shapes, parameters of each part, released sizes")


def token_page(config: TextConfig) -> str:
    """The way of one token through the smallest model: shapes of one decode step, and what it reads and writes."""
    D, N, K, H, F, V = (getattr(config, n) for n in ["width", "heads", "kv_heads", "head_dim", "ffn_width", "vocab"])
    layers = Counter(config.kind(i) for i in range(config.layers))
    window = next(a.window for i in range(config.layers) if (a := config.attention(i)).window)
    page, counts = Page(860), parameters(config)
    per_layer = {part: counts[part] // config.layers for part in ("attention", "feed-forward")}
    page.text(30, 38, f"One token's way through {config.name}", 20, weight="bold")
    page.text(
        30, 60, "one decode step at position p: operations, shapes, and on the right what is read or written", 12, SOFT
    )
    rows: list[tuple[str, str, str, str]] = [
        ("token id", PLAIN, "[1]", ""),
        (f"row of the embedding · √{D}", MATRIX, f"x [1, {D}]", f"one row of [{V:,}, {D}]"),
        (
            "RMSNorm",
            NORM,
            f"[1, {D}]",
            f"{config.layers} times: {layers['local']} local and {layers['global']} global layers",
        ),
        ("W_q, W_k, W_v, norms, rope", MATRIX, f"q [1, {N}, {H}]  k, v [1, {K}, {H}]", f"{(N + 2 * K) * H:,} x {D}"),
        (
            "write k, v to the ring",
            STATE,
            f"keys [S, {K}, {H}]",
            f"slot p mod {window} in local layers, slot p in global ones",
        ),
        ("attention", PLAIN, f"[1, {N} · {H}]", f"reads S ≤ {window} keys in local layers, all p + 1 in global ones"),
        (
            "W_o, RMSNorm, + x",
            MATRIX,
            f"x [1, {D}]",
            f"{D} x {N * H:,}; attention in all: {millions(per_layer['attention'])} a layer",
        ),
        ("RMSNorm, W_gate, W_up", MATRIX, f"two of [1, {F:,}]", f"two of {F:,} x {D}"),
        (
            "gelu(gate) · up, W_down",
            MATRIX,
            f"[1, {D}]",
            f"{D} x {F:,}; feed-forward in all: {millions(per_layer['feed-forward'])} a layer",
        ),
        ("RMSNorm, + x", NORM, f"x [1, {D}]", "to the next layer"),
        ("RMSNorm", NORM, f"[1, {D}]", "after the last layer"),
        (
            "head = embedding",
            MATRIX,
            f"logits [1, {V:,}]",
            f"all of [{V:,}, {D}]: {counts['embedding'] / sum(counts.values()):.0%} of all parameters",
        ),
        ("sampler: temperature, top-k, top-p", PLAIN, "next token id", "goes to the top as token p + 1"),
    ]
    y = 84.0
    for i, (words, fill, shape, reads) in enumerate(rows):
        page.box(60, y, 250, words, fill)
        page.line((185, y + 28), (185, y + STEP - 1))
        page.text(192, y + 41, shape, 11, SOFT)
        page.text(430, y + 18, reads, 12)
        if i == 2:
            first = y - 6
        if i == 9:
            page.line((52, y + 32), (40, y + 32), (40, first + 20), (58, first + 20), dashed=True)
            page.line((415, first), (420, first), (420, y + 30), (415, y + 30), arrow=False)
        y += STEP
    return page.svg(f"One decode step of {config.name}: each operation with its shapes and the weights it reads")


def pictures() -> dict[str, str]:
    """File name → drawing."""
    made = {f"{family}.svg": family_page(family) for family in DRAWN}
    return made | {"token.svg": token_page(RELEASED["gemma-3-270m"])}


def main(check: bool) -> int:
    """Write the drawings, or compare them."""
    old = [name for name, svg in pictures().items() if not (p := FOLDER / name).exists() or p.read_text("utf-8") != svg]
    for name in old:
        print(f"docs/architecture/{name}" + (" is older than the code" if check else ""))
        if not check:
            (FOLDER / name).write_text(pictures()[name], "utf-8")
    return int(check and bool(old))


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv))
