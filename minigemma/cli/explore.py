"""`minigemma explore`: a page on this machine that shows a run of the model from inside."""

import argparse
import json
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from typing import Any

from ..formulas.sampling import Sampler
from ..models.decoder import Decoder
from ..text.look import Look, look
from ..text.prompt import text_ids
from .opening import open_model
from .progress import Progress, note

LARGEST = 100_000  # bytes of a request


class Explorer(HTTPServer):
    """Answers one request after the other, on the loopback interface only; holds the latest run and no other state."""

    def __init__(self, model: Decoder, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model = model
        self.seen: Look | None = None
        self.whole: Look | None = None  # the same text without a silent head

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the page asks for; ValueError says what is wrong with it."""
        if "text" in asked:
            silenced = [(int(layer), int(head)) for layer, head in asked.get("silenced", [])]
            assert self.model.tokenizer is not None  # open_model says so
            ids = text_ids(self.model.tokenizer, str(asked["text"]))
            self.seen = look(self.model, ids, silenced)
            if not silenced or self.whole is None or self.whole.ids != tuple(ids):
                self.whole = look(self.model, ids) if silenced else self.seen
            return self.seen.summary() | {"next": self.seen.next(Sampler(temperature=1.0))}
        if self.seen is None or self.whole is None:
            raise ValueError("there is no run yet; send a text first")
        match asked.get("show"):
            case "lens":
                return {"lens": self.seen.lens()}
            case "attention":
                return {"attention": self.seen.attention(int(asked["layer"]))}
            case "half_lives":
                return {"half_lives": self.seen.half_lives(int(asked["layer"]))}
            case "next" | "whole" as which:
                settings = {name: asked[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in asked}
                return {"next": (self.seen if which == "next" else self.whole).next(Sampler(**settings))}
            case other:
                raise ValueError(f"{other!r} cannot be shown")


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
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: the terminal belongs to the user."""


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Serve the page until Ctrl-C."""
    model = open_model(args, progress)
    with Explorer(model, args.port) as server:
        progress("")
        note(args, f"open http://127.0.0.1:{server.server_port}/ in a browser; Ctrl-C ends")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
