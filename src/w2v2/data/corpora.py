"""Sources of audio as lhotse cuts, by split."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import soundfile
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment

from w2v2.errors import UsageError

SPLITS = ("train", "valid", "test")
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus")
_HELD_OUT_SPEAKERS = 0.05

Splits = dict[str, CutSet]


def read_corpus(root: Path, progress: Callable[[float], None] | None = None, *, training: bool = True) -> Splits:
    """Cuts of each split of a prepared folder, or of a folder in LibriSpeech layout.

    LibriSpeech layout is ``SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac`` with transcripts in
    ``SPEAKER-CHAPTER.trans.txt``, or the same without SUBSET. The split of an utterance is, in this order: its
    ``role`` in ``ROOT/splits.tsv``, a table with the columns ``role`` and ``utt``; that of its subset (``train*``;
    ``dev*``, ``valid*``; ``test*``). Without any validation utterance, every twentieth speaker of train, by a hash of
    the name, is held out. A folder without any training subset, such as dev-clean alone, is used whole to train on,
    unless ``training`` is False.

    Raises:
        UsageError: no such folder, no audio in it, an unreadable file, an utterance id that occurs twice.
    """
    if not root.is_dir():
        raise UsageError(f"no folder {root}: expected audio in LibriSpeech layout, or what 'w2v2 prepare' wrote")
    if (root / "corpus.json").exists():
        names = json.loads((root / "corpus.json").read_text())["splits"]
        return {name: CutSet.from_file(root / f"{name}.jsonl.gz").to_eager() for name in names}
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise UsageError(f"no audio in {root}: expected files ending in {', '.join(AUDIO_SUFFIXES)}; check the path")
    roles = _listed_roles(root / "splits.tsv")
    transcripts = _transcripts(root)
    by_split: dict[str, list[MonoCut]] = {}
    seen: dict[str, Path] = {}
    for i, path in enumerate(files):
        if path.stem in seen:
            raise UsageError(f"two files with the utterance id {path.stem}: {seen[path.stem]} and {path}; rename one")
        seen[path.stem] = path
        split = roles.get(path.stem) if roles else _split_of_subset(path.relative_to(root).parts[0])
        if split is not None:
            by_split.setdefault(split, []).append(_cut(path, transcripts.get(path.stem)))
        if progress:
            progress((i + 1) / len(files))
    if "train" not in by_split and roles:
        raise UsageError(f"{root / 'splits.tsv'} gives no utterance in {root} the role train, got {sorted(by_split)}")
    if "train" not in by_split and training:
        by_split = {"train": [cut for cuts in by_split.values() for cut in cuts]}
    if "train" in by_split and "valid" not in by_split:
        _hold_out(by_split, root)
    return {name: CutSet.from_cuts(by_split[name]) for name in SPLITS if name in by_split}


def _split_of_subset(subset: str) -> str:
    for prefix, split in (("dev", "valid"), ("valid", "valid"), ("test", "test")):
        if subset.lower().startswith(prefix):
            return split
    return "train"


def _listed_roles(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        if not rows.fieldnames or not {"role", "utt"} <= set(rows.fieldnames):
            raise UsageError(f"{path} needs the columns role and utt, got {rows.fieldnames}")
        return {row["utt"]: _split_of_subset(row["role"]) for row in rows}


def _transcripts(root: Path) -> dict[str, str]:
    texts = {}
    for path in root.rglob("*.trans.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            texts[name] = text.strip()
    return texts


def _cut(path: Path, text: str | None) -> MonoCut:
    """One file as a cut; only its header is read."""
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UsageError(f"cannot read {path}: {error}; repair or remove it") from error
    if info.frames == 0:
        raise UsageError(f"no samples in {path}: expected audio; repair or remove it")
    duration = info.frames / info.samplerate
    recording = Recording(
        id=path.stem,
        sources=[AudioSource(type="file", channels=list(range(info.channels)), source=str(path.resolve()))],
        sampling_rate=info.samplerate,
        num_samples=info.frames,
        duration=duration,
        channel_ids=list(range(info.channels)),
    )
    speaker = path.stem.split("-")[0]
    supervision = SupervisionSegment(
        id=path.stem, recording_id=path.stem, start=0.0, duration=duration, text=text, speaker=speaker
    )
    return MonoCut(
        id=path.stem, start=0.0, duration=duration, channel=0, recording=recording, supervisions=[supervision]
    )


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


def labelled_subset(cuts: CutSet, minutes: float, seed: int) -> CutSet:
    """About so many minutes of transcribed cuts, taken in turn from the speakers, in an order that the seed decides."""

    def rank(cut: MonoCut) -> str:
        return hashlib.sha256(f"{seed}/{cut.id}".encode()).hexdigest()

    def in_turn() -> Iterator[MonoCut]:
        by_speaker: dict[str, list[MonoCut]] = {}
        for cut in sorted(cuts, key=rank):
            if cut.supervisions[0].text:
                by_speaker.setdefault(cut.supervisions[0].speaker or "", []).append(cut)
        queues = [by_speaker[speaker] for speaker in sorted(by_speaker, key=lambda s: rank(by_speaker[s][0]))]
        while queues:
            for queue in queues:
                yield queue.pop()
            queues = [queue for queue in queues if queue]

    chosen, seconds = [], 0.0
    for cut in in_turn():
        if seconds + cut.duration > minutes * 60 + 8:
            continue
        chosen.append(cut)
        seconds += cut.duration
        if seconds >= minutes * 60:
            break
    return CutSet.from_cuts(chosen)
