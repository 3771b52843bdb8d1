"""Corpora as splits of lhotse cuts, read piece by piece: prepared ones, here or remote, and folders as they are."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment, fastcopy
from lhotse.serialization import deserialize_item

from w2v2.data.audio import SAMPLE_RATE, AudioError, AudioFile
from w2v2.data.config import DataConfig
from w2v2.data.sources import SPLITS, folder_rows, listed_splits, named_split, utterance_id
from w2v2.data.storage import is_remote, join, read_bytes
from w2v2.errors import JobError, UsageError

SCHEMA = 2
"""Of ``corpus.json``; its keys change only with it."""
_HELD_OUT_SPEAKERS = 0.05
_OPEN_PIECES = 8


@dataclass(frozen=True)
class Piece:
    """Cuts that are read together: a manifest, with a tar of their audio or without, or a list in memory."""

    manifest: str = ""
    """Path or URL."""
    audio: str = ""
    """Path or URL of a tar; empty: cuts know their files."""
    held: tuple[MonoCut, ...] = ()
    """Cuts in memory, without a manifest."""
    utterances: int = 0
    seconds: float = 0.0
    weight: float = 1.0
    """How many times a pass each utterance comes."""
    content: str = ""
    """Hash of the corpus that a manifest belongs to."""

    def identity(self) -> str:
        """What tells it from a piece of other cuts, wherever the files lie."""
        held = [(cut.id, cut.duration) for cut in self.held]
        return repr((self.content, Path(self.manifest).name, self.utterances, self.weight, held))

    def files(self) -> list[tuple[int, int] | None]:
        """Size and time of change, ns, of the audio of cuts in memory. A manifest's hash covers its samples."""
        return [_stamp(cut.recording.sources[0].source) for cut in self.held]

    def read(self, rng: random.Random | None = None) -> Iterator[MonoCut]:
        """The cuts, shuffled if there is a generator."""
        if not self.manifest:
            yield from rng.sample(self.held, len(self.held)) if rng else self.held
            return
        try:
            lines = gzip.decompress(read_bytes(self.manifest)).splitlines()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise JobError(
                f"{self.manifest} is damaged ({error}); copy it again, or prepare the corpus again"
            ) from error
        if rng:
            rng.shuffle(lines)
        for line in lines:
            cut: MonoCut = deserialize_item(json.loads(line))
            if self.audio:
                cut.recording.sources[0].source = self.audio
            yield cut


@dataclass(frozen=True)
class Split:
    """Cuts of one role. Iterates over all of them in a fixed order; memory does not grow with their number."""

    pieces: tuple[Piece, ...]
    speakers: int
    transcribed: int
    """Utterances with a transcript."""

    @classmethod
    def of(cls, cuts: Iterable[MonoCut]) -> Split:
        """A split of cuts in memory."""
        held = tuple(cuts)
        said = [cut.supervisions[0] for cut in held]
        piece = Piece(held=held, utterances=len(held), seconds=sum(cut.duration for cut in held))
        return cls((piece,), len({s.speaker for s in said}), sum(bool(s.text) for s in said))

    @property
    def seconds(self) -> float:
        """Of audio."""
        return sum(piece.seconds for piece in self.pieces)

    @property
    def content(self) -> str:
        """Hash of what is in it: the same for the same corpora with the same weights, wherever they lie."""
        return hashlib.sha256("\n".join(piece.identity() for piece in self.pieces).encode()).hexdigest()[:16]

    @property
    def audio(self) -> str:
        """Hash of what is in it and of the state of its files: another one where audio was replaced."""
        state = repr((self.content, [piece.files() for piece in self.pieces]))
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(piece.utterances for piece in self.pieces)

    def __iter__(self) -> Iterator[MonoCut]:
        for piece in self.pieces:
            yield from piece.read()

    def shuffled(self, seed: int, epoch: int) -> Iterator[MonoCut]:
        """One pass: pieces in an order that (seed, epoch) decide, some open at a time, each shuffled in itself.

        A piece of weight w gives each of its utterances w times a pass. For a w that is not whole, utterances take
        turns, so that after n passes each has come n·w times, rounded up or down. Where w is not 1, a cut's
        ``custom["pass"]`` counts its own passes.
        """
        rng = random.Random(f"{seed}/{epoch}")
        waiting = [(piece, turn) for piece in self.pieces for turn in range(math.ceil(piece.weight))]
        rng.shuffle(waiting)
        reading: list[Iterator[MonoCut]] = []
        while waiting or reading:
            while waiting and len(reading) < _OPEN_PIECES:
                piece, turn = waiting.pop()
                reading.append(_turn(piece, turn, seed, epoch, random.Random(rng.random())))
            for cuts in list(reading):
                cut = next(cuts, None)
                if cut is None:
                    reading.remove(cuts)
                else:
                    yield cut


