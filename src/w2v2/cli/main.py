"""The ``w2v2`` command: parses a verb, runs it, and makes one line and an exit code of what goes wrong.

Only the module of the chosen verb is imported, and heavy imports live inside ``run`` where they can, so that ``--help``
answers at once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, Union

from tyro.conf import subcommand

from w2v2.cli.options import as_options, named_options, parse, parse_run
from w2v2.errors import JobError, StoppedError, UsageError, check_ranges, printable

VERBS = {
    "demo": ("evaluate", "the whole road offline: synthesise, prepare, pretrain, fine-tune, evaluate, report"),
    "prepare": ("prepare", "check every recording of a source of audio, and write its manifests, or shards to stream"),
    "pretrain": ("train", "self-supervised pretraining"),
    "finetune": ("train", "CTC fine-tuning, of a pretrained encoder or from scratch; or a classifier of utterances"),
    "plan": ("plan", "what a pretraining run will take, from some measured steps: time, memory, batch and rate; masks"),
    "lm": ("lm", "n-gram language model of words from text or a corpus's transcripts: modified Kneser-Ney, as ARPA"),
    "transcribe": ("transcribe", "recordings of any length to text, subtitles, word times"),
    "serve": ("serve", "a model behind a local page, an HTTP interface for files, and a WebSocket for live audio"),
    "align": ("transcribe", "when each word of a known text is said"),
    "evaluate": (
        "evaluate",
        "WER and CER of a fine-tuned run, or its accuracy, how sure, which errors; of a pretraining run its loss",
    ),
    "report": ("evaluate", "one self-contained HTML page of a run"),
    "extract": ("extract", "hidden states, codes or pooled vectors of recordings, a file for each"),
    "convert": ("convert", "a model to or from Hugging Face's or fairseq's format, certified to compute the same"),
    "export": ("convert", "a model for use without this package, checked against the original"),
}
"""What each does, and the module that has it as a class."""

_LONGEST = 4000
"""Characters of a line about a failure, which may quote what a file holds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit code 0: done; 1: it failed; 2: the call or the input has to be put right; 130: interrupted."""
    # oneDNN keeps 1024 primitives, one for each length of a crop: a third of a small model's memory, and no time saved.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # Threads that wait for each other by spinning for long keep the core from whom they wait for, as soon as anything
    # else runs on the machine; without any spinning they are slow where nothing does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if argv is None and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        # Names of files would be read in the locale's encoding, and written so into what others are to read.
        python = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, python, {**os.environ, "PYTHONUTF8": "1"})
    _speak_utf8()
    code, message = _run(sys.argv[1:] if argv is None else list(argv))
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(message)
    left = _reader_left()
    return code or (141 if left else 0)


def _run(argv: list[str]) -> tuple[int, str]:
    """Exit code, and what to say beside it."""
    kind: Any = None
    try:
        try:
            if not argv or argv[0].startswith("-"):
                _without_verb(argv)
            else:
                kind = _verb(argv[0])
                _log_as(kind)
                check_ranges(verb := _parse(kind, argv))
                verb.run(named_options(argv))
        except SystemExit as stop:
            if stop.code:  # of help there is none
                raise
        sys.stdout.flush()
        return 0, ""
    except UsageError as error:
        return 2, f"w2v2: error: {as_options(_one_line(error), kind)}\n"
    except StoppedError as stop:
        return stop.exit_code, f"w2v2: {as_options(_one_line(stop), kind)}\n"
    except (JobError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 141, ""
        return 1, f"w2v2: failed: {as_options(_one_line(error), kind)}\n"
    except KeyboardInterrupt:
        return 130, "w2v2: interrupted\n"


def _without_verb(argv: list[str]) -> None:
    if argv[:1] == ["--version"]:
        sys.stdout.write(f"w2v2 {version('w2v2')}\n")
    elif argv[:1] in (["-h"], ["--help"]):
        lines = ["usage: w2v2 VERB ...", "", "wav2vec 2.0: from raw audio to a trusted transcript", ""]
        lines += [f"  {name:12}{text}" for name, (_, text) in VERBS.items()]
        lines += ["", "w2v2 VERB --help                       what a verb takes, with units and defaults"]
        lines += ["w2v2 --version                         which version this is"]
        lines += ["w2v2 --tyro-print-completion SHELL     completions for bash, zsh, fish or tcsh"]
        sys.stdout.write("\n".join(lines) + "\n")
    elif argv and argv[0].startswith("--tyro-"):
        verbs: Any = Union[tuple(Annotated[_verb(name), subcommand(name)] for name in VERBS)]  # noqa: UP007
        parse(verbs, argv, "w2v2")
    else:
        given = f", got {argv[0]}" if argv else ""
        raise UsageError(f"expected a verb, one of {', '.join(VERBS)}{given}; see 'w2v2 --help'")


def _verb(name: str) -> Any:
    if name not in VERBS:
        raise UsageError(f"no verb {name!r}: expected one of {', '.join(VERBS)}; see 'w2v2 --help'")
    return getattr(import_module(f"w2v2.cli.{VERBS[name][0]}"), name.capitalize() if name != "lm" else "LM")


def _parse(kind: Any, argv: list[str]) -> Any:
    read = parse_run if "config" in kind.__dataclass_fields__ else parse
    return read(kind, argv[1:], f"w2v2 {argv[0]}", description=VERBS[argv[0]][1])


def _log_as(kind: Any) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(kind))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("w2v2").setLevel(logging.INFO)


class _Lines(logging.Formatter):
    """Lines of the log, with settings spelled as options."""

    def __init__(self, kind: Any) -> None:
        super().__init__("%(message)s")
        self.kind = kind

    def format(self, record: logging.LogRecord) -> str:
        """The message; whatever is put into it stays in its line."""
        if isinstance(record.args, tuple):
            texts = (str, os.PathLike, BaseException)
            record.args = tuple(printable(str(arg)) if isinstance(arg, texts) else arg for arg in record.args)
        return as_options(super().format(record), self.kind)


def _reader_left() -> bool:
    """Whether nobody reads standard output any more, as of ``w2v2 ... | head``; then nothing more is written there."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
    except (OSError, ValueError, AttributeError):  # not a file, or closed; no such call on Windows
        return False
    poll.register(output, 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # or Python would complain as it ends
    return left


def _speak_utf8() -> None:
    """Text and file names of any language can be written, whatever the locale; bytes of a name that are none stay."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _one_line(error: Exception) -> str:
    """The message; of one that comes from a data worker, with that worker's traceback, the last line."""
    message = str(error).strip() or type(error).__name__
    ours = isinstance(error, (UsageError, JobError, StoppedError)) and not message.startswith("Caught ")
    line = printable(message if ours else message.splitlines()[-1].removeprefix(_name(error)))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def _name(error: Exception) -> str:
    kind = type(error)
    return f"{kind.__qualname__}: " if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}: "


if __name__ == "__main__":
    sys.exit(main())
