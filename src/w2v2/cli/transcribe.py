"""``w2v2 transcribe`` and ``align``."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from w2v2.cli.decoding import SETTINGS, add_decoder_options, decoder_asked_for, show_beam_settings
from w2v2.cli.options import AddVerb, place
from w2v2.cli.progress import progress
from w2v2.cli.writer import Writer
from w2v2.errors import JobError, UsageError

if TYPE_CHECKING:
    from w2v2.inference.recognizer import Recognizer
    from w2v2.inference.recordings import Source
    from w2v2.inference.transcribe import Layout


log = logging.getLogger("w2v2")


FORMATS = ("txt", "json", "srt", "vtt", "ctm", "TextGrid")


def add(verb: AddVerb) -> None:
    """Add the verbs."""
    _add_transcribe(verb)
    _add_align(verb)


def _add_transcribe(verb: AddVerb) -> None:
    text = "recordings of any length to text, subtitles, word times"
    sub = verb("transcribe", _transcribe, text, epilog=SETTINGS, overrides=True)
    sub.add_argument("model", type=Path, help="fine-tuning run, or folder of weights of a CTC model")
    sub.add_argument("audio", nargs="+", help="files, URLs, folders of audio, or - for standard input")
    _add_output(sub, "txt")
    sub.add_argument(
        "--timestamps", choices=("none", "word", "char"), help="times to write (default: none in txt, otherwise word)"
    )
    add_decoder_options(sub)
    _add_windows(sub)


def _add_output(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument("--format", choices=FORMATS, default=default, help="(default: %(default)s)")
    sub.add_argument("--out", type=Path, help="folder for a file of each recording (default: standard output)")


def _channel(text: str) -> int | str:
    if text in ("each", "mix"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1, 2, ..., each, or mix, got {text!r}")
    return int(text)


def _heard(sources: Sequence[Source], channel: int | str) -> list[Source]:
    from w2v2.inference.recordings import choose_channel

    return list(sources) if channel == "mix" else choose_channel(sources, channel if isinstance(channel, int) else None)


def _add_windows(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--channel",
        type=_channel,
        default="mix",
        help="the one to hear: 1, 2, ..., each of them on its own, or the mix of all (default: %(default)s)",
    )
    sub.add_argument(
        "--batch-size", type=int, default=1, help="windows that are worked on together (default: %(default)s)"
    )
    sub.add_argument(
        "--window-seconds",
        type=float,
        default=30.0,
        help="longer audio is cut into such windows (default: %(default)s)",
    )
    sub.add_argument(
        "--context-seconds",
        type=float,
        default=3.0,
        help="heard at each side of a window and thrown away (default: %(default)s)",
    )
    sub.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")


def _transcribe(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.inference.recordings import find_sources
    from w2v2.inference.transcribe import transcribe

    usage = "w2v2 transcribe MODEL AUDIO"
    show_beam_settings(args, usage)
    timestamps = args.timestamps or ("none" if args.format == "txt" else "word")
    _check_output(args, timestamps)
    layout = _layout(args)
    recognizer = _recognizer(args)
    decoder = decoder_asked_for(args, rest, recognizer.vocabulary, usage)
    sources, failures = find_sources(args.audio)
    sources = _heard(sources, args.channel)
    for failure in failures:
        log.warning("%s: %s", failure.name, failure.reason)
    failed, writer = len(failures), Writer(args, timestamps, sources)
    with progress("transcribe") as show:
        for found in transcribe(
            recognizer,
            sources,
            decoder,
            layout=layout,
            batch_size=args.batch_size,
            show=lambda share: show("transcribe", share),
        ):
            failed += not writer.take(found)
    if failed:
        raise JobError(f"{failed} of {len(sources) + len(failures)} could not be transcribed; the lines above say why")


def _layout(args: argparse.Namespace) -> Layout:
    from w2v2.inference.transcribe import Layout

    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {args.batch_size}")
    return Layout(args.window_seconds, args.context_seconds)


def _recognizer(args: argparse.Namespace) -> Recognizer:
    from w2v2.inference.recognizer import load_recognizer

    recognizer = load_recognizer(args.model)
    place(recognizer.model, args.device)
    return recognizer


def _check_output(args: argparse.Namespace, timestamps: str) -> None:
    """Refuse what the format has no place for."""
    if args.format in ("srt", "vtt") and timestamps != "word":
        raise UsageError(f"--format {args.format} has times of words, no --timestamps {timestamps}; leave it out")
    if args.format in ("ctm", "TextGrid") and timestamps == "none":
        raise UsageError(f"--format {args.format} is made of times; leave --timestamps none out")


def _add_align(verb: AddVerb) -> None:
    sub = verb("align", _align, "when each word of a known text is said")
    sub.add_argument("model", type=Path, help="fine-tuning run, or folder of weights of a CTC model")
    sub.add_argument("audio", help="file, URL, - for standard input; or folder with transcripts, as 'prepare' reads it")
    sub.add_argument("text", nargs="?", help="the words that are said, or a file of them; none for a folder")
    _add_output(sub, "TextGrid")
    sub.add_argument(
        "--timestamps", choices=("word", "char"), default="word", help="times to write (default: %(default)s)"
    )
    _add_windows(sub)


def _align(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.inference.align import align
    from w2v2.inference.recordings import Failure

    _check_output(args, args.timestamps)
    layout = _layout(args)
    pairs = [(heard, text) for source, text in _texts(args) for heard in _heard([source], args.channel)]
    recognizer = _recognizer(args)
    failed, writer = 0, Writer(args, args.timestamps, [source for source, text in pairs if isinstance(text, str)])
    with progress("align") as show:
        for done, (source, text) in enumerate(pairs, 1):
            try:
                if isinstance(text, UsageError):
                    raise text
                found = align(recognizer, source, text, layout=layout, batch_size=args.batch_size)
            except UsageError as error:
                if args.text is not None:
                    raise
                found = Failure(source.name, str(error))
            failed += not writer.take(found)
            show("align", done / len(pairs))
    if failed:
        raise JobError(f"{failed} of {len(pairs)} could not be aligned; the lines above say why")


def _texts(args: argparse.Namespace) -> list[tuple[Source, str | UsageError]]:
    """Recordings and what is said in them, or why that is not known."""
    from w2v2.data.sources import folder_texts
    from w2v2.inference.recordings import Source, source_of

    if not os.path.isdir(args.audio):
        if args.text is None:
            raise UsageError(f"name the text of {args.audio}: the words, or a file of them")
        return [(source_of(args.audio), _read_text(args.text))]
    if args.text is not None:
        raise UsageError(
            f"{args.audio} is a folder, whose transcripts lie beside the audio; name a file, or leave the text out"
        )
    found = list(folder_texts(Path(args.audio)))
    expected = "expected *.trans.txt, or a .txt beside each recording"
    if not any(text is not None for _, text in found):
        raise UsageError(f"no transcripts in {args.audio}: {expected}")
    pairs: list[tuple[Source, str | UsageError]] = []
    for below, text in found:
        path = os.path.join(args.audio, below)
        pairs.append((Source(path, path, below), UsageError(f"no transcript: {expected}") if text is None else text))
    return pairs


def _read_text(text: str) -> str:
    """The words themselves, or what a file of that name holds."""
    expected = "expected the words that are said, or a file of them"
    if os.path.isdir(text):
        raise UsageError(f"{text} is a folder; {expected}")
    if not os.path.isfile(text):
        if text.endswith(".txt") or (os.sep in text and len(text.split()) == 1):
            raise UsageError(f"no such file: {text}; {expected}")
        return text
    try:
        return Path(text).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{text} is not UTF-8 text; convert it") from None
