"""`minigemma explore`: a page on this machine that shows a run of the model from inside."""

import argparse
import json
from base64 import b64encode
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np

from ..arrays import F32
from ..errors import no_vision
from ..formulas.sampling import Sampler
from ..models.decoder import Decoder
from ..text.generation import prompt_ids
from ..text.look import Look, look
from ..text.seeing import Seen
from .opening import open_model
from .progress import Progress, note

LARGEST = 30_000_000  # bytes of a request: an image comes as base64
NOTHING: tuple[None, list[str]] = (None, [])


class Explorer(HTTPServer):
    """Answers one request after the other, on the loopback interface only; holds the latest run and no other state."""

    def __init__(self, model: Decoder, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model = model
        self.seen: Look | None = None
        self.whole: Look | None = None  # the same text without a silent head
        self.pictures: dict[tuple[str, bool], tuple[Seen, list[str]]] = {}  # the latest, with its crops or without

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the page asks for; ValueError says what is wrong with it."""
        if "text" in asked:
            silenced = [(int(layer), int(head)) for layer, head in asked.get("silenced", [])]
            images, pictures = self.looked(asked["image"], bool(asked.get("crops"))) if asked.get("image") else NOTHING
            ids = prompt_ids(self.model, str(asked["text"]), raw=True, crops=images.crops if images else ())
            features = images.features if images else None
            self.seen = look(self.model, ids, silenced, features)
            if not silenced or self.whole is None or self.whole.ids != tuple(ids):
                self.whole = look(self.model, ids, features=features) if silenced else self.seen
            told = {"next": self.seen.next(Sampler(temperature=1.0)), "pictures": pictures}
            return self.seen.summary() | told
        if self.seen is None or self.whole is None:
            raise ValueError("there is no run yet; send a text first")
        match asked.get("show"):
            case "lens":
                return {"lens": self.seen.lens()}
            case "attention":
                return {"attention": self.seen.attention(int(asked["layer"]))}
            case "images":
                return {"images": self.seen.attention_to_images(int(asked["layer"]), int(asked["token"]))}
            case "channels":
                return self.seen.channels(int(asked["layer"]))
            case "next" | "whole" as which:
                settings = {name: asked[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in asked}
                return {"next": (self.seen if which == "next" else self.whole).next(Sampler(**settings))}
            case other:
                raise ValueError(f"{other!r} cannot be shown")

    def looked(self, image: Any, crops: bool) -> tuple[Seen, list[str]]:
        """An image, a data URL, as the model sees it, and the squares that the tower saw, as data URLs; the latest is
        kept.
        """
        if self.model.vision is None:
            raise no_vision(self.model.name, 1)
        if (image, crops) not in self.pictures:
            from ..files.images import PanAndScan, content_of, prepare

            pixels, count = prepare(content_of(image), self.model.vision.side, PanAndScan() if crops else None)
            seen = Seen(self.model.image_features(pixels), (count,))
            self.pictures = {(image, crops): (seen, [data_url(square) for square in pixels])}
        return self.pictures[image, crops]


def data_url(square: F32) -> str:
    """A picture [3, side, side] in [-1, 1] as a JPEG in a data URL."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(((square.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + b64encode(file.getvalue()).decode()


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST / takes a JSON object and answers with one."""

    server: Explorer

    def do_GET(self) -> None:
        """The page, and nothing else."""
        if self.path != "/" or not self.ours():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.reply(files("minigemma.cli").joinpath("explore.html").read_bytes(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        """What the page asks for. Errors of the request are an object with "error"."""
        size = self.headers.get("Content-Length", "")
        if not self.ours() or not size.isdigit() or int(size) > LARGEST:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        try:
            asked = json.loads(self.rfile.read(int(size)))
            if not isinstance(asked, dict):
                raise ValueError("a request is a JSON object")
            answer = self.server.answer(asked)
        except (ValueError, KeyError, TypeError) as error:
            answer = {"error": str(error)}
        self.reply(json.dumps(answer).encode(), "application/json")

    def ours(self) -> bool:
        """Does the browser ask this machine by its own name? The pages of other sites get nothing."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        return host in ("127.0.0.1", "localhost") and self.headers.get("Sec-Fetch-Site", "none") != "cross-site"

    def reply(self, content: bytes, kind: str) -> None:
        """Sends the content; the page may load nothing from elsewhere."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src data:")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: the terminal belongs to the user."""


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Serve the page until Ctrl-C."""
    model = open_model(args, progress, vision=True)
    with Explorer(model, args.port) as server:
        progress("")
        note(args, f"open http://127.0.0.1:{server.server_port}/ in a browser; Ctrl-C ends")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
