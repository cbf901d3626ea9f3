"""OpenAI's form of requests and replies, for `minigemma serve` and `minigemma batch`. It knows nothing of HTTP.

A field that has no effect here is ignored where the text would be the same, and refused with a sentence where not.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any, NamedTuple, NoReturn

from ..errors import no_vision
from ..models.decoder import Decoder
from ..text.engine import Request
from ..text.generation import Token, prompt_ids
from ..text.prompt import MARK, conversation_ids

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
LENGTHS = ("max_new_tokens", "max_completion_tokens", "max_tokens")  # the first that is given counts
WHOLE = ("top_k", "seed", *LENGTHS)
KNOWN = {"prompt", "messages", "seed", "stop", "logit_bias", "response_format", "logprobs", "top_logprobs"}
KNOWN |= {*SAMPLING, *PENALTIES, *LENGTHS}
STREAMING = {"stream", "stream_options"}  # of the server alone
# What says nothing about the text.
HARMLESS = {"id", "custom_id", "model", "user", "metadata", "store", "service_tier", "safety_identifier"}
HARMLESS |= {"prompt_cache_key", "parallel_tool_calls"}
OF_MESSAGES = {"role", "content", "name", "refusal", "annotations", "reasoning_content"}  # the last four do nothing
# The only values that run here.
FIXED = {"n": 1, "best_of": 1, "echo": False, "stream": False, "tool_choice": "none", "tools": []}
FIXED |= {"modalities": ["text"], "suffix": ""}
COMPLETION_TOKENS = 16  # of /v1/completions where the request says none, as at OpenAI
MOST_LOGPROBS = 20  # tokens beside each, as at OpenAI
MOST_STOPS = 64  # each is looked for after each token, while the other answers wait
LOWEST = -9999.0  # in place of a logarithm of 0, which JSON cannot say; as at OpenAI


class ApiError(ValueError):
    """A request that is refused: HTTP status, a sentence, and OpenAI's words for it."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        self.status, self.param, self.code = status, param, code
        super().__init__(message)


