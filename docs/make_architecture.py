"""Draws docs/architecture.svg from the imports of the package: a band a folder, a box a file, an arrow an import.

python docs/make_architecture.py           write the drawing
python docs/make_architecture.py --check   exit 1 if the drawing is older than the code
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, DRAWING = ROOT / "minigemma", ROOT / "docs" / "architecture.svg"
FLOORS = {  # from the top of the drawing to its foundation
    "cli": "the command line, a file a command",
    "train": "how it learns",
    "text": "model ↔ text",
    "files": "files → model",
    "models": "a paper a page",
    "blocks": "a figure of a paper a page",
    "formulas": "a formula a page: equation, definition, gradient, kernel",
    "kernels": "how it is fast",
    "layouts": "how weights lie in memory or in a file",
    "": "the letters of every shape; definition; state; taps",
}
WIDTH, MARGIN, BOX, ROW = 820, 180, 24, 30
INK, PAPER, BAND, LINE = "#1b1f24", "#ffffff", "#f3f5f8", "#c9d1da"
COLOURS = ("#b5483a", "#8a5a00", "#2f7d4f", "#1f6f8b", "#6a4fa3", "#a33c77", "#3d6b1f", "#7a4a2a", "#44505c")


def floor_of(path: Path) -> str:
    """The folder of a module; "" for the modules beside the folders."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported_floors(path: Path) -> set[str]:
    """The folders that a module imports from, its own apart."""
    found, own = set(), floor_of(path)
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            first = (node.module or "").split(".")[0]
            if node.level == depth:  # from the package itself
                names = [first] if first else [alias.name for alias in node.names]
                found |= {name if name in FLOORS else "" for name in names}
    return found - {own}


def house() -> tuple[dict[str, list[str]], Counter[tuple[str, str]]]:
    """The files of each floor, and how many files of one floor import from another."""
    files: dict[str, list[str]] = {floor: [] for floor in FLOORS}
    arrows: Counter[tuple[str, str]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem in ("__init__", "__main__"):
            continue
        own, inside = floor_of(path), path.relative_to(PACKAGE).parts[1:-1]
        name = inside[0] if inside else path.stem
        if name not in files[own]:
            files[own].append(name)
        arrows.update((own, other) for other in imported_floors(path))
    return files, arrows


def rows_of(names: list[str]) -> list[list[tuple[str, int]]]:
    """(name, width of its box) in as many rows as they need."""
    rows: list[list[tuple[str, int]]] = [[]]
    used = 0
    for name in names:
        width = 18 + 7 * len(name)
        if used + width > WIDTH - 40 and rows[-1]:
            rows.append([])
            used = 0
        rows[-1].append((name, width))
        used += width + 8
    return rows


def band(floor: str, names: list[str], top: int) -> tuple[str, int]:
    """The SVG of one floor, and its height."""
    rows = rows_of(names)
    height = 40 + ROW * len(rows)
    title = f"{floor}/" if floor else "minigemma/"
    parts = [
        f'<rect x="10" y="{top}" width="{WIDTH}" height="{height}" rx="8" fill="{BAND}" stroke="{LINE}"/>',
        f'<text x="24" y="{top + 23}" font-weight="bold">{title}</text>',
        f'<text x="{40 + 9 * len(title)}" y="{top + 23}" fill="#57606a">{escape(FLOORS[floor])}</text>',
    ]
    for r, row in enumerate(rows):
        x, y = 24, top + 34 + ROW * r
        for name, width in row:
            parts.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="4" fill="{PAPER}" stroke="{LINE}"/>'
                f'<text x="{x + 9}" y="{y + 16}" class="file">{name}</text>'
            )
            x += width + 8
    return "\n".join(parts), height


def drawing() -> str:
    """The whole SVG."""
    files, arrows = house()
    floors = [floor for floor in FLOORS if files[floor]]
    middle, bands, top = {}, [], 10
    for floor in floors:
        svg, height = band(floor, files[floor], top)
        bands.append(svg)
        middle[floor] = top + height // 2
        top += height + 14
    lines = []
    for i, floor in enumerate(floors):
        for j, other in enumerate(floors):
            count = arrows[floor, other]
            if not count:
                continue
            assert j > i, f"{floor} imports upward from {other}"
            start, end = middle[floor] + 6, middle[other] - 6
            reach = WIDTH + 10 + 26 + 15 * (j - i)
            lines.append(
                f'<path d="M{WIDTH + 10} {start} C{reach} {start} {reach} {end} {WIDTH + 14} {end}" fill="none" '
                f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="{0.8 + 0.35 * count**0.5:.1f}" opacity="0.75" '
                f'marker-end="url(#tip)"><title>{floor or "minigemma"} imports {other or "minigemma"} '
                f"in {count} files</title></path>"
            )
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="14"'
    tip = '<marker id="tip" markerWidth="6" markerHeight="6" refX="5" refY="3" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + MARGIN} {top}" {style} fill="{INK}">',
            "<title>The house: folders from the command line down to the letters; every import runs downward</title>",
            f"<style>.file {{ font-size: 12px; font-family: Menlo, Consolas, monospace }}</style><defs>{tip}"
            '<path d="M0 0 L6 3 L0 6 z"/></marker></defs>',
            f'<rect width="{WIDTH + MARGIN}" height="{top}" fill="{PAPER}"/>',
            *bands,
            *lines,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    svg = drawing()
    if "--check" in sys.argv:
        sys.exit(
            0 if DRAWING.exists() and DRAWING.read_text("utf-8") == svg else "docs/architecture.svg is out of date"
        )
    DRAWING.write_text(svg, "utf-8")