Splits = dict[str, Split]


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _turn(piece: Piece, turn: int, seed: int, epoch: int, rng: random.Random) -> Iterator[MonoCut]:
    """The cuts of a piece that come for the ``turn``-th time in a pass."""
    if piece.weight == 1.0:
        yield from piece.read(rng)
        return
    for cut in piece.read(rng):
        phase = random.Random(f"{seed}/{cut.id}").random()
        before, after = (int(passes * piece.weight + phase) for passes in (epoch, epoch + 1))
        if before + turn < after:
            yield fastcopy(cut, custom={**(cut.custom or {}), "pass": before + turn})


def read_corpora(sources: Sequence[str], weights: Sequence[float] = (), *, training: bool = True) -> Splits:
    """Splits of several corpora together; weights are of their train splits, 1 each without any.

    Raises:
        UsageError: as ``read_corpus``; a number of weights that is not that of the corpora.
    """
    if weights and len(weights) != len(sources):
        raise UsageError(f"--data.weights needs one number for each of the {len(sources)} corpora, got {len(weights)}")
    together: dict[str, list[Split]] = {}
    for i, source in enumerate(sources):
        for name, split in read_corpus(source, training=training).items():
            weight = weights[i] if weights and name.startswith("train") else 1.0
            pieces = tuple(replace(piece, weight=weight) for piece in split.pieces)
            together.setdefault(name, []).append(replace(split, pieces=pieces))
    return {
        name: Split(
            tuple(piece for split in splits for piece in split.pieces),
            sum(split.speakers for split in splits),
            sum(split.transcribed for split in splits),
        )
        for name, splits in together.items()
    }


def read_run(data: DataConfig) -> Splits:
    """The corpora of a run, the split to train on as ``train``.

    Raises:
        UsageError: as ``read_corpora``; no such split to train on.
    """
    splits = read_corpora(data.sources, data.weights)
    if data.train_split not in splits:
        raise UsageError(
            f"no split {data.train_split!r} in {' '.join(data.sources)}, needed for --data.train-split: got "
            f"{', '.join(splits)}"
        )
    return {**splits, "train": splits[data.train_split]}


def read_corpus(root: str | Path, *, training: bool = True) -> Splits:
    """Splits of a prepared corpus, on disk, at an HTTP address or in S3, or of a folder of audio as it is.

    Of a folder that is not prepared only the headers are read, and the rules are those of ``folder_rows``:
    ``ROOT/splits.tsv`` decides the splits if it exists, otherwise the names of the subsets. To train on, without any
    validation utterance, every twentieth speaker of train, by a hash of the name, is held out, and a folder without any
    training subset, such as dev-clean alone, is used whole.

    Without ``training`` a file without a readable header is a cut that says so (``custom["unreadable"]``), so that
    whoever reads it counts it with those that fail later. And nothing is held out: a folder without subsets is one
    split, of the role that its own name tells, otherwise test. Subsets are there too, whole, by their own names, such
    as dev-other.

    Raises:
        UsageError: no such folder, no audio in it, an unreadable file to train on, an utterance id that occurs twice.
    """
    location = str(root)
    description = join(location, "corpus.json")
    if is_remote(location) or Path(description).exists():
        return _prepared(location, description)
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"no folder {root}: expected audio in LibriSpeech layout, or what 'w2v2 prepare' wrote")
    if (root / ".prepare").exists():
        raise UsageError(f"{root} is not prepared to the end; run the same 'w2v2 prepare' again, it does the rest")
    return _unprepared(root, training)


