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

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from w2v2.data import lexicon
from w2v2.data.espeak import ESPEAK_RATE, Phone, Speech, Word, espeak_paths, speak
from w2v2.errors import UsageError

SAMPLE_RATE = 16_000
"""Rate of the written audio, samples per second."""
MIN_SECONDS, MAX_SECONDS = 2.0, 16.0
"""Every utterance lasts between these two, in seconds, silence included."""
FORMAT_VERSION = 2
"""Raised when the same configuration no longer gives the same corpus."""

Split = Literal["train", "valid", "test"]

ACCENTS = (
    "en", "en-us", "en-us-nyc", "en-029", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd"
)  # fmt: skip

# One line per family. Relatives are voices whose names differ in trailing digits only (f1..f5 and m1..m8 too, to be
# safe) and voices whose files carry nearly the same formant table under another name (miguel is Hugo with another
# pitch, linda is f4 with two formants moved). Left out of espeak-ng's 103 variants:
# - whispers, without voicing: whisper, whisperf, caleb;
# - robots and public-address echoes, which smear the phones: UniRobot, anikaRobot, announcer, Demonic, robosoft*,
#   RicishayMax*;
# - formants no human has, with phones unlike any other voice's: kaukovalta (first formant at 40 %), ian (formant 0
#   at 20 %), Lee (third formant at 9 %), Alicia (second formant at 150 %), zac (a cartoon voice at 360 Hz);
# - Reed, whose breath comes from the C library's rand(), which another thread may call;
# - Marco (every vowel stretched), croak (hoarse), fast (a test file equal to the default voice) and "Mr serious"
#   (john again, with a blank in its name).
FAMILIES = {
    line.split()[0].lower(): line.split()
    for line in """
Alex
Andrea
Andy AnxiousAndy
Annie
anika
antonio
boris
david
victor Denis
ed
f1 f2 f3 f4 f5 aunty belinda linda
Gene Gene2
grandma
grandpa
Hugo Diogo Henrique michel miguel
iven iven2 iven3 iven4
Jacky
john norbert Tweaky
klatt klatt2 klatt3 klatt4 klatt5 klatt6 adam benjamin edward edward2
m1 m2 m3 m4 m5 m6 m7 m8 Nguyen
max
Michael Mario gustave marcelo
Mike mike2
pablo
paul
pedro
robert rob quincy
sandro
shelby
steph steph2 steph3
Storm
travis
""".strip().splitlines()
}
"""Suitable espeak-ng voice variants by family; no family is in two splits."""
_FEMALE = {"andrea", "anika", "annie", "grandma", "shelby", "steph"}
_LARGEST_HELD_OUT_FAMILY = 3

_MIN_SPEAKER_SECONDS = 4.0
_PACE_TEXT = "The old farmer carried seven baskets to the market, and his brother waited near the bridge until Monday."