def error_body(message: str, status: int = 400, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": param, "code": code}}


def refusal_of(error: Exception) -> tuple[dict[str, Any], int]:
    """OpenAI's error object for what went wrong, and its status; `param` is a field that the sentence begins with."""
    if isinstance(error, ApiError):
        return error_body(str(error), error.status, error.param, error.code), error.status
    if not isinstance(error, ValueError):
        return error_body(f"{type(error).__name__}: {error}; this is a bug", 500), 500
    first = str(error).partition(" ")[0].replace("json_schema", "response_format")
    return error_body(str(error), param=first if first in KNOWN else None), 400


# ---- requests


class Form(NamedTuple):
    """How a reply looks."""

    chat: bool
    stream: bool = False
    usage: bool = False  # a last chunk of the stream says the numbers of tokens
    logprobs: bool = False


class Asked(NamedTuple):
    """What a request asks of the engine, and how it wants its reply."""

    request: Request
    form: Form


def read_request(model: Decoder, content: bytes, chat: bool, names: Sequence[str]) -> Asked:
    """A request's body. `names`: what the model may be called. Raises ApiError, or another ValueError."""
    try:
        body = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError("the body is no JSON object")
    if body.get("model") not in (None, *names):
        told = f"the model {short(body['model'])} is not served here; {names[0]!r} is"
        raise ApiError(told, 404, "model", "model_not_found")
    missing, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if other in body or body.get(missing) is None:
        raise ApiError(f"a request to this address has {missing}, and no {other}", param=missing)
    stream, options = body.get("stream"), body.get("stream_options")
    usage = options.get("include_usage") if isinstance(options, dict) else options
    if not isinstance(stream, bool | None) or not isinstance(usage, bool | None) or isinstance(options, bool):
        told = 'stream must be true or false, and stream_options {"include_usage": true or false}'
        raise ApiError(told, param="stream")
    body = {name: value for name, value in body.items() if name not in STREAMING}
    check_fields(body)
    most = model.config.context if chat else COMPLETION_TOKENS
    settings = settings_of(body, {"max_new_tokens": most})
    try:
        request = prompt_of(model, body, raw=None if chat else True)
    except ValueError as error:
        raise ApiError(str(error), param=missing) from None
    if len(request.ids) >= model.config.context:
        held = f"the prompt has {len(request.ids):,} tokens and the context holds {model.config.context:,}"
        told = f"{held}, of which the answer needs one at least"
        raise ApiError(told, param=missing, code="context_length_exceeded")
    asked = request._replace(settings=settings)
    return Asked(asked, Form(chat, bool(stream), bool(usage), wants_logprobs(body)))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def check_fields(body: Mapping[str, Any]) -> None:
    """Raise ApiError for fields that matter and are not supported; null is as good as none."""
    for name, value in body.items():
        if name in FIXED and value is not None and (value != FIXED[name] or type(value) is not type(FIXED[name])):
            raise ApiError(f"{name} is {short(value)}; here it is always {json.dumps(FIXED[name])}", param=name)
        if name not in KNOWN | HARMLESS | FIXED.keys() and value is not None:
            raise ApiError(f"the field {short(name)} is not supported", param=short(name)[1:-1])


def settings_of(body: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `stream_generate` that a body gives, those of `default` where it gives none; ApiError."""
    given = {name: value for name, value in body.items() if value is not None}
    names = (*SAMPLING, *PENALTIES, "seed")
    settings = {name: _number(name, given.get(name, default.get(name))) for name in names}
    if settings["temperature"] == 0:  # clients send top_p = 1 with it, and flags are for other lines too
        settings |= dict.fromkeys(SAMPLING[1:])
    lengths = [_number(name, given[name]) for name in LENGTHS if name in given]
    settings["max_new_tokens"] = lengths[0] if lengths else default["max_new_tokens"]
    stop = settings["stop"] = given.get("stop", default.get("stop", ()))
    if not isinstance(stop, (str, list, tuple)) or not all(isinstance(each, str) for each in stop):
        raise ApiError("stop must be a text, or a list of texts", param="stop")
    if not isinstance(stop, str) and len(stop) > MOST_STOPS:
        raise ApiError(f"stop has {len(stop):,} texts; at most {MOST_STOPS} are looked for", param="stop")
    settings |= {"logit_bias": _bias(given.get("logit_bias", {})), "json_schema": _schema(given.get("response_format"))}
    return settings | {"top_logprobs": _top_logprobs(given)}


def wants_logprobs(body: Mapping[str, Any]) -> bool:
    """Does the reply show logprobs? A chat says true; a completion says how many beside each token, perhaps 0."""
    return body.get("logprobs") not in (None, False)


def _top_logprobs(given: Mapping[str, Any]) -> int:
    """How many of the likeliest tokens are shown: `top_logprobs` of a chat, `logprobs` itself of a completion."""
    shown, name = given.get("logprobs", False), "logprobs" if "prompt" in given else "top_logprobs"
    if "prompt" not in given and not isinstance(shown, bool):
        raise ApiError(f"logprobs is {short(shown)}; it must be true or false", param="logprobs")
    count = given.get(name, 0)
    if count is not False and (type(count) is not int or not 0 <= count <= MOST_LOGPROBS):
        raise ApiError(f"{name} is {short(count)}; it must be from 0 to {MOST_LOGPROBS}", param=name)
    if given.get("top_logprobs", 0) not in (0, False) and (name == "logprobs" or not shown):
        raise ApiError("top_logprobs takes messages, and logprobs: true beside it", param="top_logprobs")
    return int(count)


def _bias(given: Any) -> dict[int, float]:
    """OpenAI's logit_bias, whose ids are keys of JSON and so texts."""
    if not isinstance(given, dict) or not all(key.isdecimal() and len(key) < 20 for key in given):
        raise ApiError('logit_bias must be an object {"token id": number}', param="logit_bias")
    return {int(key): _number("logit_bias", value) for key, value in given.items()}


def _schema(given: Any) -> dict[str, Any] | None:
    """The JSON schema of a response_format; None where the answer is any text."""
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
    told = (
        'response_format must be {"type": "json_schema", "json_schema": {"schema": …}}, or of type json_object or text'
    )
    raise ApiError(told, param="response_format")


def _number(name: str, value: Any) -> Any:
    whole = name in WHOLE
    if value is not None and (isinstance(value, bool) or not isinstance(value, int if whole else (int, float))):
        raise ApiError(f"{name} is {short(value)}; it must be {'an integer' if whole else 'a number'}", param=name)
    if name in LENGTHS and value is not None and value < 1:
        raise ApiError(f"{name} is {short(value)}; it must be 1 or more", param=name)
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
    if not prompt or not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
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
    if unknown := [name for name, value in message.items() if value and name not in OF_MESSAGES]:
        raise ApiError(f"the field {short(unknown[0])} of a message is not supported", param="messages")
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
    from ..files.images import content_of, open_image

    if model.vision is None:
        raise no_vision(model.name, 1)
    try:
        content = content_of(url)
    except ValueError as error:
        raise ApiError(str(error), param="messages") from None
    side = model.vision.side  # scaled now, since what waits should be small; once more leaves it as it is
    image = open_image(content).resize((side, side), 2)  # 2: bilinear, as in `image_pixels`
    return image, int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:7])


