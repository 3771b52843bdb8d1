"""``w2v2 transcribe`` and ``align``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from w2v2.cli.decoding import Decoding
from w2v2.cli.options import MODEL, REQUIRED, Device, Language, default, refuse_without
from w2v2.cli.progress import progress
from w2v2.data.vad import Vad
from w2v2.decoding.decoder import make_decoder
from w2v2.errors import Count, JobError, UsageError, printable
from w2v2.inference.align import align, find_texts
from w2v2.inference.jobs import Work, in_processes
from w2v2.inference.live import (
    MICROPHONE,
    Live,
    LiveLayout,
    listen,
    microphone_pieces,
    stream_pieces,
    until_interrupted,
)
from w2v2.inference.recognizer import Recognizer, load_recognizer, place
from w2v2.inference.recordings import Failure, Source, choose_channel, find_sources
from w2v2.inference.transcribe import Layout, transcribe
from w2v2.inference.transcripts import Transcript
from w2v2.inference.writer import TranscriptWriter, check_format

log = logging.getLogger("w2v2")

Format = Literal["txt", "json", "jsonl", "srt", "vtt", "ctm", "TextGrid"]


@dataclass(kw_only=True)
class _Windows:
    """What is written, and how long recordings are cut."""

    model: Annotated[Positional[str], arg(metavar="MODEL", help=MODEL)]
    out: Annotated[Path | None, default("standard output", "DIR")] = None
    """Folder for a file of each recording."""
    batch_size: Count = 1
    """Windows, or as much audio in shorter ones, that are worked on together."""
    window_seconds: float = 30.0
    """Longer audio is cut into such windows."""
    context_seconds: float = 3.0
    """Heard at each side of a window and thrown away."""
    language: Language = None
    device: Device = None
    """cpu, cuda, cuda:1, mps."""

    channel: Annotated[str, arg(metavar="1|2|...|each|mix")] = "mix"
    """The one to hear, each of them on its own, or the mix of all."""

    def heard(self, sources: Sequence[Source]) -> list[Source]:
        """The recordings, or the channels of them that are to be heard."""
        if self.channel == "mix":
            return list(sources)
        if self.channel != "each" and not (self.channel.isdecimal() and int(self.channel) > 0):
            raise UsageError(f"`channel` must be 1, 2, ..., each, or mix, got {self.channel!r}")
        return choose_channel(sources, None if self.channel == "each" else int(self.channel))

    def ready(self) -> tuple[Recognizer, Layout]:
        """The model, and how to cut."""
        layout = Layout(self.window_seconds, self.context_seconds)
        recognizer = load_recognizer(self.model, self.language)
        place(recognizer.model, self.device)
        return recognizer, layout


@dataclass(kw_only=True)
class Transcribe(Decoding, _Windows):
    """See ``main.VERBS``."""

    audio: Annotated[Positional[tuple[str, ...]], arg(metavar="AUDIO ...", help_behavior_hint=REQUIRED)]
    """Files, URLs, folders of audio, or - for standard input."""
    format: Format = "txt"
    """Of what is written."""
    timestamps: Annotated[
        Literal["none", "word", "char"] | None, default("none in txt, otherwise word", "none|word|char")
    ] = None
    """Times to write."""
    live: bool = False
    """Write while one speaks: AUDIO is - for 16-bit PCM of one channel, or mic."""
    rate: Count = 16_000
    """Of live PCM, Hz."""
    look_ahead: float = LiveLayout.look_ahead
    """Live: seconds that are heard before text is final."""
    vad: bool = False
    """Leave out what is no speech; live, a pause ends a line."""
    jobs: Count = 1
    """Processes with a model each, for many recordings; with several GPUs, one on each."""

    def run(self, named: Collection[str]) -> None:
        """Write what is said in each recording, and say which could not be transcribed."""
        if self.live:
            return self._listen(named)
        refuse_without("live", ("rate", "look_ahead"), named)
        timestamps = self.timestamps or ("none" if self.format == "txt" else "word")
        check_format(self.format, timestamps)
        if not self.audio:
            raise UsageError("name the audio: files, URLs, folders, or - for standard input")
        work = None if self.jobs > 1 else self._load(named, self.device)
        sources, failures = find_sources(self.audio)
        sources = self.heard(sources)
        writer = TranscriptWriter(sources, self.format, timestamps, self.out)
        failed = sum(not _take(writer, failure) for failure in failures)
        with progress("transcribe") as show:
            share = partial(show, "transcribe")
            results = (
                in_processes(self.jobs, partial(self._load, named), sources, self.device, share)
                if work is None
                else work(sources, show=share)
            )
            for result in results:
                failed += not _take(writer, result)
        if failed:
            total = len(sources) + len(failures)
            raise JobError(f"{failed} of {total} could not be transcribed; the lines above say why")

    def _load(self, named: Collection[str], device: str | None) -> Work:
        """What transcribes recordings, with the model and all else loaded."""
        recognizer, layout = replace(self, device=device).ready()
        decoder = make_decoder(recognizer.vocabulary, **self.decoder(named))
        return partial(transcribe, recognizer, decoder=decoder, layout=layout, batch_size=self.batch_size, vad=self.vad)

    def _listen(self, named: Collection[str]) -> None:
        """Write final words as they come; in JSON each update."""
        if self.audio not in (("-",), (MICROPHONE,)):
            raise UsageError(f"`live` listens to - or {MICROPHONE}, got {' '.join(self.audio) or 'nothing'}")
        refused = sorted(
            {"out", "batch_size", "window_seconds", "context_seconds", "channel", "timestamps", "jobs"} & {*named}
        )
        if refused or any(value is not None and value != () for value in self.decoder(named).values()):
            names = ", ".join(f"`{name}`" for name in refused) or "a language model, lexicon, hot words or beam"
            raise UsageError(f"`live` is greedy and writes to standard output, without {names}; leave them out")
        if self.format not in ("txt", "json"):
            raise UsageError(f"`live` writes `format` txt or json, got {self.format}")
        layout = LiveLayout(look_ahead=self.look_ahead)
        recognizer, _ = self.ready()
        live = Live(recognizer, layout, Vad() if self.vad else None)
        microphone = self.audio == (MICROPHONE,)
        pieces = microphone_pieces(self.rate) if microphone else stream_pieces(sys.stdin.buffer)
        between = False
        for update in listen(live, recognizer, until_interrupted(pieces), self.rate):
            if self.format == "json":
                sys.stdout.write(json.dumps(update.fields(), ensure_ascii=False) + "\n")
            else:
                text = "".join(f" {word.text}" for word in update.words)
                sys.stdout.write((text if between else text[1:]) + "\n" * update.ended)
                between = (between or bool(text)) and not update.ended
            sys.stdout.flush()


@dataclass(kw_only=True)
class Align(_Windows):
    """See ``main.VERBS``."""

    audio: Annotated[Positional[str], arg(metavar="AUDIO")]
    """File, URL, - for standard input; or folder with transcripts, as 'prepare' reads it."""
    text: Annotated[Positional[str | None], arg(metavar="TEXT")] = None
    """The words that are said, or a file of them; none for a folder."""
    format: Format = "TextGrid"
    """Of what is written."""
    timestamps: Literal["word", "char"] = "word"
    """Times to write."""
    skip_unknown: bool = False
    """Match without digits, punctuation and whatever else has no label, and keep it in what is written."""

    def run(self, named: Collection[str]) -> None:
        """Write the times of each recording's words, and say which could not be aligned, or hardly."""
        check_format(self.format, self.timestamps)
        known_texts = find_texts(self.audio, self.text)
        pairs = [(heard, text) for source, text in known_texts for heard in self.heard([source])]
        recognizer, layout = self.ready()
        known = [source for source, text in pairs if isinstance(text, str)]
        failed, doubtful, writer = 0, 0, TranscriptWriter(known, self.format, self.timestamps, self.out)
        with progress("align") as show:
            for done, (source, text) in enumerate(pairs, 1):
                try:
                    if isinstance(text, UsageError):
                        raise text
                    result = align(
                        recognizer,
                        source,
                        text,
                        layout=layout,
                        batch_size=self.batch_size,
                        skip_unknown=self.skip_unknown,
                    )
                except UsageError as error:
                    if self.text is not None:
                        raise
                    result = Failure(source.name, str(error))
                failed += not _take(writer, result)
                if isinstance(result, Transcript) and result.doubt:
                    doubtful += 1
                    log.warning("%s: %s; written all the same", result.name, result.doubt)
                show("align", done / len(pairs))
        if failed:
            raise JobError(f"{failed} of {len(pairs)} could not be aligned; the lines above say why")
        if doubtful:
            raise JobError(f"{doubtful} of {len(pairs)} may be of other texts; the lines above say why")


def _take(writer: TranscriptWriter, result: Transcript | Failure) -> bool:
    """Write a transcript, or a line that says why there is none; returns whether it was written."""
    if isinstance(result, Failure):
        log.warning("%s: %s", result.name, result.reason)
        return False
    try:
        writer.write(result)
    except (OSError, UnicodeEncodeError) as error:  # the latter: a name that is no text
        if writer.out is None:  # nobody reads any further
            raise
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: cannot write what is said in it: %s", printable(result.name), reason)
        return False
    return True
