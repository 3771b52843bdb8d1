"""What can be wrong with a recording or a part of one: all found in one decoding, each with its reason."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import soxr

from w2v2.data.audio import (
    FORMATS,
    SAMPLE_RATE,
    AudioError,
    AudioFile,
    FloatArray,
    Mixer,
    TruncatedError,
)
from w2v2.data.headers import examine
from w2v2.data.storage import UnreachableError, is_remote, open_binary
from w2v2.data.vad import Vad, speech_spans
from w2v2.preparation.config import AuditConfig
from w2v2.preparation.findings import Finding, Part
from w2v2.preparation.transcripts import check_transcript

_BLOCK_SECONDS = 60
_FLAT = 0.99  # of the peak


class _Scan:
    """Running figures over the blocks of a recording."""

    def __init__(self, file: AudioFile, channel: int | None, *, energies: bool, vad: bool) -> None:
        self.channels = file.channels if channel is None else 1
        self.hash = hashlib.sha256(f"{file.rate} Hz, {self.channels} channels".encode())
        self.mix = Mixer(channel)
        self.step, self.floats = file.step, file.floats
        self.samples = self.flat = 0
        self.sum = self.squares = self.peak = 0.0
        self.finite = True
        self.frame = round(file.rate * FRAME_SECONDS) if energies else 0
        self.energy: list[FloatArray] = []
        self.vad, self.speech = Vad() if vad else None, array("f")
        self.to_16_khz = soxr.ResampleStream(file.rate, SAMPLE_RATE, 1, dtype="float32") if vad else None

    def add(self, block: FloatArray) -> None:
        mono = self.mix(block)
        if self.channels < block.shape[1]:
            block = mono[:, None]
        self.hash.update(np.ascontiguousarray(block).data)
        high = max(float(block.max()), -float(block.min()))  # either is NaN if any sample is
        self.samples += len(block)
        if not np.isfinite(high):
            self.finite = False
            return
        exact = mono.astype(np.float64)  # the variance is a small difference where there is an offset
        self.sum += float(exact.sum())
        self.squares += float(np.dot(exact, exact))
        if self.peak < _FLAT * high:  # what was flat below is not at the recording's peak
            self.flat = 0
        self.peak = max(self.peak, high)
        if self.peak > 0.1:  # below, equal neighbours are a matter of few bits, not of clipping
            for channel in block.T:
                if max(float(channel.max()), -float(channel.min())) >= _FLAT * self.peak:
                    self.flat += _flat_samples(channel, _FLAT * self.peak, self.step)
        if self.vad is not None and self.to_16_khz is not None:
            self.speech.extend(self.vad(self.to_16_khz.resample_chunk(np.ascontiguousarray(mono))))
        if self.frame:
            starts = np.arange(0, len(mono), self.frame)
            lengths = np.diff(starts, append=len(mono))  # the recording's last frame may be a shorter one
            energy = np.einsum("sc,sc->s", block, block)
            self.energy.append((np.add.reduceat(energy, starts) / lengths).astype(np.float32))

    def pieces(self, rate: int, limit: int) -> list[tuple[int, int]]:
        """(first, end) samples of what is to be kept, each at most ``limit`` long; empty: nothing."""
        pieces: list[tuple[int, int]] = []
        for start, end in [(0, self.samples)] if self.vad is None else speech_spans(self.speech, rate, self.samples):
            points: list[int] = []
            if end - start > limit:
                energy = np.concatenate(self.energy)[start // self.frame : -(-end // self.frame)]
                points = [start + point * self.frame for point in quiet_points(energy, limit // self.frame)]
            pieces += pairwise([start, *points, end])
        return pieces

    def judge(self, finding: Finding, config: AuditConfig) -> None:
        if not self.finite:
            finding.add("non_finite", "some samples are not finite")
            return
        mean = self.sum / self.samples
        rms = max(self.squares / self.samples - mean * mean, 0.0) ** 0.5
        db = 20 * np.log10(rms) if rms else -np.inf
        if self.mix.cancels and 10 * np.log10(self.mix.apart / self.samples) > config.silent_db:
            finding.channel = 1
            finding.add(
                "out_of_phase", "the channels cancel each other out, the first is taken, a column channel may say which"
            )
        elif db < config.silent_db:
            finding.add("silent", f"{db:.0f} dB of full scale")
        if abs(mean) > config.max_dc * max(1.0, self.peak):
            finding.add("dc_offset", f"mean {mean:+.3f}")
        if self.floats and self.peak > 1.0:  # decoders of MP3 or Opus overshoot, too
            finding.add("out_of_range", f"samples up to {self.peak:.4g}, expected 1 at most")
        share = self.flat / (self.samples * self.channels)
        if share > config.max_clipped:
            finding.add("clipped", f"{self.flat} samples flat at the peak {self.peak:.3f}, {share:.3g} of all")


def _flat_samples(channel: FloatArray, level: float, step: float) -> int:
    """Samples in runs of three or more equal ones at or beyond a level, from which the signal drops steeply.

    The peak of a slow wave is flat too where values lie a step apart: of three equal samples at the top of a sine, the
    next on each side is at most five steps lower.
    """
    starts = np.flatnonzero(np.diff(channel, prepend=np.nan))
    lengths = np.diff(starts, append=len(channel))
    runs = np.flatnonzero((lengths >= 3) & (np.abs(channel[starts]) >= level))
    before = channel[np.maximum(starts[runs] - 1, 0)]
    after = channel[np.minimum(starts[runs] + lengths[runs], len(channel) - 1)]
    at = channel[starts[runs]]
    steep = np.maximum(np.abs(at - before), np.abs(at - after)) > 5 * step
    return int(lengths[runs][steep].sum())


def audit_all(tasks: Sequence[tuple[str, Sequence[Part]]], config: AuditConfig, vad: bool = False) -> list[Finding]:
    """``audit`` of several recordings, in one call to another process."""
    return [finding for location, parts in tasks for finding in audit(location, parts, config, vad)]


def audit(location: str, parts: Sequence[Part], config: AuditConfig, vad: bool = False) -> list[Finding]:
    """Decode the parts of one recording, in blocks of a minute, and say what is wrong with each.

    Args:
        location: path or URL.
        parts: which parts; each is decoded once.
        config: thresholds.
        vad: whether what is far from speech is left out of parts without a transcript.
    """
    findings = [Finding(part.row) for part in parts]
    try:
        if not is_remote(location) and not stat.S_ISREG(os.stat(location).st_mode):
            raise AudioError("not a regular file")  # a pipe would keep us waiting
        with AudioFile(location) as file:
            for part, finding in zip(parts, findings, strict=True):
                _audit_part(file, part, finding, config, vad=vad)
                if file.missing and not any(reason == "truncated" for reason, _ in finding.reasons):
                    finding.reasons = [reason for reason in finding.reasons if reason[0] != "empty"]
                    finding.add("truncated", file.missing)
                _check_extension(location, file.format, finding)
    except UnreachableError:
        raise  # of no file: the next call goes on
    except (AudioError, OSError) as error:
        reason = "truncated" if isinstance(error, TruncatedError) else _why_undecodable(location)
        for finding in findings:
            if not finding.samples and not finding.reasons:
                finding.add(reason, str(error))
    for part, finding in zip(parts, findings, strict=True):
        if part.text is not None:
            check_transcript(part.text, finding, config)
    return findings


def _audit_part(file: AudioFile, part: Part, finding: Finding, config: AuditConfig, *, vad: bool) -> None:
    finding.rate, finding.channels, finding.total, finding.channel = file.rate, file.channels, file.frames, part.channel
    start = part.start or 0.0
    if start < 0 or (part.end is not None and part.end <= start):
        finding.add(
            "empty", f"from {start:g} s to {'the end' if part.end is None else f'{part.end:g} s'}: no such part"
        )
        return
    finding.first = round(start * file.rate)
    if part.channel is not None and part.channel > file.channels:
        finding.add("unreadable", f"it has no channel {part.channel}, only {file.channels}")
        return
    if finding.first and finding.first >= file.frames:
        finding.add("truncated", f"it starts at {part.start:g} s, the recording ends at {file.frames / file.rate:g} s")
        return
    whole = part.start is None and part.end is None
    expected = file.frames - finding.first if part.end is None else round(part.end * file.rate) - finding.first
    limit = round(config.max_seconds * file.rate)
    plain = not (part.text or "").strip()
    vad &= plain
    scan = _Scan(file, part.channel, energies=plain and (vad or expected + file.slack > limit), vad=vad)
    file.seek(finding.first)
    for block in _blocks(file, None if part.end is None else expected):
        scan.add(block)
    finding.samples, finding.content = scan.samples, scan.hash.hexdigest()
    finding.total = scan.samples if whole else max(file.frames, finding.first + scan.samples)
    # The end of a row is often rounded up from the recording's own.
    slack = file.slack or (0 if whole else round(0.1 * file.rate))
    if scan.samples == 0:
        finding.add("empty", "no samples")
    elif scan.samples < expected - slack:
        finding.add("truncated", f"{scan.samples} samples of {expected}")
    else:
        scan.judge(finding, config)
        if scan.samples * SAMPLE_RATE / file.rate < config.receptive_field:
            finding.add("too_short", f"{scan.samples / file.rate:.4f} s")
        elif not finding.rejected and (vad or (scan.energy and scan.samples > limit)):
            pieces = scan.pieces(file.rate, limit)
            finding.cuts = [] if pieces == [(0, scan.samples)] else pieces
            if not pieces:
                finding.add("no_speech", "nobody speaks in it")


def _blocks(file: AudioFile, count: int | None) -> Iterator[FloatArray]:
    """The next ``count`` samples, or all that are left, about a minute at a time, in whole frames."""
    frame = max(round(file.rate * FRAME_SECONDS), 1)
    size = _BLOCK_SECONDS * file.rate // frame * frame
    while count is None or count > 0:
        block = file.read(size if count is None else min(size, count))
        if len(block) == 0:
            return
        yield block
        count = None if count is None else count - len(block)


def _check_extension(location: str, container: str, finding: Finding) -> None:
    suffix = PurePosixPath(location).suffix.lower()
    if container not in FORMATS.get(suffix, {container}):
        finding.add("wrong_extension", f"{container} in a file named {suffix}")


def _why_undecodable(location: str) -> str:
    """``truncated`` if the decoder ran out of bytes, ``empty`` if there are none, else ``unreadable``."""
    if not is_remote(location) and not os.path.isfile(location):
        return "unreadable"
    try:
        with open_binary(location) as raw:
            size = raw.seek(0, os.SEEK_END)
            raw.seek(0)
            if size == 0:
                return "empty"
            if examine(raw).missing:
                return "truncated"
            with AudioFile(raw) as file:
                try:
                    for _ in _blocks(file, None):
                        pass
                except AudioError:
                    if raw.tell() >= size:
                        return "truncated"
    except (AudioError, OSError):
        pass
    return "unreadable"


FRAME_SECONDS = 0.02
_SMOOTH = 10  # frames: a dip has to last about as long as a pause between words


def quiet_points(energy: npt.NDArray[np.float32], longest: int) -> list[int]:
    """Frames at which to cut so that no piece is longer than ``longest``, at the quietest place within reach.

    Each piece but the last has at least half of ``longest``, and the last at least a quarter.

    Args:
        energy: (T,) mean square of each frame.
        longest: frames, at least 8.
    """
    smooth = np.convolve(energy, np.ones(_SMOOTH) / _SMOOTH, mode="same")
    points: list[int] = []
    at = 0
    while len(energy) - at > longest:
        low, high = at + longest // 2, min(at + longest, len(energy) - longest // 4)
        window = smooth[low : high + 1]
        at = high - int(np.argmin(window[::-1]))  # of several, the last: fewer pieces
        points.append(at)
    return points
