"""`minigemma serve`: OpenAI's API on this machine, for programs that already speak it.

    GET  /v1/models                                    what is served
    POST /v1/chat/completions, /v1/completions         answers, whole or as server-sent events
    GET  /health, /metrics                             whether it runs; counters in Prometheus' text form

HTTP runs in one event loop, the model in the engine's thread (text/engine.py); they talk by queues. A client that goes
away takes its request with it.
"""

import argparse
import asyncio
import gc
import hmac
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..files.memory import check_memory
from ..models.decoder import Decoder
from ..models.weights import named_weights
from ..text.batch import generate_batch
from ..text.engine import Engine, QueueFull, Stopped
from ..text.generation import Token
from .openai_api import ApiError, Asked, Reply, error_body, read_request, refusal_of
from .opening import open_model
from .progress import Progress, note

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as Http
    from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise ImportError('serving takes starlette and uvicorn: pip install "minigemma[serve]"') from error

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST = 32 * 2**20  # bytes of a request
PATIENCE = 60  # seconds for a request's body to arrive
GONE = 499  # nginx's status for a closed connection; no client receives it
T = TypeVar("T")


class Api:
    """The engine, the model's names, and the rules of access."""

    def __init__(self, engine: Engine, names: tuple[str, ...], key: str | None = None) -> None:
        """`names`: what requests may call the model, the first in replies. `key`: what they must show; None: nothing,
        and only programs of this machine may ask.
        """
        self.engine, self.names, self.key = engine, names, key

    def app(self) -> Starlette:
        """The application, to be run by an ASGI server."""
        routes = [
            Route("/v1/models", self.guarded(self.models)),
            Route("/v1/models/{name:path}", self.guarded(self.models)),
            Route("/v1/completions", self.guarded(partial(self.answer, False)), methods=["POST"]),
            Route("/v1/chat/completions", self.guarded(partial(self.answer, True)), methods=["POST"]),
            Route("/metrics", self.guarded(self.metrics)),
            Route("/health", self.health),
        ]

        async def no_route(_: Http, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            body = error_body(f"{error.detail} at this address", error.status_code)
            return JSONResponse(body, error.status_code, error.headers)

        async def failed(_: Http, error: Exception) -> Response:
            return JSONResponse(*refusal_of(error))

        return Starlette(routes=routes, exception_handlers={HTTPException: no_route, Exception: failed})

    def guarded(self, handler: Callable[[Http], Awaitable[Response]]) -> Callable[[Http], Awaitable[Response]]:
        """Wraps a handler: refuses clients without access, and turns errors into OpenAI's error object."""

        async def handle(http: Http) -> Response:
            try:
                self.check_asker(http)
                return await handler(http)
            except QueueFull as error:
                body = error_body(str(error), 429, code="queue_full")
                return JSONResponse(body, 429, {"Retry-After": str(error.seconds)})
            except Stopped as error:
                return JSONResponse(error_body(str(error), 503), 503)
            except ValueError as error:
                return JSONResponse(*refusal_of(error))
            except ClientDisconnect:
                return Response(status_code=GONE)

        return handle

    def check_asker(self, http: Http) -> None:
        """Raise ApiError unless the request shows the key; without one, unless it comes from this machine.

        A browser sends the pages of other sites here too: they name another host, or are marked as cross-site.
        """
        if self.key is not None:
            shown = http.headers.get("authorization", "").encode("latin-1")  # the bytes as they came
            if not hmac.compare_digest(shown, f"Bearer {self.key}".encode()):
                raise ApiError("the API key is missing or wrong", 401, code="invalid_api_key")
        elif http.url.hostname not in LOOPBACK or http.headers.get("sec-fetch-site") == "cross-site":
            raise ApiError("without --api-key only programs on this machine may ask", 403)

    async def models(self, http: Http) -> Response:
        """The one model, in a list or by its name."""
        model = {"id": self.names[0], "object": "model", "created": 0, "owned_by": "minigemma"}
        name = http.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name not in self.names:
            raise ApiError(f"the model {name!r} is not served here", 404, "model", "model_not_found")
        return JSONResponse(model)

    async def health(self, _: Http) -> Response:
        """200 while the engine answers."""
        runs = self.engine.thread.is_alive() and not self.engine.stopping
        return JSONResponse({"status": "ok" if runs else "stopping"}, 200 if runs else 503)

    async def metrics(self, _: Http) -> Response:
        """Counters and gauges in Prometheus' text form."""
        return PlainTextResponse(metrics_of(self.engine), media_type="text/plain; version=0.0.4")

    async def answer(self, chat: bool, http: Http) -> Response:
        """A completion, whole or as a stream."""
        content = await body_of(http)
        asked = await asyncio.to_thread(self.read, content, chat)
        reply = Reply(self.engine.model, asked.form, self.names[0])
        tokens = Answering(self.engine, asked)
        try:
            if not asked.form.stream:
                said = await unless_gone(http, tokens.all())
                return JSONResponse(reply.whole(said, tokens.job.cached))
            first = await unless_gone(http, tokens.next())  # so that what is refused has a status of its own
        except BaseException:
            tokens.job.cancel()
            raise
        return Events(reply, first, tokens)

    def read(self, content: bytes, chat: bool) -> Asked:
        """The request, checked; it takes milliseconds of tokenizing or decoding, so not in the event loop."""
        asked = read_request(self.engine.model, content, chat, self.names)
        self.engine.check(asked.request)
        return asked


class Answering:
    """The tokens of one request, brought from the engine's thread into the event loop."""

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self.queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.job = engine.submit(asked.request, lambda event: loop.call_soon_threadsafe(self.queue.put_nowait, event))

    async def next(self) -> Token:
        """The next token; raises what the engine tells instead."""
        event = await self.queue.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def all(self) -> list[Token]:
        """All tokens."""
        tokens = [await self.next()]
        while not tokens[-1].finish_reason:
            tokens.append(await self.next())
        return tokens


class Events(StreamingResponse):
    """A stream that cancels its request when it ends, however it ends."""

    def __init__(self, reply: Reply, first: Token, tokens: Answering) -> None:
        self.tokens = tokens
        super().__init__(events(reply, first, tokens), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.tokens.job.cancel()


async def events(reply: Reply, first: Token, tokens: Answering) -> AsyncIterator[str]:
    """The reply as server-sent events."""
    for chunk in reply.first():
        yield event_of(chunk)
    token = first
    while True:
        for chunk in reply.chunks(token, tokens.job.cached):
            yield event_of(chunk)
        if token.finish_reason:
            break
        try:
            token = await tokens.next()
        except Exception as error:  # the status is sent already
            yield event_of(error_body(str(error), 503 if isinstance(error, Stopped) else 500))
            return
    yield "data: [DONE]\n\n"


def event_of(chunk: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


async def body_of(http: Http) -> bytes:
    """The body of a request, at most LARGEST bytes; more is read and dropped, for the client to learn why."""
    if (coding := http.headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(f"the body is in {coding}, which is not read; send it as it is", 415)
    said = http.headers.get("content-length", "")
    parts, size, fits = list[bytes](), 0, not said.isdigit() or int(said) <= LARGEST
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in http.stream():
                size += len(part)
                fits = fits and size <= LARGEST
                if fits:
                    parts.append(part)
                else:
                    parts.clear()
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {PATIENCE} s", 408) from None
    if not fits:
        raise ApiError(f"the body has {size:,} bytes; at most {LARGEST:,} are read", 413)
    return b"".join(parts)


async def unless_gone(http: Http, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; raises ClientDisconnect if the client goes away before, and ends the work."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def metrics_of(engine: Engine) -> str:
    """What the engine has done, in Prometheus' text form."""
    counts, rows = engine.counts, []
    ended = {name: getattr(counts, name) for name in ("answered", "cancelled", "failed", "refused")}
    counters = {
        "requests_total": ("Requests that ended, by how.", {f'{{outcome="{name}"}}': n for name, n in ended.items()}),
        "prompt_tokens_total": ("Tokens of prompts.", {"": counts.prompt_tokens}),
        "cached_tokens_total": ("Tokens of prompts that an earlier cache held.", {"": counts.cached_tokens}),
        "new_tokens_total": ("Tokens of answers.", {"": counts.new_tokens}),
        "first_token_seconds_sum": ("Time to first tokens, waiting included.", {"": counts.first_token_seconds}),
        "first_token_seconds_count": ("Requests with a first token.", {"": counts.first_tokens}),
    }
    gauges = {
        "requests_running": ("Requests that are answered now.", {"": len(engine.running)}),
        "requests_waiting": ("Requests that wait.", {"": len(engine.waiting)}),
        "kept_cache_bytes": ("Caches kept for prompts that begin alike.", {"": engine.prefixes.nbytes}),
    }
    for kind, several in (("counter", counters), ("gauge", gauges)):
        for name, (doc, values) in several.items():
            rows += [f"# HELP minigemma_{name} {doc}", f"# TYPE minigemma_{name} {kind}"]
            rows += [f"minigemma_{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(rows) + "\n"


# ---- the command


class Server(uvicorn.Server):
    """Ends running answers first when a signal asks it to stop."""

    def __init__(self, engine: Engine, app: Any) -> None:
        self.engine = engine
        quiet = {"log_level": "warning", "access_log": False, "server_header": False, "proxy_headers": False}
        plain = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "off"}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=5, **quiet, **plain))  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The handler of both signals."""
        self.engine.stop()
        super().handle_exit(sig, frame)


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    key = key_of(args.api_key)
    if args.host not in LOOPBACK and key is None:
        raise ValueError(f"other machines can reach {args.host}; choose a key that they must show, with --api-key")
    with bound(args.host, args.port) as listener:
        model = open_model(args, progress, vision=True)
        if not args.force:
            check_room(args.model, model, args.parallel + max(args.parallel, 4))
        progress("warming up")
        warm_up(model)
        gc.freeze()
        gc.set_threshold(700, 10, 10)  # Python's own; for short commands `own_process` makes it wait
        with Engine(model, args.parallel, args.queue) as engine:
            api = Api(engine, (model.name or args.model, args.model), key)
            server = Server(engine, api.app())
            progress("")
            listener.listen()  # uvicorn would only when it runs, after the note
            host, port = listener.getsockname()[:2]
            note(args, f"serving http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C ends")
            with signals_of_server():
                server.run(sockets=[listener])


def key_of(text: str | None) -> str | None:
    """The key of --api-key, or that in the file it names: other users of a machine see a command's flags."""
    if text is None or not text.startswith("@"):
        return text
    if not (key := Path(text[1:]).read_text("utf-8").strip()):
        raise ValueError(f"{text[1:]} has no key in it; write one there")
    return key


def bound(host: str, port: int) -> socket.socket:
    """A socket of that address, which does not listen yet. Raises ValueError if it cannot be taken."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        told = f"port {port} of {host} cannot be taken ({error.strerror})"
        raise ValueError(f"{told}; choose another with --port or --host") from None
    return made


def check_room(name: str, model: Decoder, caches: int) -> None:
    """Raise ValueError unless weights and that many caches of full length fit into memory."""
    weights = sum(weight.nbytes for _, weight in named_weights(model.weights))
    each = model.config.cache_bytes(model.config.context, 4 if model.exact else 2)
    check_memory(f"{name}, with {caches} caches of {model.config.context:,} tokens,", weights, caches * each)


def warm_up(model: Decoder) -> None:
    """Compile what answers take, so that the first client need not wait for it."""
    assert model.tokenizer, "open_model refuses a model without one"
    ids = [model.tokenizer.bos] * 20
    for count in (1, 2):
        list(generate_batch(model, [ids] * count, max_new_tokens=3, temperature=0))


@contextmanager
def signals_of_server() -> Iterator[None]:
    """Uvicorn raises again the signals that ended it, once it has; here that does nothing."""
    before = {which: signal.signal(which, lambda *_: None) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
