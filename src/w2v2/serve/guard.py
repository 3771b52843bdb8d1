"""Who may ask: a page of another site in the user's own browser, and whoever lacks the token, may not."""

from __future__ import annotations

import hmac
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from w2v2.serve.config import ServeConfig

OPEN = ("/", "/page.css", "/page.js", "/health")
"""Paths without secrets: they need no token."""
LOCAL = ("localhost", "127.0.0.1", "[::1]")


def failure(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as clients of such interfaces read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status, headers)


class Guard:
    """Lets requests through to an application, or answers them itself."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        refusal = self.refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await failure(*refusal)(scope, receive, send)
        else:
            socket = WebSocket(scope, receive, send)
            await socket.accept()  # a browser shows a page nothing of a refused one
            await socket.send_json({"error": refusal[1]})
            await socket.close(1008)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason; None: it may pass."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without a port
        if self.config.local and name not in (*LOCAL, self.config.host):  # one that was bent to this address
            return 403, f"this server is for {self.config.host} alone, not for {host}"
        if origin is not None and origin.rpartition("://")[2] != host:
            return 403, f"pages of {origin} may not ask this server"
        if self.config.token is None or scope["path"] in OPEN:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if scope["type"] == "websocket" and not given:  # browsers send no headers with these
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if hmac.compare_digest(given.encode(), self.config.token.encode()):
            return None
        return 401, "expected the server's token (Authorization: Bearer ..., or the API key of a client)"