@dataclass(kw_only=True)
class SyntheticConfig:
    """What to synthesise."""

    hours: float = 2.0
    """Audio of the training split, hours."""
    valid_hours: float = 0.1
    """Audio of the validation split, hours."""
    test_hours: float = 0.2
    """Audio of the test split, hours."""
    n_speakers: int = 96
    """Speakers of all splits together; an eighth each for validation and test."""
    seed: int = 0
    """Seed of everything random."""
    jobs: int = field(default_factory=lambda: min(os.cpu_count() or 1, 32))
    """Processes; has no influence on what is written."""

    @classmethod
    def sized(cls, hours: float, seed: int) -> "SyntheticConfig":
        """So many hours to train on, a twentieth to validate on and a tenth to test on, enough for each speaker."""
        return cls(hours=hours, valid_hours=max(0.05 * hours, 0.02), test_hours=max(0.1 * hours, 0.02), seed=seed)

    def __post_init__(self) -> None:
        if self.n_speakers < 3:
            raise UsageError(f"n_speakers: expected at least 3, one per split, got {self.n_speakers}; raise it")
        if self.jobs < 1:
            raise UsageError(f"jobs: expected at least 1, got {self.jobs}; raise it")
        for split, (name, hours, count) in self.shares().items():
            if not hours * 3600 / count >= _MIN_SPEAKER_SECONDS:
                raise UsageError(
                    f"{name}: expected at least {_MIN_SPEAKER_SECONDS:g} s for each of the {count} {split} speakers, "
                    f"got {hours} h; raise it to {_MIN_SPEAKER_SECONDS * count / 3600:.3f} or lower n_speakers"
                )

    def shares(self) -> dict[Split, tuple[str, float, int]]:
        """For each split the name of its field of hours, its hours and its number of speakers."""
        held_out = max(1, round(self.n_speakers / 8))
        return {
            "train": ("hours", self.hours, self.n_speakers - 2 * held_out),
            "valid": ("valid_hours", self.valid_hours, held_out),
            "test": ("test_hours", self.test_hours, held_out),
        }


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """One speaker of the corpus: a voice with a pitch, a rate and an accent of its own."""

    id: int
    """Name of the speaker's folder."""
    family: str
    """Key of `FAMILIES`."""
    voice: str
    """espeak-ng voice variant."""
    accent: str
    """espeak-ng language."""
    pitch: int
    """espeak-ng pitch, 0 to 99; 50 is the voice's own."""
    rate: int
    """Words per minute."""
    split: Split
    """The only split the speaker is in."""
    seconds: float
    """Audio to make, seconds."""


@dataclass(frozen=True, kw_only=True)
class _Session:
    """Room and microphone of one chapter."""

    impulse: NDArray[np.float64]
    delay: float
    noise_slope: float
    snr_db: float
    tilt_db: float
    low_cut_hz: float
    level_db: float


def _rng(seed: int, *key: object) -> np.random.Generator:
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def split_families(seed: int) -> dict[Split, list[str]]:
    """Deal the voice families to the splits: at least ten voices each, two families of women among them, held out."""
    names = sorted(name for name, voices in FAMILIES.items() if len(voices) <= _LARGEST_HELD_OUT_FAMILY)
    order = [names[i] for i in _rng(seed, "families").permutation(len(names))]
    female, male = [f for f in order if f in _FEMALE], [f for f in order if f not in _FEMALE]
    held_out: dict[Split, list[str]] = {"valid": [], "test": []}
    for families in held_out.values():
        families += [female.pop(), female.pop()]
        while sum(len(FAMILIES[family]) for family in families) < 10:
            families.append(male.pop())
    taken = {family for families in held_out.values() for family in families}
    return {"train": [family for family in FAMILIES if family not in taken], **held_out}


def plan_speakers(config: SyntheticConfig) -> list[Speaker]:
    """Every speaker of the corpus; the numbers depend on the configuration alone."""
    speakers: list[Speaker] = []
    families = split_families(config.seed)
    for split, (_, hours, count) in config.shares().items():
        rng = _rng(config.seed, "speakers", split)
        shuffled = [families[split][i] for i in rng.permutation(len(families[split]))]
        # A voice of each family in turn, so that few speakers are still as different as can be.
        depth = max(len(FAMILIES[family]) for family in shuffled)
        voices = [(f, FAMILIES[f][i]) for i in range(depth) for f in shuffled if i < len(FAMILIES[f])]
        accents, own_pitch = rng.permutation(ACCENTS), rng.random(len(voices))
        for number in range(count):
            turn, which = divmod(number, len(voices))
            family, voice = voices[which]
            speaker = Speaker(
                id=1001 + len(speakers),
                family=family,
                voice=voice,
                accent=str(accents[(number + turn) % len(accents)]),
                # The golden ratio keeps the pitches of speakers who share a voice apart.
                pitch=round(32 + 36 * ((own_pitch[which] + 0.618 * turn) % 1)),
                rate=int(rng.integers(140, 200)),
                split=split,
                seconds=hours * 3600 / count,
            )
            speakers.append(speaker)
    return speakers


