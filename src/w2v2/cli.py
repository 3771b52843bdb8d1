"""The ``w2v2`` command: parses a verb, runs it, and makes one line and an exit code of what goes wrong.

The verbs are in ``verbs/``. Heavy imports live inside them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from w2v2.errors import JobError, StoppedError, UsageError
from w2v2.verbs import data, exchange, export, features, language, results, training, transcription
from w2v2.verbs.settings import Run

log = logging.getLogger("w2v2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit code 0: done; 1: it failed; 2: the call or the input has to be put right; 130: interrupted."""
    # oneDNN keeps 1024 primitives, one for each length of a crop: a third of a small model's memory, and no time saved.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    args, rest = _parser().parse_known_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        if rest and not args.overrides:
            raise UsageError(f"unknown arguments {' '.join(rest)}; see 'w2v2 {args.verb} --help'")
        args.run(args, rest)
    except UsageError as error:
        sys.stderr.write(f"w2v2: error: {_last_line(error)}\n")
        return 2
    except StoppedError as stop:
        sys.stderr.write(f"w2v2: {stop}\n")
        return stop.exit_code
    except (JobError, OSError) as error:
        sys.stderr.write(f"w2v2: failed: {_last_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("w2v2: interrupted\n")
        return 130
    return 0


def _last_line(error: Exception) -> str:
    """The message; of one that comes from a data worker, with that worker's traceback, the last line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix(_name(error))


def _name(error: Exception) -> str:
    kind = type(error)
    return f"{kind.__qualname__}: " if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}: "


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="w2v2", description="wav2vec 2.0: from raw audio to a trusted transcript")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Run, text: str, *, overrides: bool = False, **kwargs: Any) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, **kwargs)
        sub.set_defaults(run=run, overrides=overrides)
        return sub

    for group in (data, training, language, transcription, results, features, exchange, export):
        group.add(verb)
    return parser


if __name__ == "__main__":
    sys.exit(main())
