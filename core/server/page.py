"""The page at /: a chat with the model, and what the server does, live."""

import base64
import hashlib
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

SCRIPTS = ("client.js", "figures.js", "live.js", "chat.js")
"""In this order they are one module."""
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


def page() -> tuple[str, str]:
    """The page, which fetches nothing but what the API answers, and its Content-Security-Policy."""
    style, script = _part("page.css"), "\n".join(map(_part, SCRIPTS))
    html = _part("page.html").replace("/* style */", style).replace("/* script */", script)
    return html, _POLICY.format(script=_digest(script), style=_digest(style))


def add_page(app: FastAPI) -> None:
    """Add the route to the app."""
    html, policy = page()
    headers = {
        "cache-control": "no-cache",
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def served() -> Response:
        return Response(html, media_type="text/html", headers=headers)


def _part(name: str) -> str:
    return (files("infopt.core.server") / "web" / name).read_text("utf-8")


def _digest(text: str) -> str:
    """As a policy names what it lets run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
