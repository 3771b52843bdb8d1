"""Corpora as splits of lhotse cuts, read piece by piece: prepared ones, here or remote, and folders as they are."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lhotse import MonoCut

from w2v2.data.config import DataConfig
from w2v2.data.folders import folder_cuts
from w2v2.data.splits import SCHEMA, Prepared, choose_labelled
from w2v2.data.storage import is_remote, join, read_bytes
from w2v2.data.utterance import TEXT, Utterance, labelled, location_of, read_cut, read_line, repeated
from w2v2.errors import JobError, UsageError, shown
from w2v2.files import MOST_BYTES
from w2v2.serial import checked, parse_json


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
    label: str = TEXT
    """What stands for the transcript, as of :func:`labelled`."""

    def identity(self) -> str:
        """What tells it from a piece of other cuts, wherever the files lie."""
        held = [(cut.id, cut.duration) for cut in self.held]
        label = () if self.label == TEXT else (self.label,)
        return repr((self.content, Path(self.manifest).name, self.utterances, self.weight, held, *label))

    def files(self) -> list[tuple[int, int] | None]:
        """Size and time of change, ns, of the audio of cuts in memory. A manifest's hash covers its samples."""
        return [_stamp(location_of(cut)) for cut in self.held]

    def rows(self, number: int = 0) -> Iterator[Row]:
        """Its utterances, in order; ``number`` is the first part of their ``place``.

        Raises:
            JobError: a damaged manifest.
        """
        if not self.manifest:
            for i, cut in enumerate(self.held):
                yield Row(cut.duration, cut.id, cut, place=(number, i), label=self.label)
            return
        try:
            inflate = zlib.decompressobj(wbits=31)  # gzip; memory for what there is, not for the most there may be
            content = inflate.decompress(read_bytes(self.manifest), MOST_BYTES)
            if not inflate.eof:
                raise zlib.error("it is cut off, or larger than any piece")
        except zlib.error as error:
            fault = f"{self.manifest} is damaged ({error}); copy it again, or prepare the corpus again"
            raise JobError(fault) from error
        for i, line in enumerate(content.splitlines()):
            cut = read_line(line, f"{self.manifest}, line {i + 1},")
            yield Row(cut.duration, cut.id, line, self.audio, (number, i), label=self.label)

    def read(self) -> Iterator[MonoCut]:
        """The cuts, in order."""
        return (row.cut() for row in self.rows())


class Row(NamedTuple):
    """An utterance as it stands in its piece: planning takes no more, and a cut is made of it where audio is read."""

    seconds: float
    id: str
    content: bytes | MonoCut
    """Line of the manifest, or a cut in memory."""
    audio: str = ""
    """As of the piece."""
    place: tuple[int, int] = (0, 0)
    """(which of the pieces of a pass, which row of it)."""
    repeats: int | None = None
    """How many times it has come before, where that is not the number of passes."""
    label: str = TEXT
    """As of the piece."""

    def cut(self) -> MonoCut:
        """The cut that it is."""
        cut = read_cut(self.content, self.audio) if isinstance(self.content, bytes) else self.content
        cut = labelled(cut, self.label)
        return cut if self.repeats is None else repeated(cut, self.repeats)

    def utterance(self) -> Utterance:
        """What is known of it."""
        if isinstance(self.content, bytes) and self.label == TEXT:
            return Utterance.from_line(self.content, self.audio)
        return Utterance.of(self.cut())


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
        utterances = [Utterance.of(cut) for cut in held]
        piece = Piece(held=held, utterances=len(held), seconds=sum(cut.duration for cut in held))
        return cls((piece,), len({u.speaker for u in utterances}), sum(bool(u.text) for u in utterances))

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

    def utterances(self) -> Iterator[Utterance]:
        """All of them, in the same order."""
        return map(Utterance.of, self)

    def labelled(self, label: str) -> Split:
        """The same with another label of each utterance in the place of its transcript, as of :func:`labelled`."""
        split = replace(self, pieces=tuple(replace(piece, label=label) for piece in self.pieces))
        rows = (row for piece in split.pieces for row in piece.rows())
        return replace(split, transcribed=sum(bool(row.utterance().text) for row in rows))

    def transcripts(self, min_seconds: float) -> Iterator[tuple[str, float, str]]:
        """(id, seconds, transcript, empty if there is none) of the utterances that are long enough."""
        return ((u.id, u.seconds, u.text or "") for u in self.utterances() if u.seconds >= min_seconds)


Splits = dict[str, Split]


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def read_corpora(sources: Sequence[str], weights: Sequence[float] = (), *, training: bool = True) -> Splits:
    """Splits of several corpora together; weights are of their train splits, 1 each without any.

    Raises:
        UsageError: as ``read_corpus``; a number of weights that is not that of the corpora.
    """
    if weights and len(weights) != len(sources):
        raise UsageError(f"`data.weights` needs one number for each of the {len(sources)} corpora, got {len(weights)}")
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
            f"no split {data.train_split!r} in {' '.join(data.sources)}, needed for `data.train_split`: got "
            f"{', '.join(splits)}"
        )
    return {**splits, "train": splits[data.train_split]}


def read_corpus(root: str | Path, *, training: bool = True) -> Splits:
    """Splits of a prepared corpus, on disk, at an HTTP address or in S3, or of a folder of audio as it is.

    Of a folder that is not prepared only the headers are read, and the rules are those of ``folder_rows``:
    ``ROOT/splits.tsv`` decides the splits if it exists, otherwise the names of the subsets. To train on, without any
    validation utterance, every twentieth speaker of train, by a hash of the name, is held out, and a folder without any
    training subset, such as dev-clean alone, is used whole.

    Without ``training`` a file without a readable header is a cut that says so (``Utterance.unreadable``), so that
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
    return {name: Split.of(cuts) for name, cuts in folder_cuts(root, training=training).items()}


def _prepared(location: str, description: str) -> Splits:
    try:
        values = parse_json(read_bytes(description), description)
    except FileNotFoundError as error:
        raise UsageError(f"no {description}: expected a corpus that 'w2v2 prepare' wrote") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{description} has schema {shown(schema)}, expected {SCHEMA}; prepare the corpus again")
    corpus: Prepared = checked(values, Prepared, description)
    splits = {}
    for name, split in corpus["splits"].items():
        pieces = tuple(
            Piece(
                manifest=join(location, piece["cuts"]),
                audio=join(location, piece["audio"]) if piece["audio"] else "",
                utterances=piece["utterances"],
                seconds=piece["seconds"],
                content=corpus["content_hash"],
            )
            for piece in split["pieces"]
        )
        splits[name] = Split(pieces, split["speakers"], split["transcribed"])
    return splits


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
    rows = ((u.id, u.speaker, u.seconds) for u in split.utterances() if u.text)
    chosen = choose_labelled(rows, minutes, seed)
    kept = [(piece.weight, [cut for cut in piece.read() if cut.id in chosen]) for piece in split.pieces]
    together = Split.of(cut for _, cuts in kept for cut in cuts)
    pieces = (replace(piece, weight=weight) for weight, cuts in kept if cuts for piece in Split.of(cuts).pieces)
    return replace(together, pieces=tuple(pieces))
