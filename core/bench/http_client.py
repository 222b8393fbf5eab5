"""Load against an OpenAI-compatible server: streamed completions or chats."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from infopt.core.bench.client import Chunk, Request
from infopt.core.bench.frames import chunk_of, finished, frame_of, said
from infopt.core.bench.sse import EventParser
from infopt.core.errors import EngineError, UsageError
from infopt.core.recipe.bench import Endpoint

CONNECT_SECONDS, METRICS_SECONDS = 10.0, 5.0
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

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        endpoint: Endpoint = "completions",
        api_key: str | None = None,
    ) -> None:
        self.url = _base(url)
        self.model = model
        self.endpoint = endpoint
        self.vocab_size: int | None = None
        self.max_model_len: int | None = None
        self._warnings: list[str] = []
        self._extensions = dict(EXTENSIONS)
        self._stream_options = {"include_usage": True, "continuous_usage_stats": True}
        self._api_key = api_key
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            headers={"Accept-Encoding": "identity", **_authorization(api_key)},
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
        except EngineError as error:
            error.message = self._hide(error.message)
            raise

    async def _post(self, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        path = "chat/completions" if self.endpoint == "chat" else "completions"
        url = f"{self.url}/v1/{path}"
        async with self._http.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                raise _Refused(response.status_code, said(await response.aread()))
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise EngineError(f"the server did not stream: its answer is {kind or 'untyped'!r}")
            parser, over = EventParser(), False
            async for piece in response.aiter_raw():
                now = perf_counter()  # before any parsing
                for payload in parser.feed(piece):
                    if payload == b"[DONE]":
                        return
                    frame = frame_of(payload)
                    over = over or finished(frame)
                    yield chunk_of(frame, now)
            if not over:
                raise EngineError("the stream ended before the answer did")

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            **self._asked(request),
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
            **self._extensions,
            **request.extra,
        }
        if request.extra:  # an answer with a form ends where its form does
            body.pop("ignore_eos", None)
        return {**body, "stream_options": self._stream_options} if self._stream_options else body

    def _asked(self, request: Request) -> dict[str, Any]:
        if self.endpoint == "chat":
            alone = ({"role": "user", "content": request.prompt},)
            return {"messages": list(request.messages or alone)}
        assert not request.messages, "messages go through chat"
        prompt = request.prompt
        return {"prompt": prompt if isinstance(prompt, str) else list(prompt)}

    def _hide(self, text: str) -> str:
        """Some servers repeat the key that they refuse."""
        return text.replace(self._api_key, "***") if self._api_key else text

    async def server_metrics(self) -> str | None:
        """The text of /metrics; None where there is none."""
        try:
            response = await self._http.get(f"{self.url}/metrics", timeout=METRICS_SECONDS)
        except httpx.HTTPError:
            return None
        return response.text if response.status_code == 200 else None

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
        if self.endpoint == "chat":
            self.vocab_size = None  # a chat is text
        elif self.vocab_size is None:
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


def _authorization(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


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
