"""OpenAI's form of requests and replies, for `minigemma serve` and `minigemma batch`. It knows nothing of HTTP.

A field that has no effect here is ignored where the text would be the same, and refused with a sentence where not.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import no_vision
from ..models.decoder import Decoder
from ..text.engine import Request
from ..text.generation import Token, prompt_ids
from ..text.prompt import MARK, conversation_ids

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
WHOLE = ("top_k", "seed")
LENGTHS = ("max_new_tokens", "max_completion_tokens", "max_tokens")  # the first that is given counts
KNOWN = {"prompt", "messages", "seed", "stop", *SAMPLING, *LENGTHS}
STREAMING = {"stream", "stream_options"}  # of the server alone
# What says nothing about the text.
HARMLESS = {"id", "custom_id", "model", "user", "metadata", "store", "service_tier", "safety_identifier"}
HARMLESS |= {"prompt_cache_key", "parallel_tool_calls"}
# The only values that run here.
FIXED = {"n": 1, "best_of": 1, "echo": False, "logprobs": False, "stream": False, "tool_choice": "none", "tools": []}
FIXED |= {"modalities": ["text"], "suffix": ""}
COMPLETION_TOKENS = 16  # of /v1/completions where the request says none, as at OpenAI


class ApiError(ValueError):
    """A request that is refused: HTTP status, a sentence, and OpenAI's words for it."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        self.status, self.param, self.code = status, param, code
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return error_body(str(self), self.status, self.param, self.code)


def error_body(message: str, status: int = 400, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": param, "code": code}}


# ---- requests


class Asked(NamedTuple):
    """What a request asks of the engine, and how it wants its reply."""

    request: Request
    stream: bool
    usage: bool  # in a last chunk of the stream


def read_request(model: Decoder, content: bytes, chat: bool, names: Sequence[str]) -> Asked:
    """A request's body. `names`: what the model may be called. Raises ApiError, or another ValueError."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError("the body is no JSON object")
    if body.get("model") not in (None, *names):
        told = f"the model {str(body['model'])[:100]!r} is not served here; {names[0]!r} is"
        raise ApiError(told, 404, "model", "model_not_found")
    missing, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if other in body or body.get(missing) is None:
        raise ApiError(f"a request to this address has {missing}, and no {other}", param=missing)
    options = body.get("stream_options") or {}
    stream = body.get("stream") or False
    if not isinstance(options, dict) or not isinstance(stream, bool):
        raise ApiError("stream must be true or false, and stream_options an object", param="stream")
    body = {name: value for name, value in body.items() if name not in STREAMING}
    check_fields(body)
    most = model.config.context if chat else COMPLETION_TOKENS
    settings = settings_of(body, {"max_new_tokens": most})
    request = prompt_of(model, body, raw=None if chat else True)
    if len(request.ids) >= model.config.context:
        held = f"the prompt has {len(request.ids):,} tokens and the context holds {model.config.context:,}"
        told = f"{held}, of which the answer needs one at least"
        raise ApiError(told, param=missing, code="context_length_exceeded")
    asked = request._replace(settings=settings)
    return Asked(asked, stream, bool(options.get("include_usage")))


def check_fields(body: Mapping[str, Any]) -> None:
    """Raise ApiError for fields that matter and are not supported; null is as good as none."""
    for name, value in body.items():
        if name in FIXED and value is not None and value != FIXED[name]:
            raise ApiError(f"{name} is {value!r}; here it is always {json.dumps(FIXED[name])}", param=name)
        if name not in KNOWN | HARMLESS | FIXED.keys() and value is not None:
            raise ApiError(f"the field {name!r} is not supported", param=name)


def settings_of(body: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `stream_generate` that a body gives, those of `default` where it gives none; ApiError."""
    given = {name: value for name, value in body.items() if value is not None}
    settings = {name: _number(name, given.get(name, default.get(name))) for name in (*SAMPLING, "seed")}
    if settings["temperature"] == 0:  # clients send top_p = 1 with it, and flags are for other lines too
        settings |= dict.fromkeys(SAMPLING[1:])
    length = next((name for name in LENGTHS if name in given), "max_new_tokens")
    settings["max_new_tokens"] = _number(length, given.get(length, default.get(length)), whole=True)
    stop = settings["stop"] = given.get("stop", default.get("stop", ()))
    if not isinstance(stop, (str, list, tuple)) or not all(isinstance(each, str) for each in stop):
        raise ApiError("stop must be a text, or a list of texts", param="stop")
    return settings


def _number(name: str, value: Any, whole: bool = False) -> Any:
    whole = whole or name in WHOLE
    if value is not None and (isinstance(value, bool) or not isinstance(value, int if whole else (int, float))):
        raise ApiError(f"{name} is {value!r}; it must be {'an integer' if whole else 'a number'}", param=name)
    return value


def prompt_of(model: Decoder, body: Mapping[str, Any], raw: bool | None) -> Request:
    """The ids of a prompt, or of messages laid out in turns, with their images; no settings yet."""
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise ApiError("a line has either a prompt or messages")
    if (messages := body.get("messages")) is not None:
        return _conversation(model, messages)
    prompt = body["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Request(prompt_ids(model, prompt, raw=raw), {})
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        told = "prompt must be a text, or a list of token ids; send a request for each of several"
        raise ApiError(told, param="prompt")
    return Request(prompt, {})


def _conversation(model: Decoder, messages: Any) -> Request:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ApiError('messages must be a list of {"role": …, "content": …}', param="messages")
    if model.tokenizer is None:
        raise ApiError("this checkpoint has no tokenizer; send token ids as a prompt")
    if model.foreign_turns:
        told = f"the model's chat template writes {model.foreign_turns}, not Gemma's turns; lay them out in a prompt"
        raise ApiError(told, param="messages")
    read = [_message(model, message) for message in messages]
    turns = [turn for turn, _ in read]
    pictures = [picture for _, several in read for picture in several]
    ids = conversation_ids(model.tokenizer, model.config.family, turns, vision=model.vision)
    return Request(ids, {}, [image for image, _ in pictures], [digest for _, digest in pictures])


def _message(model: Decoder, message: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[Any, int]]]:
    """A message whose content is one text, with a mark where an image stands; and the images, each with its digest."""
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    if not isinstance(content, list):
        return {"role": role, "content": content}, []
    text, pictures = "", []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image_url":
            url = part.get("image_url")
            pictures.append(_picture(model, url.get("url") if isinstance(url, dict) else url))
            text += MARK
        else:
            raise ApiError("a part of a message is neither text nor an image_url", param="messages")
    return {"role": role, "content": text, "images": (0,) * len(pictures)}, pictures


def _picture(model: Decoder, url: Any) -> tuple[Any, int]:
    """The image of a data URL, scaled to what the vision tower takes; and a digest of its pixels."""
    from ..files.images import open_image

    if model.vision is None:
        raise no_vision(model.name, 1)
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        told = "an image must come as a data URL, data:image/png;base64,…; nothing is fetched"
        raise ApiError(told, param="messages")
    try:
        content = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ApiError(f"the data URL of an image is not base64: {error}", param="messages") from None
    side = model.vision.side  # scaled now, since what waits should be small; once more leaves it as it is
    image = open_image(content).resize((side, side), 2)  # 2: bilinear, as in `image_pixels`
    return image, int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:7])