def _draw_session(rng: np.random.Generator) -> _Session:
    """A room of 0.1 to 0.4 s reverberation (RT60), a background noise and a microphone."""
    rt60, direct_to_reverberant_db = rng.uniform(0.1, 0.4), rng.uniform(3, 12)
    delay = int(rng.uniform(0.3, 3.0) / 343 * SAMPLE_RATE)  # the speaker is 0.3 to 3 m from the microphone
    first_echo = delay + int(rng.uniform(0.001, 0.006) * SAMPLE_RATE)
    impulse = np.zeros(first_echo + int(rt60 * SAMPLE_RATE))
    echoes = rng.standard_normal(len(impulse) - first_echo)
    echoes *= 10 ** (-3 * np.arange(len(echoes)) / len(echoes))
    impulse[first_echo:] = echoes * 10 ** (-direct_to_reverberant_db / 20) / np.sqrt(np.sum(echoes**2))
    impulse[delay] = 1.0
    return _Session(
        impulse=impulse,
        delay=delay / SAMPLE_RATE,
        noise_slope=rng.uniform(0, 2),
        snr_db=rng.uniform(11, 29),
        tilt_db=rng.uniform(-3, 3),
        low_cut_hz=rng.uniform(40, 150),
        level_db=rng.uniform(-32, -20),
    )


def _record(
    speech: Speech, session: _Session, rng: np.random.Generator, lead: float, tail: float
) -> tuple[NDArray[np.int16], list[Word], list[Phone]]:
    """Speech as the session's microphone hears it, with `lead` and `tail` seconds of background around it."""
    clean = soxr.resample(speech.audio.astype(np.float64), ESPEAK_RATE, SAMPLE_RATE)
    before, after = round(lead * SAMPLE_RATE), round(tail * SAMPLE_RATE)
    dry = np.pad(clean, (before, after))
    size = -(-(len(dry) + len(session.impulse)) // 2048) * 2048
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 20.0)
    # dB per octave around 1 kHz, and a low cut as of any small microphone.
    microphone = (frequency / 1000) ** (session.tilt_db / 6.02) / (1 + (session.low_cut_hz / frequency) ** 2)
    voice = np.fft.rfft(dry, size) * np.fft.rfft(session.impulse, size) * microphone
    noise = rng.standard_normal(len(frequency)) + 1j * rng.standard_normal(len(frequency))
    noise *= frequency ** (-session.noise_slope / 2) * microphone

    # Parseval: power of the voice while somebody speaks, and of the noise all the time.
    spoken = sum(end - start for _, start, end in speech.words) * SAMPLE_RATE
    voice_power = 2 * np.sum(np.abs(voice) ** 2) / size / spoken
    noise_power = 2 * np.sum(np.abs(noise) ** 2) / size**2
    noise *= np.sqrt(voice_power / noise_power) * 10 ** (-(session.snr_db + rng.uniform(-1, 1)) / 20)
    audio = np.fft.irfft(voice + noise, size)[: len(dry)]
    gain = 10 ** ((session.level_db + rng.uniform(-2, 2)) / 20) / np.sqrt(voice_power)
    audio *= min(gain, 0.95 / np.max(np.abs(audio)))
    shift = before / SAMPLE_RATE + session.delay
    words, phones = (
        [(label, round(start + shift, 4), round(end + shift, 4)) for label, start, end in labels]
        for labels in (speech.words, speech.phones)
    )
    return np.round(audio * 32767).astype(np.int16), words, phones


def _draw_text(rng: np.random.Generator, letters: float) -> str:
    """One to four sentences of about `letters` characters."""
    best = ""
    for _ in range(40):
        text = lexicon.sentence(rng)
        for _ in range(3):
            # A further sentence costs a pause as long as about five letters.
            if len(text) + 25 < letters:
                text += " " + lexicon.sentence(rng)
        if not best or abs(len(text) - letters) < abs(len(best) - letters):
            best = text
        if abs(len(best) - letters) < 0.03 * letters:
            break
    return best


