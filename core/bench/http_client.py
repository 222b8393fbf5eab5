"""Load against an OpenAI-compatible server: streamed /v1/completions."""

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from infopt.core.bench.client import Chunk, Request
from infopt.core.bench.sse import EventParser
from infopt.core.errors import EngineError, UsageError

CONNECT_SECONDS = 10.0
# Fields beyond OpenAI's own: what each is for, told where a server refuses it.
EXTENSIONS: dict[str, Any] = {"ignore_eos": True, "skip_special_tokens": False}
COST = {
    "ignore_eos": "answers may end before the length asked for",
    "skip_special_tokens": "special tokens are not seen as content",
    "continuous_usage_stats": "tokens per chunk are not known",
    "stream_options": "tokens are counted by chunks",
}


class HttpClient:
    """A server at a base URL, with or without its /v1; `model` defaults to the first it lists."""

    count_source = "usage"

    def __init__(self, url: str, *, model: str | None = None) -> None:
        self.url = _base(url)
        self.model = model
        self.vocab_size: int | None = None
        self.max_model_len: int | None = None
        self._warnings: list[str] = []
        self._extensions = dict(EXTENSIONS)
        self._stream_options = {"include_usage": True, "continuous_usage_stats": True}
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            headers={"Accept-Encoding": "identity"},
            trust_env=not local,  # a proxy is no way to this machine
        )

    @property
    def warnings(self) -> Sequence[str]:
        return self._warnings

    async def __aenter__(self) -> Self:
        try:
            await self._look()
            await self._probe()
        except BaseException:
            await self._http.aclose()
            raise
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._http.aclose()

    async def send(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """The frames of the answer as they are read; EngineError on failure, also under 200."""
        try:
            frames = self._post(self._body(request))
            async with aclosing(frames):
                async for chunk in frames:
                    yield chunk
        except httpx.ConnectError as error:
            raise EngineError(f"cannot connect to {self.url}: {error}") from error
        except httpx.HTTPError as error:
            raise EngineError(f"the connection broke: {type(error).__name__}: {error}") from error

    async def _post(self, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        url = f"{self.url}/v1/completions"
        async with self._http.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                raise _Refused(response.status_code, _said(await response.aread()))
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise EngineError(f"the server did not stream: its answer is {kind or 'untyped'!r}")
            parser, finished = EventParser(), False
            async for piece in response.aiter_raw():
                now = perf_counter()  # before any parsing
                for payload in parser.feed(piece):
                    if payload == b"[DONE]":
                        return
                    frame = _frame(payload)
                    finished = finished or _finish_reason(frame)
                    yield _chunk(frame, now)
            if not finished:
                raise EngineError("the stream ended before the answer did")

    def _body(self, request: Request) -> dict[str, Any]:
        prompt = request.prompt
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
            **self._extensions,
        }
        return {**body, "stream_options": self._stream_options} if self._stream_options else body

    async def _look(self) -> None:
        """Find the model's name and what the server tells of it."""
        try:
            response = await self._http.get(f"{self.url}/v1/models", timeout=CONNECT_SECONDS)
            status = response.status_code
            listed = response.json()["data"] if status == 200 else []
        except httpx.HTTPError as error:
            raise EngineError(
                f"no server answers at {self.url}: {str(error) or type(error).__name__}",
                "start one with 'infopt serve', or leave out --url to bench the engine here",
            ) from error
        except (ValueError, KeyError, TypeError):
            listed = []
        entries = [entry for entry in listed if isinstance(entry, dict)]
        if self.model is None and not entries:
            reason = "lists no model" if status == 200 else f"answers with HTTP {status}"
            raise EngineError(
                f"{self.url}/v1/models {reason}", "is it an OpenAI-compatible server?"
            )
        self.model = self.model or str(entries[0].get("id"))
        for entry in entries:
            if entry.get("id") == self.model:
                self.vocab_size = _count(entry, "vocab_size")
                self.max_model_len = _count(entry, "max_model_len")
        if self.vocab_size is None:
            self._warnings.append(
                "the server does not tell its vocabulary: prompts are words, "
                "and their tokens are as the server counts them"
            )

    async def _probe(self) -> None:
        """Send one short request, giving up, with a warning, the extensions that are refused."""
        request = Request((0, 0, 0, 0) if self.vocab_size else "The time of day is", 2)
        while True:
            try:
                frames = self.send(request)
                async with aclosing(frames):
                    async for _ in frames:
                        pass
                return
            except _Refused as refusal:
                dropped = self._drop(refusal)
                if not dropped:
                    raise
                self._warnings += [f"the server refused {name}: {COST[name]}" for name in dropped]

    def _drop(self, refusal: "_Refused") -> list[str]:
        """Take back the extensions named in a refusal, or all of them if it names none."""
        if refusal.status not in (400, 422):
            return []
        sent = [*self._extensions, *(n for n in self._stream_options if n != "include_usage")]
        if (
            "stream_options" in refusal.message
            and self._stream_options
            and not any(name in refusal.message for name in sent)
        ):
            self._stream_options = {}
            return ["stream_options"]
        named = [name for name in sent if name in refusal.message] or sent
        for name in named:
            self._extensions.pop(name, None)
            self._stream_options.pop(name, None)
        return named


class _Refused(EngineError):
    """The server answered with a status other than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status}: {reason}")
        self.status = status


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is out of range
        httpx.URL(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid:
        raise UsageError(f"not the URL of a server: {url!r}", "such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _count(entry: dict[str, Any], key: str) -> int | None:
    value = entry.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _said(body: bytes) -> str:
    """The reason in an error's body, in one line."""
    text = body.decode(errors="replace")
    try:
        return _reason(json.loads(text))
    except ValueError:
        if text.lstrip().startswith("<"):  # a page for people
            return "the server did not answer as an OpenAI server"
        return " ".join(text.split())[:200] or "no reason given"


def _reason(content: Any) -> str:
    error = content.get("error", content) if isinstance(content, dict) else content
    if isinstance(error, dict):
        words = [str(error[key]) for key in ("message", "detail", "param") if error.get(key)]
        error = "; ".join(words) or json.dumps(error)
    return " ".join(str(error).split())[:300]


def _frame(payload: bytes) -> dict[str, Any]:
    try:
        frame = json.loads(payload)
    except ValueError:
        raise EngineError("a frame of the stream is not JSON") from None
    if not isinstance(frame, dict):
        raise EngineError("a frame of the stream is not an object")
    if frame.get("error"):
        raise EngineError(f"the server failed in mid-stream: {_reason(frame)}")
    return frame


def _choices(frame: dict[str, Any]) -> list[dict[str, Any]]:
    return [choice for choice in frame.get("choices") or [] if isinstance(choice, dict)]


def _finish_reason(frame: dict[str, Any]) -> bool:
    return any(choice.get("finish_reason") for choice in _choices(frame))


def _chunk(frame: dict[str, Any], now: float) -> Chunk:
    usage = frame.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    content = any(
        choice.get("text") or (choice.get("delta") or {}).get("content")
        for choice in _choices(frame)
    )
    return Chunk(now, content, _tokens(usage, "completion_tokens"), _tokens(usage, "prompt_tokens"))


def _tokens(usage: dict[str, Any], key: str) -> int | None:
    value = usage.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
