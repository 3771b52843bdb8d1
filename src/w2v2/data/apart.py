"""Files of strangers, decoded in a process of its own whatever their format: a crash of a decoder ends that alone.

The module is both sides: imported, what asks; run by child.py, what answers.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any, BinaryIO

import numpy as np

from w2v2.data.audio import AudioFile, FloatArray
from w2v2.data.child import ParentsFile, child, limit_memory, receive, send
from w2v2.data.containers import ContainerFile
from w2v2.errors import AudioError


class ApartFile(ContainerFile):
    """An open file; its decoder is elsewhere.

    Raises:
        AudioError: it cannot be opened as audio.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.process = file, child(__name__)
        description, _ = self._ask(do="open", size=file.seek(0, os.SEEK_END), name=name)
        self.samplerate, self.channels, self.slack = (description[key] for key in ("rate", "channels", "slack"))
        self.format, self.subtype = description["format"], description["subtype"]


class ApartAudio(AudioFile):
    """An ``AudioFile`` that is read by another process.

    Args:
        source: as of ``AudioFile``.
        most: seconds; what is longer is refused, whether its header or its samples say so.
    """

    def __init__(self, source: str | BinaryIO, most: float = math.inf) -> None:
        self.most = most
        super().__init__(source)
        self._check(self.frames)

    def read(self, count: int = -1) -> FloatArray:
        """As of ``AudioFile``; raises AudioError too when it has become too long."""
        samples = super().read(count)
        self._check(self.position)
        return samples

    def _check(self, samples: int) -> None:
        if samples > self.most * self.rate:
            raise AudioError(f"it is longer than {self.most / 60:g} minutes; send it in parts")

    def _open(self) -> ContainerFile:
        return ApartFile(self.stream, self.source if isinstance(self.source, str) else "audio")


def answer(command: dict[str, Any], audio: AudioFile | None) -> AudioFile | None:
    """Do what the parent asks for."""
    if command["do"] == "open":
        stream: Any = ParentsFile(command["size"], command["name"])
        audio = AudioFile(stream)
        subtype = audio.file.subtype
        fields = {"rate": audio.rate, "channels": audio.channels, "format": audio.format, "subtype": subtype}
        send({**fields, "slack": audio.slack})
    elif audio is not None and command["do"] == "close":
        audio.file.close()
        send({})
    elif audio is not None and command["do"] == "length":
        send({"frames": audio.frames, "missing": audio.missing})
    elif audio is not None and command["do"] == "seek":
        audio.seek(command["start"])
        send({"position": audio.position})
    elif audio is not None and command["do"] == "read":
        send({}, np.ascontiguousarray(audio.read(command["count"])).tobytes())
    return audio


def main() -> None:
    """Answer the parent until it is gone."""
    limit_memory()
    audio: AudioFile | None = None
    while True:
        command = receive(sys.stdin.buffer)
        try:
            audio = answer(command, audio)
        except Exception as error:  # whatever a hostile file brings about
            send({"error": str(error) or type(error).__name__})


if __name__ == "__main__":
    main()