def _utterance(
    speaker: Speaker, session: _Session, rng: np.random.Generator, pace: float, target: float
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
    return lexicon.transcript(text), *_record(speech, session, rng, lead, tail)


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
        session = _draw_session(_rng(seed, "session", name))
        goal = written + (speaker.seconds - written) / (n_chapters - chapter)
        transcripts: list[str] = []
        words_lines: list[str] = []
        phones_lines: list[str] = []
        while not transcripts or goal - written > MIN_SECONDS:
            utterance_id = f"{name}-{len(transcripts):04d}"
            rng = _rng(seed, "utterance", utterance_id)
            text, audio, words, phones = _utterance(speaker, session, rng, pace, _next_target(rng, goal - written))
            soundfile.write(folder / f"{utterance_id}.flac", audio, SAMPLE_RATE, subtype="PCM_16")
            transcripts.append(f"{utterance_id} {text}\n")
            words_lines.append(json.dumps({"id": utterance_id, "words": words}) + "\n")
            phones_lines += [
                f"{utterance_id} 1 {start:.4f} {end - start:.4f} {phone}\n" for phone, start, end in phones
            ]
            written += len(audio) / SAMPLE_RATE
        (folder / f"{name}.trans.txt").write_text("".join(transcripts), encoding="utf-8")
        (folder / f"{name}.words.jsonl").write_text("".join(words_lines), encoding="utf-8")
        (folder / f"{name}.phones.ctm").write_text("".join(phones_lines), encoding="utf-8")
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
    found = "other files" if out.is_dir() else "a file"
    if (out / "synthetic.json").is_file():
        try:
            held = json.loads((out / "synthetic.json").read_text(encoding="utf-8"))
            if {key: held[key] for key in identity} == identity:
                return True
            found = f"format {held['format']} with {held['config']}"
        except (ValueError, TypeError, KeyError):
            found = "an unreadable synthetic.json"
    raise UsageError(
        f"{out}: expected a folder that is empty, missing or holds this very corpus, got {found}; "
        "choose another folder or delete this one"
    )


def synthesize(out: Path, config: SyntheticConfig, progress: Callable[[float], None] | None = None) -> None:
    """Write the corpus to `out`; `progress` is told the fraction done, 0 to 1.

    `out` appears only when it is complete. If it already holds the same corpus, nothing is done; if it holds anything
    else, ValueError. With more than one job, a script must call this under `if __name__ == "__main__":`.
    """
    report = progress or (lambda fraction: None)
    identity = {"format": FORMAT_VERSION, "config": {k: v for k, v in asdict(config).items() if k != "jobs"}}
    if _is_finished(out, identity):
        report(1.0)
        return
    espeak_paths()
    speakers = plan_speakers(config)
    total = sum(speaker.seconds for speaker in speakers)
    seconds: dict[int, float] = {}
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for speaker, written in _write_speakers(partial, speakers, config):
            seconds[speaker.id] = written
            report(min(sum(seconds.values()) / total, 1.0))
        _write_tables(partial, speakers, seconds, identity)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report(1.0)


def _write_tables(root: Path, speakers: list[Speaker], seconds: dict[int, float], identity: dict[str, Any]) -> None:
    lines = ["; ID | VOICE FAMILY | VOICE | ACCENT | PITCH (0-99) | RATE (WORDS/MIN) | SPLIT\n"]
    by_split: dict[Split, float] = {}
    for s in speakers:
        lines.append(f"{s.id} | {s.family} | {s.voice} | {s.accent} | {s.pitch} | {s.rate} | {s.split}\n")
        by_split[s.split] = by_split.get(s.split, 0.0) + seconds[s.id]
    description = {**identity, "seconds": {split: round(total, 2) for split, total in by_split.items()}}
    (root / "SPEAKERS.TXT").write_text("".join(lines), encoding="utf-8")
    (root / "synthetic.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