def _prepared(location: str, description: str) -> Splits:
    try:
        found = json.loads(read_bytes(description))
    except FileNotFoundError as error:
        raise UsageError(f"no {description}: expected a corpus that 'w2v2 prepare' wrote") from error
    except ValueError as error:
        raise UsageError(f"{description} is not what 'w2v2 prepare' writes ({error}); check the address") from error
    if found.get("schema") != SCHEMA:
        raise UsageError(f"{description} has schema {found.get('schema')}, expected {SCHEMA}; prepare the corpus again")
    splits = {}
    for name, split in found["splits"].items():
        pieces = tuple(
            Piece(
                manifest=join(location, piece["cuts"]),
                audio=join(location, piece["audio"]) if piece["audio"] else "",
                utterances=piece["utterances"],
                seconds=piece["seconds"],
                content=found["content_hash"],
            )
            for piece in split["pieces"]
        )
        splits[name] = Split(pieces, split["speakers"], split["transcribed"])
    return splits


def _unprepared(root: Path, training: bool) -> Splits:
    rows = list(folder_rows(root))
    if not rows:
        raise UsageError(f"no audio in {root}: expected files such as .flac, .wav, .mp3, .ogg, .opus; check the path")
    listed = dict(listed_splits(root / "splits.tsv")) if (root / "splits.tsv").exists() else {}
    subsets: dict[str, list[MonoCut]] = {}
    by_split: dict[str, list[MonoCut]] = {}
    seen: dict[str, str] = {}
    rest = "train"
    if not training and not any(row.split for row in rows):
        rest = named_split(root.absolute().name) or "test"
    for row in rows:
        name = utterance_id(row.path)
        if name in seen:
            raise UsageError(f"two files with the utterance id {name}: {seen[name]} and {row.path}; rename one")
        seen[name] = row.path
        split = listed.get(name) if listed else row.split or rest
        subset = row.path.partition("/")[0] if row.split and not training else None
        if split is None and subset is None:
            continue
        cut = _cut(root / row.path, name, row.text, row.speaker, strict=training)
        if split is not None:
            by_split.setdefault(split, []).append(cut)
        if subset is not None:
            subsets.setdefault(subset, []).append(cut)
    if not by_split:
        raise UsageError(f"{root / 'splits.tsv'} names no utterance of those in {root}; correct or remove it")
    if training:
        _settle_roles(by_split, root, listed=bool(listed))
    roles = {name: Split.of(by_split[name]) for name in SPLITS if name in by_split}
    return roles if training else roles | {name: Split.of(subsets[name]) for name in subsets if name not in roles}


def _cut(path: Path, name: str, text: str | None, speaker: str | None, *, strict: bool) -> MonoCut:
    """One file as a cut; only its header is read. One that cannot be read is refused, or a cut of a sample."""
    fault = ""
    try:
        with AudioFile(str(path)) as file:
            rate, samples, channels = file.rate, file.frames, file.channels
        if samples == 0:
            fault = f"no samples in {path}: expected audio"
    except (AudioError, OSError) as error:
        fault = f"cannot read {path}: {error}"
    if fault and strict:
        raise UsageError(f"{fault}; repair or remove it")
    if fault:
        rate, samples, channels = SAMPLE_RATE, 1, 1
    duration = samples / rate
    recording = file_recording(name, str(path.resolve()), rate, samples, channels)
    said = SupervisionSegment(id=name, recording_id=name, start=0.0, duration=duration, text=text, speaker=speaker)
    custom = {"unreadable": fault} if fault else None
    return MonoCut(
        id=name, start=0.0, duration=duration, channel=0, recording=recording, supervisions=[said], custom=custom
    )


