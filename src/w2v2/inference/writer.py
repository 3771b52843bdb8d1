"""Where transcripts go: to a file each, or all to standard output."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from w2v2.errors import UsageError, printable
from w2v2.files import write_text
from w2v2.inference.recordings import Source
from w2v2.inference.transcripts import FORMATS, Transcript, ctm_names, to_ctm

ONE_FILE_EACH = ("srt", "vtt", "TextGrid")


def check_format(name: str, timestamps: str) -> None:
    """Refuse times that a format has no place for.

    Args:
        name: one of ``FORMATS``.
        timestamps: ``none``, ``word`` or ``char``.
    """
    if name in ("srt", "vtt") and timestamps != "word":
        raise UsageError(f"`format` {name} has times of words, no `timestamps` {timestamps}; leave it out")
    if name in ("ctm", "TextGrid") and timestamps == "none":
        raise UsageError(f"`format` {name} is made of times; leave `timestamps` none out")


class TranscriptWriter:
    """Writes transcripts as they are made: into a folder, or to a stream."""

    def __init__(
        self, sources: Sequence[Source], name: str, timestamps: str, out: Path | None, stream: TextIO | None = None
    ) -> None:
        """Say where the transcripts of some recordings will go.

        Args:
            name, timestamps: as in ``check_format``.
            out: folder; None: all to ``stream``, without one to standard output.

        Raises:
            UsageError: they would overwrite each other, or what may be transcripts beside the audio.
        """
        check_format(name, timestamps)
        self.format, self.timestamps, self.out, self.several = name, timestamps, out, len(sources) > 1
        self.by_channel = len({source.name for source in sources}) < len({(s.name, s.channel) for s in sources})
        self.ctm_names = ctm_names([source.name for source in sources])
        self.stream = stream or sys.stdout  # the one of now: a progress bar sends what is printed to standard error
        if out is None:
            if self.several and name in ONE_FILE_EACH:
                raise UsageError(f"`format` {name} holds one recording, got {len(sources)}; name a folder with `out`")
            return
        if out.exists() and not out.is_dir():
            raise UsageError(f"`out` {out} is a file; expected a folder")
        self.paths = _output_paths(sources, name)
        for source in sources:
            path = out / self.paths[source.name, source.channel]
            audio = Path(source.path)
            if path.exists() and audio.is_file() and path.parent.samefile(audio.parent):
                raise UsageError(f"{path} is beside its audio, may be its transcript and stays; choose another `out`")

    def write(self, transcript: Transcript) -> None:
        """Write one; a file is there whole or not at all."""
        if self.format == "ctm":
            text = to_ctm(transcript, self.timestamps, self.ctm_names[transcript.name])
        else:
            text = FORMATS[self.format](transcript, self.timestamps)
        if self.out is None:
            if self.several and self.format == "txt":
                name = printable(transcript.name)
                label = f"{name}:{transcript.channel}" if self.by_channel else name
                text = "".join(f"{label}\t{line}\n" for line in text.rstrip("\n").split("\n"))
            self.stream.write(text)
            self.stream.flush()
            return
        path = self.out / self.paths[transcript.name, transcript.channel]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text, as_said=True)


def _output_paths(sources: Sequence[Source], ending: str) -> dict[tuple[str, int | None], str]:
    """File below the folder by name and channel of a recording: its own with another ending; one more where two clash.

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
            f"{first} and {second} would both go to {path} in `out`; transcribe them into folders of their own"
        )
    return paths
