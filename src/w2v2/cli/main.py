"""The ``w2v2`` command: parses a verb, runs it, and makes one line and an exit code of what goes wrong.

The verbs are in ``verbs/``. Heavy imports live inside them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from w2v2.cli import convert as exchange
from w2v2.cli import evaluate as results
from w2v2.cli import export
from w2v2.cli import extract as features
from w2v2.cli import lm as language
from w2v2.cli import prepare as data
from w2v2.cli import train as training
from w2v2.cli import transcribe as transcription
from w2v2.cli.options import Run, as_options
from w2v2.errors import JobError, StoppedError, UsageError

log = logging.getLogger("w2v2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit code 0: done; 1: it failed; 2: the call or the input has to be put right; 130: interrupted."""
    # oneDNN keeps 1024 primitives, one for each length of a crop: a third of a small model's memory, and no time saved.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    _speak_utf8()
    argv = sys.argv[1:] if argv is None else argv
    args, rest = _parser().parse_known_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        if rest and not args.overrides:
            raise UsageError(f"unknown arguments {' '.join(rest)}; see 'w2v2 {args.verb} --help'")
        _refuse_early_settings(argv, rest)
        args.run(args, rest)
    except UsageError as error:
        sys.stderr.write(f"w2v2: error: {as_options(_last_line(error), args)}\n")
        return 2
    except StoppedError as stop:
        sys.stderr.write(f"w2v2: {as_options(str(stop), args)}\n")
        return stop.exit_code
    except (JobError, OSError) as error:
        sys.stderr.write(f"w2v2: failed: {as_options(_last_line(error), args)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("w2v2: interrupted\n")
        return 130
    return 0


def _speak_utf8() -> None:
    """Text and file names of any language can be written, whatever the locale; bytes of a name that are none stay."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _refuse_early_settings(argv: Sequence[str], rest: Sequence[str]) -> None:
    """argparse, which knows no settings, may have taken the value of one for the model or recipe that follows it."""
    at = -1
    for word, left in itertools.zip_longest(rest, rest[1:]):
        if word.startswith("--") and "=" not in word:
            at = argv.index(word, at + 1)
            value = argv[at + 1] if at + 1 < len(argv) else "--"
            if value != left and not value.startswith("--"):
                raise UsageError(
                    f"settings follow the other arguments: put {word} {value} last, or write {word}={value}"
                )


def _last_line(error: Exception) -> str:
    """The message; of one that comes from a data worker, with that worker's traceback, the last line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix(_name(error))


def _name(error: Exception) -> str:
    kind = type(error)
    return f"{kind.__qualname__}: " if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}: "


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="w2v2", description="wav2vec 2.0: from raw audio to a trusted transcript", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Run, text: str, *, overrides: bool = False, **kwargs: Any) -> argparse.ArgumentParser:
        # Otherwise a setting such as --beam-size, mistyped, may be taken for the beginning of an option.
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False, **kwargs)
        sub.set_defaults(run=run, overrides=overrides, parser=sub)
        return sub

    for group in (data, training, language, transcription, results, features, exchange, export):
        group.add(verb)
    return parser


if __name__ == "__main__":
    sys.exit(main())
