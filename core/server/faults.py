"""Faults as the API tells them: OpenAI's shape, a status, and what a client should do next."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from infopt.core.errors import (
    InfoptError,
    RequestFailedError,
    UnsupportedError,
    UsageError,
)

NOT_AGAIN = {"x-should-retry": "false"}
"""OpenAI's clients try again after most faults; this says that it would be in vain."""
_ENGINE_BACK_S = 2


class ApiError(Exception):
    """A fault in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code or kind}
        }

    @property
    def code(self) -> str:
        found: str = self.body["error"]["code"]
        return found

    def fresh(self) -> "ApiError":
        """The same for another raiser: tracebacks pile up on a shared one."""
        told = self.body["error"]
        return ApiError(
            self.status,
            self.message,
            kind=told["type"],
            param=told["param"],
            code=told["code"],
            headers=self.headers,
        )


def timed_out(seconds: float) -> ApiError:
    """A request whose time is over, wherever it was."""
    return ApiError(
        408,
        f"the request was not done after {seconds:g} s",
        kind="timeout_error",
        code="request_timeout",
        headers=NOT_AGAIN,
    )


def shutting_down() -> ApiError:
    """A request that comes, or is cut off, while the server ends."""
    return ApiError(
        503,
        "the server is shutting down",
        kind="engine_error",
        code="shutting_down",
        headers={"retry-after": str(_ENGINE_BACK_S), "connection": "close"},
    )


def api_error(error: Exception) -> ApiError:
    """Any fault as the API tells it; what nobody foresaw is a 500 without its details."""
    match error:
        case ApiError():
            return error
        case UsageError() | UnsupportedError():
            return ApiError(400, error.message)
        case RequestFailedError():
            code = "request_failed"
            return ApiError(500, error.message, kind="engine_error", code=code, headers=NOT_AGAIN)
        case InfoptError():
            headers = {"retry-after": str(_ENGINE_BACK_S)}
            return ApiError(503, error.message, kind="engine_error", headers=headers)
    return ApiError(500, "the server failed on this request", kind="server_error")


def error_response(error: Exception) -> Response:
    told = api_error(error)
    return JSONResponse(told.body, told.status, headers=told.headers)