# ---- replies


class Reply:
    """One answer in OpenAI's form: whole, or in chunks as it comes."""

    def __init__(self, chat: bool, model: str, usage: bool = False) -> None:
        """`usage`: chunks have a field of that name, and a last one says the numbers of tokens."""
        self.chat, self.usage = chat, usage
        kind = "chat.completion" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def whole(self, tokens: Sequence[Token], cached: int = 0) -> dict[str, Any]:
        """The reply, when the answer has ended."""
        text = "".join(token.text for token in tokens)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": tokens[-1].finish_reason}
        return self.head | {"choices": [choice], "usage": self.counts(tokens[-1], cached)}

    def first(self) -> list[dict[str, Any]]:
        """The chunks before the first token."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)] if self.chat else []

    def chunks(self, token: Token, cached: int = 0) -> list[dict[str, Any]]:
        """The chunks of a token, with what ends the reply after the last."""
        made = []
        if token.text or (token.finish_reason and not self.chat):
            said = {"delta": {"content": token.text}} if self.chat else {"text": token.text}
            made.append(self._chunk(said, None if self.chat else token.finish_reason))
        if token.finish_reason and self.chat:
            made.append(self._chunk({"delta": {}}, token.finish_reason))
        if token.finish_reason and self.usage:
            made.append(self._streamed() | {"choices": [], "usage": self.counts(token, cached)})
        return made

    def _streamed(self) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _chunk(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return self._streamed() | {"choices": [choice]} | ({"usage": None} if self.usage else {})

    @staticmethod
    def counts(last: Token, cached: int = 0) -> dict[str, Any]:
        """Tokens of the prompt, how many of them were cached, and of the answer."""
        total = last.prompt_tokens + last.generation_tokens
        counted = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.generation_tokens}
        return counted | {"total_tokens": total, "prompt_tokens_details": {"cached_tokens": cached}}
