"""Makes weights/texts/bible.txt.xz and austen.txt.xz from two Debian packages, with the standard library alone.

    apt-get download sword-text-web r-cran-janeaustenr        # of Debian 12; any machine can also fetch them by hand
    python weights/recipes/texts.py sword-text-web_*.deb r-cran-janeaustenr_*.deb

A form feed begins each book but the first, a line such as "Genesis 1" or "Chapter 1" each chapter, a blank line each
paragraph; a paragraph of prose is one line. The last books of a file are meant to be held out, about a tenth of it.
Quotation marks and dashes are ASCII's, so that a prompt can be typed.
"""

import io
import lzma
import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

TEXTS = Path(__file__).resolve().parents[1] / "texts"
HELD_OUT = {
    "bible": "Ruth Lamentations Jonah Tobit Judith Ecclesiastes Amos John Romans Hebrews James",
    "austen": "Persuasion",
}
ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "\u00a0": " "})


def package(path: str) -> dict[str, bytes]:
    """The files of a Debian package by name: an `ar` archive, whose member data.tar.xz has them."""
    content, at = Path(path).read_bytes(), 8
    while at < len(content):
        name, size = content[at : at + 16].decode().strip(), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[at + 60 : at + 60 + size])) as archive:
                return {m.name.rsplit("/", 1)[-1]: archive.extractfile(m).read() for m in archive if m.isfile()}
        at += 60 + size + size % 2
    raise SystemExit(f"{path}: holds no data.tar; give a Debian package")


# ---- the Bible, a SWORD module: zlib blocks of OSIS, a dialect of XML


def bible(files: dict[str, bytes]) -> dict[str, str]:
    """The books of the module by name, without titles, introductions and notes."""
    osis = "".join(
        zlib.decompress(files[f"{part}.bzz"][first : first + size]).decode()
        for part in ("ot", "nt")
        for first, size, _ in struct.iter_unpack("<III", files[f"{part}.bzs"])  # offset, bytes, bytes inflated
    )
    parts = re.split(r'<div canonical="true" osisID="\w+" sID="\w+" type="book"/>', osis)[1:]
    books = {re.search(r'<milestone n="([^"]*)" type="x-usfm-h"/>', part)[1]: part for part in parts}
    return {name: prose(osis, name) for name, osis in books.items() if not name.endswith("(Greek)")}  # told twice


def prose(osis: str, name: str) -> str:
    """The text of a book: paragraphs and verses in lines of their own, chapters under their numbers."""
    osis = re.sub(r'<div sID="(\w+)" type="introduction"/>.*?<div eID="\1" type="introduction"/>', "", osis, flags=re.S)
    paragraph = '<div type="x-p"/>'
    osis = re.sub(r'<title canonical="true"[^>]*>(.*?)</title>', rf"{paragraph}\1{paragraph}", osis, flags=re.S)
    osis = re.sub(r"<(title|speaker)\b[^>]*>.*?</\1>", "", osis, flags=re.S)
    osis = re.sub(r"<note\b.*?</note>", " ", osis, flags=re.S)
    osis = " ".join(osis.split())
    osis = re.sub(
        r'<chapter n="([^"]*)" osisID="[^"]*" sID=[^>]*>', rf"\n\n{name.replace('Psalms', 'Psalm')} \1\n\n", osis
    )
    osis = re.sub(r'<div\b[^>]*type="x-p"/>|<lb\b[^>]*>|<lg\b[^>]*>', "\n\n", osis)
    osis = re.sub(r"<(?:l (?!eID)|item\b)[^>]*>", "\n", osis)
    text = re.sub(r"<[^>]*>", "", osis)
    return tidy(re.sub(r"— (?=\w)", "—", re.sub(r"”(?=\w)", "” ", text)))  # blanks that notes took or left


# ---- Jane Austen, an R data package: zlib streams of serialized character vectors


def austen(files: dict[str, bytes]) -> dict[str, str]:
    """The six novels by name."""
    books = {}
    for lines in vectors(files["Rdata.rdb"]):
        text = "\n".join(lines)
        start = re.search(r"^chapter (1|i)$", text, re.M | re.I)
        title = text[: start.start()].strip().splitlines()[0].title().replace(" And ", " and ")
        text = re.sub(r"^chapter (\w+)$", lambda m: f"Chapter {number(m[1])}", text[start.start() :], flags=re.M | re.I)
        text = re.sub(r"^(volume \w+|end of volume.*|finis|the end)$", "", text, flags=re.M | re.I)
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
        books[title] = tidy("\n\n".join(filter(None, paragraphs)).replace("_", ""))
    return books


def vectors(data: bytes) -> Iterator[list[str]]:
    """The character vectors of a lazy-load database: each 4 bytes of length, then a zlib stream."""
    at = 0
    while at < len(data):
        stream = zlib.decompressobj()
        content = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        place = content.index(struct.pack(">I", 16))  # the type of a character vector
        (count,), place = struct.unpack_from(">I", content, place + 4), place + 8
        strings = []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", content, place + 4)
            strings.append(content[place + 8 : place + 8 + size].decode())
            place += 8 + size
        yield strings


def number(text: str) -> int:
    """A chapter's number, in Roman or Arabic digits."""
    if text.isdigit():
        return int(text)
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[letter] for letter in text.upper()]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


# ---- both


def tidy(text: str) -> str:
    """ASCII's quotation marks and dashes, one blank between words, none before a comma, one blank line at most."""
    text = re.sub(r"[ \t]+", " ", text.translate(ASCII))
    text = re.sub(r" (?=[,.;:!?)])", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def write(name: str, books: dict[str, str]) -> None:
    """weights/texts/<name>.txt.xz, the books to be held out last."""
    last = HELD_OUT[name].split()
    kept = {title: books[title] for title in [*(book for book in books if book not in last), *last]}
    text = "\n\f".join(f"{book}\n" for book in kept.values())
    TEXTS.mkdir(exist_ok=True)
    (TEXTS / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    held = sum(len(books[title]) for title in last) / len(text)
    other = "".join(sorted({letter for letter in text if ord(letter) > 126}))
    print(f"{name}: {len(books)} books, {len(text.encode()):,} bytes, {held:.1%} to hold out; beyond ASCII: {other}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    write("bible", bible(package(sys.argv[1])))
    write("austen", austen(package(sys.argv[2])))
