"""Decodes with FFmpeg's libraries in a process of its own (child.py): started by containers.py, opens no file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from w2v2.data.child import ParentsFile, limit_memory, receive, send

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,amr,amrnb,amrwb,aac,flv"
APART_SECONDS = 0.02
"""Time stamps that differ by more from the samples so far leave a hole: less than one AAC frame, more than rounding."""
JUMP_SECONDS = 60.0
"""In formats whose time stamps may jump (MPEG), more than this is no hole."""
MOST_SILENCE_SECONDS = 6 * 3600.0

Samples = npt.NDArray[np.float32]


class RefusedError(Exception):
    """A file that is not read; the message says why."""


class Decoder:
    """The first audio stream of a file, on the time line that its packets tell: silence where there are none."""

    def __init__(self, size: int, name: str, rates: tuple[int, int], most_channels: int) -> None:
        self.size, self.name, self.rates, self.most_channels = size, name, rates, most_channels
        self.restart()
        stream = self.container.streams.audio[0]
        self.codec = stream.codec_context.name
        self._check(stream.codec_context.sample_rate, stream.codec_context.channels)
        # Only a decoded frame tells for certain: HE-AAC doubles the rate that is announced.
        frame = next(self.frames, None)
        if frame is None:
            raise RefusedError("no audio frame in it")
        self.rate, self.channels = frame.sample_rate, len(frame.layout.channels)
        self._check(self.rate, self.channels)
        self.restart()

    def _check(self, rate: int, channels: int) -> None:
        low, high = self.rates
        if not low <= rate <= high:
            raise RefusedError(f"{rate} Hz, expected {low} to {high}")
        if not 1 <= channels <= self.most_channels:
            raise RefusedError(f"{channels} channels, expected 1 to {self.most_channels}")

    def restart(self) -> None:
        """Go back to the beginning."""
        self.container = self.open()
        self.frames: Iterator[Any] = iter(self.container.decode(audio=0))
        self.blocks = self.timed()
        self.rest: Samples = np.zeros((0, 0), np.float32)
        self.position = 0

    def open(self) -> Any:
        """The container from its first byte."""
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
        container = av.open(ParentsFile(self.size, self.name), options=options, metadata_errors="ignore")
        if not container.streams.audio:
            raise RefusedError("no audio stream in it")
        return container

    def origin(self) -> float:
        """The time stamp, seconds, that is the beginning: of formats that may begin anywhere, the file's first."""
        start = self.container.start_time
        return start / av.time_base if self.jumps() and start is not None else 0.0

    def jumps(self) -> bool:
        """Whether time stamps of this format may jump."""
        return bool(self.container.format.flags & av.format.Flags.ts_discont.value)

    def timed(self) -> Iterator[Samples]:
        """Frames and silence, (samples, channels), one after the other."""
        position, shift, silence = 0, self.origin(), 0.0
        for frame in self.frames:
            if (frame.sample_rate, len(frame.layout.channels)) != (self.rate, self.channels):
                raise RefusedError("rate or channels change within it")
            at = position if frame.pts is None else round((float(frame.pts * frame.time_base) - shift) * self.rate)
            apart = (at - position) / self.rate
            if apart < -APART_SECONDS or (apart > JUMP_SECONDS and self.jumps()):
                shift += apart  # nothing is dropped: it follows on what came before
            elif apart > APART_SECONDS:
                silence += apart
                if silence > MOST_SILENCE_SECONDS:
                    raise RefusedError(f"no audio for {apart:.0f} s after {position / self.rate:.2f} s")
                while position < at:
                    count = min(at - position, self.rate)
                    yield np.zeros((count, self.channels), np.float32)
                    position += count
            values = samples_of(frame)
            position += len(values)
            yield values

    def read(self, count: int) -> Samples:
        """``count`` samples; fewer at the end."""
        parts, have = [self.rest], len(self.rest)
        while have < count:
            part = next(self.blocks, None)
            if part is None:
                break
            parts.append(part)
            have += len(part)
        samples = np.concatenate([part for part in parts if len(part)] or [np.zeros((0, self.channels), np.float32)])
        self.rest = samples[count:]
        self.position += len(samples[:count])
        return samples[:count]

    def seek(self, start: int) -> None:
        """Go to a sample, by decoding what is before it."""
        if start < self.position:
            self.restart()
        while self.position < start and len(self.read(min(start - self.position, 1 << 16))):
            pass

    def length(self) -> tuple[int, str]:
        """Samples up to the end of the last packet, and what is missing after it, in seconds."""
        container = self.open()
        shift, end, audio_end = self.origin(), 0.0, 0.0
        with contextlib.suppress(av.error.FFmpegError):
            for packet in container.demux():
                if packet.pts is None:
                    continue
                at = float((packet.pts + (packet.duration or 0)) * packet.time_base) - shift
                end = max(end, at)
                if packet.stream.index == container.streams.audio[0].index:
                    audio_end = max(audio_end, at)
        name, stream = container.format.name, container.streams.audio[0]
        if "mp4" in name and stream.duration:
            announced = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
            return round(announced * self.rate), ""
        announced = (container.duration or 0) / av.time_base
        if name in ("matroska,webm", "avi", "asf", "flv") and end < announced - 0.5:
            return round(audio_end * self.rate), f"{end:.2f} s of {announced:.2f} s"
        return round(audio_end * self.rate), ""


def samples_of(frame: Any) -> Samples:
    """(samples, channels) of a decoded frame, full scale at 1."""
    values: npt.NDArray[Any] = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    if values.dtype.kind == "u":
        values = values / 128.0 - 1.0
    elif values.dtype.kind == "i":
        values = values / float(-np.iinfo(values.dtype).min)
    return np.ascontiguousarray(values.T, dtype=np.float32)


def answer(command: dict[str, Any], decoder: Decoder | None) -> Decoder | None:
    """Do what the parent asks for."""
    if command["do"] == "open":
        decoder = Decoder(command["size"], command["name"], tuple(command["rates"]), command["channels"])
        send({"rate": decoder.rate, "channels": decoder.channels, "codec": decoder.codec})
    elif command["do"] == "length" and decoder is not None:
        frames, missing = decoder.length()
        send({"frames": min(max(frames, 0), 1 << 53), "missing": missing})
    elif command["do"] == "seek" and decoder is not None:
        decoder.seek(command["start"])
        send({"position": decoder.position})
    elif command["do"] == "read" and decoder is not None:
        samples = decoder.read(command["count"])
        send({}, samples.tobytes())
    elif command["do"] == "close":
        decoder = None
        send({})
    return decoder


def main() -> None:
    """Answer the parent until it is gone."""
    limit_memory()
    av.logging.set_level(av.logging.PANIC)
    decoder: Decoder | None = None
    while True:
        command = receive(sys.stdin.buffer)
        try:
            decoder = answer(command, decoder)
        except av.error.FFmpegError as error:
            send({"error": error.strerror or str(error)})
        except Exception as error:  # whatever a hostile file brings about
            send({"error": str(error) or type(error).__name__})


if __name__ == "__main__":
    main()
