"""LMs in flashlight's KenLM, whose reader may crash on a damaged file: a process of its own goes first.

Run as a script it reads the LM that it is given.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary

from w2v2.errors import UsageError
from w2v2.files import open_file

log = logging.getLogger(__name__)

_BINARY = b"mmap lm http://kheafield.com/code"
_UNKNOWN = "<unk>"
_MEMORY = 32, 2 << 30
"""Bytes that reading may take, for each byte of the file and beside; more is what a damaged header asks for."""


def is_binary(lm: Path) -> bool:
    """Whether a file is KenLM's own format."""
    with open_file(lm) as file:
        return file.read(len(_BINARY)) == _BINARY


def load_lm(lm: Path, words: Sequence[str], asked: int) -> KenLM:
    """Load an LM.

    Args:
        words: have these numbers in it.
        asked: so many of them, the first, it is expected to know.

    Raises:
        UsageError: something else, or an LM of none of these words.
    """
    with _bare(lm) as path:
        _try(path, lm)
        model = KenLM(str(path), Dictionary([*words, _UNKNOWN]))
    nothing = model.start(True)
    unknown = model.score(nothing, len(words))[1]
    lost = [word for number, word in enumerate(words[:asked]) if model.score(nothing, number)[1] == unknown]
    if len(lost) == asked:
        raise UsageError(
            f"the LM {lm} knows none of the {asked} words of the lexicon, such as {lost[0]}; expected one of the same "
            "language and case"
        )
    if lost:
        log.info("%d of %d words of the lexicon are unknown to the LM, such as %s", len(lost), asked, lost[0])
    return model


@contextlib.contextmanager
def _bare(lm: Path) -> Iterator[Path]:
    """The file, or a copy that is not zipped and has no byte order mark, which KenLM takes for a word."""
    try:
        with open_file(lm) as file, tempfile.NamedTemporaryFile() as bare:
            content = gzip.GzipFile(fileobj=file) if lm.suffix == ".gz" else file
            if content.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                yield lm
                return
            shutil.copyfileobj(content, bare)
            bare.flush()
            yield Path(bare.name)
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {lm}: {error}; expected ARPA or a KenLM binary") from error


def _try(path: Path, lm: Path) -> None:
    script = [sys.executable, "-P", "-m", __spec__.name, str(path)]
    process = subprocess.run(script, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode:
        reason = (process.stdout.splitlines() or [f"its reader ends with {process.returncode}"])[-1]
        raise UsageError(f"{lm} is not an LM, or a damaged one: {reason}; expected ARPA or a KenLM binary")


def _read(path: Path) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        each, beside = _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (each * path.stat().st_size + beside,) * 2)
    try:
        model = KenLM(str(path), Dictionary([_UNKNOWN]))
        model.score(model.start(True), 0)
    except (RuntimeError, MemoryError) as error:
        sys.stdout.write((str(error).splitlines() or ["no memory"])[-1] + "\n")
        sys.exit(1)


if __name__ == "__main__":
    _read(Path(sys.argv[1]))