# ---- replies


class Reply:
    """One answer in OpenAI's form: whole, or in chunks as it comes."""

    def __init__(self, model: Decoder, form: Form, name: str) -> None:
        """`name`: what the reply calls the model."""
        self.model, self.form = model, form
        kind = "chat.completion" if form.chat else "text_completion"
        own = f"{'chatcmpl' if form.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": own, "object": kind, "created": int(time.time()), "model": name}
        self.written = 0  # characters so far, for the offsets of logprobs

    def whole(self, tokens: Sequence[Token], cached: int = 0) -> dict[str, Any]:
        """The reply, when the answer has ended."""
        text, logprobs = "".join(token.text for token in tokens), self._logprobs(tokens)
        message = {"role": "assistant", "content": text, "refusal": None}
        said = {"message": message} if self.form.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": tokens[-1].finish_reason}
        return self.head | {"choices": [choice], "usage": self.counts(tokens[-1], cached)}

    def first(self) -> list[dict[str, Any]]:
        """The chunks before the first token."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.form.chat else []

    def chunks(self, token: Token, cached: int = 0) -> list[dict[str, Any]]:
        """The chunks of a token, with what ends the reply after the last."""
        made, reason, logprobs = [], token.finish_reason, self._logprobs([token])
        if token.text or logprobs or (reason and not self.form.chat):
            said = {"delta": {"content": token.text}} if self.form.chat else {"text": token.text}
            made.append(self._chunk(said, None if self.form.chat else reason, logprobs))
        if reason and self.form.chat:
            made.append(self._chunk({"delta": {}}, reason))
        if reason and self.form.usage:
            made.append(self._streamed() | {"choices": [], "usage": self.counts(token, cached)})
        return made

    def _streamed(self) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk" if self.form.chat else "text_completion"}

    def _chunk(self, said: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": reason}
        return self._streamed() | {"choices": [choice]} | ({"usage": None} if self.form.usage else {})

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """The logprobs of tokens, in the form of chats or of completions; the token that ends a text has none."""
        offsets = []
        for token in tokens:
            offsets.append(self.written)
            self.written += len(token.text)
        shown = [(token, at) for token, at in zip(tokens, offsets, strict=True) if token.token not in self.model.eos]
        if not self.form.logprobs or not shown:
            return None
        own = [self._spelled(token.token, token.logprob) for token, _ in shown]
        best = [[self._spelled(*each) for each in token.top_logprobs] for token, _ in shown]
        if self.form.chat:
            content = [entry | {"top_logprobs": several} for entry, several in zip(own, best, strict=True)]
            return {"content": content, "refusal": None}
        return {
            "tokens": [entry["token"] for entry in own],
            "token_logprobs": [entry["logprob"] for entry in own],
            "top_logprobs": [{entry["token"]: entry["logprob"] for entry in several} for several in best],
            "text_offset": [at for _, at in shown],
        }

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        """A token as text, its bytes and its logprob; half a character is U+FFFD as text."""
        assert self.model.tokenizer, "open_model refuses a model without one"
        spelled = self.model.tokenizer.bytes_of(token)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(spelled)}

    @staticmethod
    def counts(last: Token, cached: int = 0) -> dict[str, Any]:
        """Tokens of the prompt, how many of them were cached, and of the answer."""
        total = last.prompt_tokens + last.generation_tokens
        counted = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.generation_tokens}
        return counted | {"total_tokens": total, "prompt_tokens_details": {"cached_tokens": cached}}
