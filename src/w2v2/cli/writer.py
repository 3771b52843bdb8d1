"""Transcripts to files or to standard output, as they are made."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from w2v2.errors import UsageError
from w2v2.files import write_text

if TYPE_CHECKING:
    from w2v2.inference.recordings import Failure, Source
    from w2v2.inference.transcripts import Transcript

log = logging.getLogger("w2v2")

ONE_FILE_EACH = ("srt", "vtt", "TextGrid")


class Writer:
    """Writes transcripts as they are made: to a file each, or all to standard output."""

    def __init__(self, args: argparse.Namespace, timestamps: str, sources: Sequence[Source]) -> None:
        from w2v2.inference.transcripts import ctm_names

        self.format, self.timestamps, self.out, self.several = args.format, timestamps, args.out, len(sources) > 1
        self.each = args.channel == "each"
        self.ctm_names = ctm_names([source.name for source in sources])
        self.stdout: TextIO = sys.stdout  # a progress bar would send to standard error what is printed while it moves
        if self.out is None:
            if self.several and self.format in ONE_FILE_EACH:
                raise UsageError(
                    f"--format {self.format} holds one recording, got {len(sources)}; name a folder with --out"
                )
            return
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is a file; expected a folder")
        self.paths = _output_paths(sources, self.format)
        for source in sources:
            path = self.out / self.paths[source.name, source.channel]
            if path.exists() and _is_beside(path, source.path):
                raise UsageError(f"{path} is beside its audio, may be its transcript and stays; choose another --out")

    def take(self, found: Transcript | Failure) -> bool:
        """Write a transcript, or a line that says why there is none; returns whether it was written."""
        from w2v2.inference.transcripts import Transcript

        if isinstance(found, Transcript):
            try:
                self._write(found)
            except OSError as error:
                if self.out is None:  # nobody reads any further
                    raise
                log.warning("%s: cannot write what is said in it: %s", found.name, error.strerror or error)
                return False
            return True
        log.warning("%s: %s", found.name, found.reason)
        return False

    def _write(self, transcript: Transcript) -> None:
        from w2v2.inference.transcripts import FORMATS, to_ctm

        if self.format == "ctm":
            text = to_ctm(transcript, self.timestamps, self.ctm_names[transcript.name])
        else:
            text = FORMATS[self.format](transcript, self.timestamps)
        if self.out is None:
            if self.several and self.format == "txt":
                label = f"{transcript.name}:{transcript.channel}" if self.each else transcript.name
                text = "".join(f"{label}\t{line}\n" for line in text.splitlines())
            self.stdout.write(text)
            self.stdout.flush()
            return
        path = self.out / self.paths[transcript.name, transcript.channel]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _is_beside(path: Path, audio: str) -> bool:
    return os.path.isfile(audio) and path.parent.samefile(os.path.dirname(audio) or ".")


def _output_paths(sources: Sequence[Source], ending: str) -> dict[tuple[str, int | None], str]:
    """File below ``--out`` by name and channel of a recording: its own with another ending; one more where two clash.

    Raises:
        UsageError: they clash all the same.
    """
    below = {(source.name, source.channel): source.place for source in sources}
    stems = Counter(os.path.splitext(own)[0] for own in below.values())
    paths: dict[tuple[str, int | None], str] = {}
    for name, own in below.items():
        stem = os.path.splitext(own)[0]
        paths[name] = f"{own if stems[stem] > 1 else stem}.{ending}"
    path, count = Counter(paths.values()).most_common(1)[0] if paths else ("", 0)
    if count > 1:
        first, second = [name for (name, _), own in paths.items() if own == path][:2]
        raise UsageError(
            f"{first} and {second} would both go to {path} in --out; transcribe them into folders of their own"
        )
    return paths
