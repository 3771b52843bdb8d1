"""A synthetic spoken corpus with transcripts, speakers, splits and word times, made offline by espeak-ng.

`synthesize` writes the layout of LibriSpeech: `OUT/SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UUUU.flac` (16 kHz, mono,
16 bit) and `SPEAKER-CHAPTER.trans.txt`; beside them the true word times in `SPEAKER-CHAPTER.words.jsonl`, the
phones as NIST CTM in `SPEAKER-CHAPTER.phones.ctm` (lines of utterance, channel 1, start and duration in seconds,
espeak-ng's mnemonic), the speakers in `OUT/SPEAKERS.TXT` and the configuration in `OUT/synthetic.json`.

The same seed gives the same bytes (with the same versions of espeak-ng, numpy, soxr and libsndfile), however the
work is split over processes: every random number is keyed by the seed and the utterance, and every utterance is
spoken by a freshly loaded library.

espeak-ng is an optional extra: see `espeak.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from w2v2.data.augment import keyed_rng
from w2v2.errors import Show, UsageError, quiet
from w2v2.files import whole_folder, write_json, write_text
from w2v2.serial import read_json
from w2v2.synthetic.acoustics import SAMPLE_RATE, Session, draw_session, record
from w2v2.synthetic.espeak import ESPEAK_RATE, Phone, Speech, Word, espeak_paths, speak
from w2v2.synthetic.grammar import sentence, transcript
from w2v2.synthetic.speakers import Speaker, SyntheticConfig, plan_speakers

MIN_SECONDS, MAX_SECONDS = 2.0, 16.0
"""Every utterance lasts between these two, in seconds, silence included."""
FORMAT_VERSION = 2
"""Raised when the same configuration no longer gives the same corpus."""
_PACE_TEXT = "The old farmer carried seven baskets to the market, and his brother waited near the bridge until Monday."


def _draw_text(rng: np.random.Generator, letters: float) -> str:
    """One to four sentences of about `letters` characters."""
    best = ""
    for _ in range(40):
        text = sentence(rng)
        for _ in range(3):
            # A further sentence costs a pause as long as about five letters.
            if len(text) + 25 < letters:
                text += " " + sentence(rng)
        if not best or abs(len(text) - letters) < abs(len(best) - letters):
            best = text
        if abs(len(best) - letters) < 0.03 * letters:
            break
    return best


def _utterance(
    speaker: Speaker, session: Session, rng: np.random.Generator, pace: float, target: float
) -> tuple[str, NDArray[np.int16], list[Word], list[Phone]]:
    """Transcript, audio and times of about `target` seconds; `pace` is a first guess, letters per second."""
    best: tuple[float, str, Speech, float, float] | None = None
    attempts, target = 0, min(max(target, MIN_SECONDS + 0.5), MAX_SECONDS - 0.5)
    while best is None or (attempts < 8 and abs(best[0] - target) > 0.3 + 0.03 * target):
        attempts += 1
        lead, tail = rng.uniform(0.1, 0.4, 2)
        text = _draw_text(rng, (target - lead - tail) * pace)
        speech = _speak_as(speaker, text, int(rng.integers(2**31)))
        seconds = lead + tail + len(speech.audio) / ESPEAK_RATE
        inside = MIN_SECONDS + 0.01 < seconds < MAX_SECONDS - 0.01
        if inside and (best is None or abs(seconds - target) < abs(best[0] - target)):
            best = (seconds, text, speech, lead, tail)
        pace *= math.sqrt(target / seconds)  # half the correction: a text's own pace is chance, too
    _, text, speech, lead, tail = best
    return transcript(text), *record(speech, session, rng, lead, tail)


def _speak_as(speaker: Speaker, text: str, seed: int) -> Speech:
    return speak(
        text, voice=speaker.voice, accent=speaker.accent, pitch=speaker.pitch, rate=speaker.rate, seed=seed
    )  # fmt: skip


def _next_target(rng: np.random.Generator, remaining: float) -> float:
    """Seconds of the next utterance: 2.5 to 15.5, and never so that less than 2.5 s would remain."""
    target = 2.5 + 13 * rng.beta(1.3, 1.5)
    if remaining - target >= 2.5:
        return target
    return min(max(remaining, 2.5), 15.5) if remaining <= 16 else remaining / 2


def _write_speaker(root: Path, speaker: Speaker, seed: int) -> float:
    """Write every chapter of a speaker under `root`; returns the seconds of audio."""
    pace = len(_PACE_TEXT) / _speak_as(speaker, _PACE_TEXT, 0).words[-1][2]
    n_chapters = min(max(round(speaker.seconds / 20), 1), 8)
    written = 0.0
    for chapter in range(n_chapters):
        name = f"{speaker.id}-{speaker.id}{chapter + 1:02d}"
        folder = root / speaker.split / name.replace("-", "/")
        folder.mkdir(parents=True)
        session = draw_session(keyed_rng(seed, "session", name))
        goal = written + (speaker.seconds - written) / (n_chapters - chapter)
        transcripts: list[str] = []
        words_lines: list[str] = []
        phone_lines: list[str] = []
        while not transcripts or goal - written > MIN_SECONDS:
            utterance_id = f"{name}-{len(transcripts):04d}"
            rng = keyed_rng(seed, "utterance", utterance_id)
            text, audio, words, phones = _utterance(speaker, session, rng, pace, _next_target(rng, goal - written))
            soundfile.write(folder / f"{utterance_id}.flac", audio, SAMPLE_RATE, subtype="PCM_16")
            transcripts.append(f"{utterance_id} {text}\n")
            words_lines.append(json.dumps({"id": utterance_id, "words": words}) + "\n")
            phone_lines += [f"{utterance_id} 1 {start:.4f} {end - start:.4f} {phone}\n" for phone, start, end in phones]
            written += len(audio) / SAMPLE_RATE
        for ending, lines in (("trans.txt", transcripts), ("words.jsonl", words_lines), ("phones.ctm", phone_lines)):
            write_text(folder / f"{name}.{ending}", "".join(lines))
    return written


def _write_speakers(root: Path, speakers: list[Speaker], config: SyntheticConfig) -> Iterator[tuple[Speaker, float]]:
    """Write the speakers in `config.jobs` processes; yields each, with its seconds, when done."""
    if config.jobs == 1:
        for speaker in speakers:
            yield speaker, _write_speaker(root, speaker, config.seed)
        return
    # Not forked: the caller may have started threads (torch does).
    pool = ProcessPoolExecutor(min(config.jobs, len(speakers)), mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(_write_speaker, root, speaker, config.seed): speaker for speaker in speakers}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_finished(out: Path, identity: dict[str, Any]) -> bool:
    """Whether `out` already holds this corpus; refuses a folder that holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    content = "other files" if out.is_dir() else "a file"
    if (out / "synthetic.json").is_file():
        try:
            description = read_json(out / "synthetic.json")
            if {key: description[key] for key in identity} == identity:
                return True
            content = f"format {description['format']} with {description['config']}"
        except (ValueError, TypeError, KeyError):
            content = "an unreadable synthetic.json"
    raise UsageError(
        f"{out}: expected a folder that is empty, missing or holds this very corpus, got {content}; "
        "choose another folder or delete this one"
    )


