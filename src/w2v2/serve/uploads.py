"""``POST /v1/audio/transcriptions``: what a request asks for, the audio that it brings, and the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message

from w2v2.data.apart import ApartAudio
from w2v2.data.audio import AudioFile
from w2v2.inference.recordings import Source
from w2v2.inference.transcripts import FORMATS, Transcript, cues
from w2v2.inference.words import Word
from w2v2.serve.config import ServeConfig

TEXTS = {"text": "txt", "srt": "srt", "vtt": "vtt", "textgrid": "TextGrid", "ctm": "ctm"}
ANSWERS = ("json", "verbose_json", *TEXTS)
FORMAT_MB = 16.0
"""Size of a transcript that is sent to be written, at most: a day of speech."""
IGNORED = ("language", "prompt", "temperature")
"""Fields of the interface that this kind of model has no use for."""


@dataclass(frozen=True)
class Upload(Source):
    """A recording that was sent."""

    file: BinaryIO | None = None
    seconds: float = 0.0
    """Longer ones are refused."""

    def size(self) -> int:
        """Of no use: there is one recording."""
        return 1

    def open(self) -> AudioFile:
        """Open it, decoded in another process; raises as ``Source.open``."""
        assert self.file is not None
        return ApartAudio(self.file, self.seconds)


def limited(request: Request, config: ServeConfig) -> Request:
    """The same request, of which no more is taken than the limits allow.

    Raises:
        HTTPException: it announces more, and later, while it is read: it is more, or it stalls.
    """
    most, count = round(config.upload_mb * 1e6), 0
    too_large = HTTPException(413, f"an upload may have {config.upload_mb:g} MB; send less, or in parts")
    if int(request.headers.get("content-length") or 0) > most:
        raise too_large

    async def receive() -> Message:
        nonlocal count
        try:
            message = await asyncio.wait_for(request.receive(), config.stall_seconds)
        except TimeoutError:
            raise HTTPException(408, f"the upload stalled for {config.stall_seconds:g} s") from None
        count += len(message.get("body", b""))
        if count > most:
            raise too_large
        return message

    return Request(request.scope, receive)


async def answer(request: Request, config: ServeConfig, work: Callable[[Upload], Awaitable[Transcript]]) -> Response:
    """Transcribe what a request brings.

    Raises:
        HTTPException: it cannot be had, or is no audio.
    """
    async with limited(request, config).form(max_files=1, max_fields=20) as form:
        kind = form.get("response_format", "json")
        if kind not in ANSWERS:
            raise HTTPException(400, f"response_format must be one of {', '.join(ANSWERS)}, got {kind}")
        if form.get("stream", "false") not in ("false", "False", "0"):
            raise HTTPException(400, "stream is not here: the WebSocket /v1/audio/live is for audio as it comes")
        times, file = granularities(form), form.get("file")
        if not isinstance(file, UploadFile):
            raise HTTPException(400, "expected a file in the field 'file' of a multipart form")
        name = file.filename or "audio"
        transcript = await work(Upload(name, name, name, file=file.file, seconds=60 * config.upload_minutes))
        ignored = [field for field in IGNORED if form.get(field)]
        response = written(transcript, str(kind), times)
    if ignored:
        response.headers["X-Ignored-Fields"] = ", ".join(ignored)
    return response


def granularities(form: FormData) -> set[str]:
    """Which times are asked for: ``word``, ``segment``; without a word on it, segments.

    Raises:
        HTTPException: others.
    """
    asked = {str(value) for value in form.getlist("timestamp_granularities[]")} or {"segment"}
    if not asked <= {"word", "segment"}:
        raise HTTPException(400, f"timestamp_granularities[] must be word or segment, got {', '.join(sorted(asked))}")
    return asked


def written(transcript: Transcript, kind: str, times: set[str]) -> Response:
    """A transcript in one of ``ANSWERS``."""
    if kind in TEXTS:
        return PlainTextResponse(FORMATS[TEXTS[kind]](transcript, "none" if kind == "text" else "word"))
    if kind == "json":
        return JSONResponse({"text": transcript.text})
    content: dict[str, Any] = {"task": "transcribe", "language": "", "duration": round(transcript.seconds, 3)}
    content["text"] = transcript.text
    if "word" in times:
        content["words"] = [word_fields(word) for word in transcript.words]
    if "segment" in times:
        content["segments"] = [
            {"id": i, "start": round(cue.start, 3), "end": round(cue.end, 3), "text": " ".join(cue.lines)}
            for i, cue in enumerate(cues(transcript.words))
        ]
    return JSONResponse(content)


def word_fields(word: Word) -> dict[str, Any]:
    """A word as the interface has it, and how probable its labels are."""
    probability = word.probability()
    fields = {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
    return fields | ({} if probability is None else {"probability": round(probability, 4)})


async def rewritten(request: Request, config: ServeConfig) -> Response:
    """A transcript that the page has, in one of the formats of files: ``words`` as above, ``seconds``, ``format``.

    Raises:
        HTTPException: it is none.
    """
    try:
        fields = json.loads(await limited(request, replace(config, upload_mb=FORMAT_MB)).body())
        words = tuple(
            Word(str(w["word"]), float(w["start"]), float(w["end"])) for w in fields["words"] if w["word"].strip()
        )
        text = " ".join(word.text for word in words)
        kind, transcript = fields["format"], Transcript("audio", float(fields["seconds"]), text, words)
        return PlainTextResponse(FORMATS[TEXTS[kind]](transcript, "none" if kind == "text" else "word"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise HTTPException(400, f"expected words, seconds and format of a transcript: {error!r}") from None