def file_recording(name: str, location: str, rate: int, samples: int, channels: int) -> Recording:
    """A recording in one file, here or remote; ``samples`` of each channel."""
    numbers = list(range(channels))
    return Recording(
        id=name,
        sources=[AudioSource(type="url" if is_remote(location) else "file", channels=numbers, source=location)],
        sampling_rate=rate,
        num_samples=samples,
        duration=samples / rate,
        channel_ids=numbers,
    )


def _settle_roles(by_split: dict[str, list[MonoCut]], root: Path, *, listed: bool) -> None:
    """Make it something to train and validate on."""
    if "train" not in by_split and listed:
        raise UsageError(f"{root / 'splits.tsv'} gives no utterance in {root} the role train, got {sorted(by_split)}")
    if "train" not in by_split:
        together = [cut for cuts in by_split.values() for cut in cuts]
        by_split.clear()
        by_split["train"] = together
    if "valid" not in by_split:
        _hold_out(by_split, root)


def _hold_out(by_split: dict[str, list[MonoCut]], root: Path) -> None:
    """Move some speakers from train to valid."""
    speakers = {cut.supervisions[0].speaker or "" for cut in by_split["train"]}
    if len(speakers) < 2:
        raise UsageError(
            f"no validation audio in {root}: expected a subset named dev... or valid..., or two speakers or more "
            f"to hold one out, got {len(speakers)} speaker"
        )
    ranked = sorted(speakers, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held = set(ranked[: max(1, round(_HELD_OUT_SPEAKERS * len(speakers)))])
    cuts = by_split["train"]
    by_split["valid"] = [cut for cut in cuts if cut.supervisions[0].speaker in held]
    by_split["train"] = [cut for cut in cuts if cut.supervisions[0].speaker not in held]


def choose_split(splits: Splits, name: str, corpus: str, setting: str = "split") -> Split:
    """The split that a setting names.

    Raises:
        UsageError: the corpus has no such split.
    """
    if name not in splits:
        raise UsageError(f"`{setting}` must be one of {', '.join(splits)}, which {corpus} has; got {name!r}")
    return splits[name]


def describe(splits: Splits) -> dict[str, dict[str, float | str]]:
    """Size of each split: hours, utterances, speakers, utterances with a transcript; and a hash of its content."""
    return {
        name: {
            "hours": split.seconds / 3600,
            "utterances": len(split),
            "speakers": split.speakers,
            "transcribed": split.transcribed,
            "content": split.content,
        }
        for name, split in splits.items()
    }


def labelled_subset(split: Split, minutes: float, seed: int) -> Split:
    """About so many minutes of transcribed cuts, over all speakers, with their weights; see ``choose_labelled``."""
    rows = ((cut.id, cut.supervisions[0].speaker, cut.duration) for cut in split if cut.supervisions[0].text)
    chosen = choose_labelled(rows, minutes, seed)
    kept = [(piece.weight, [cut for cut in piece.read() if cut.id in chosen]) for piece in split.pieces]
    together = Split.of(cut for _, cuts in kept for cut in cuts)
    pieces = (replace(piece, weight=weight) for weight, cuts in kept if cuts for piece in Split.of(cuts).pieces)
    return replace(together, pieces=tuple(pieces))


def choose_labelled(rows: Iterable[tuple[str, str | None, float]], minutes: float, seed: int) -> set[str]:
    """Utterances of about so many minutes, taken in turn from the speakers, in an order that the seed decides.

    Args:
        rows: (utterance id, speaker, seconds).
    """

    def rank(name: str) -> str:
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()

    by_speaker: dict[str, list[tuple[str, float]]] = {}
    for name, speaker, seconds in sorted(rows, key=lambda row: rank(row[0])):
        by_speaker.setdefault(speaker or "", []).append((name, seconds))
    queues = [by_speaker[speaker] for speaker in sorted(by_speaker, key=lambda s: rank(by_speaker[s][0][0]))]
    chosen, total = set(), 0.0
    while queues:
        for queue in queues:
            name, seconds = queue.pop()
            if total + seconds <= minutes * 60 + 8:
                chosen.add(name)
                total += seconds
            if total >= minutes * 60:
                return chosen
        queues = [queue for queue in queues if queue]
    return chosen