def synthesize(out: Path, config: SyntheticConfig, show: Show = quiet) -> None:
    """Write the corpus to `out`, which appears only when it is complete; if it is there already, nothing is done.

    With more than one job, a script must call this under `if __name__ == "__main__":`.

    Raises:
        UsageError: `out` holds anything else; espeak-ng is not installed; impossible numbers.
    """
    identity = {"format": FORMAT_VERSION, "config": {k: v for k, v in asdict(config).items() if k != "jobs"}}
    if not _is_finished(out, identity):
        espeak_paths()
        speakers = plan_speakers(config)
        total = sum(speaker.seconds for speaker in speakers)
        seconds: dict[int, float] = {}
        with whole_folder(out) as folder:
            for speaker, written in _write_speakers(folder, speakers, config):
                seconds[speaker.id] = written
                show("synthesise", min(sum(seconds.values()) / total, 1.0))
            _write_tables(folder, speakers, seconds, identity)
    show("synthesise", 1.0)


def _write_tables(root: Path, speakers: list[Speaker], seconds: dict[int, float], identity: dict[str, Any]) -> None:
    lines = ["; ID | VOICE FAMILY | VOICE | ACCENT | PITCH (0-99) | RATE (WORDS/MIN) | SPLIT\n"]
    by_split: dict[str, float] = {}
    for s in speakers:
        lines.append(f"{s.id} | {s.family} | {s.voice} | {s.accent} | {s.pitch} | {s.rate} | {s.split}\n")
        by_split[s.split] = by_split.get(s.split, 0.0) + seconds[s.id]
    write_text(root / "SPEAKERS.TXT", "".join(lines))
    seconds_by_split = {split: round(total, 2) for split, total in by_split.items()}
    write_json(root / "synthetic.json", {**identity, "seconds": seconds_by_split})
