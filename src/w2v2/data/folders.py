"""A folder of audio as it is, as cuts of each split: only headers are read."""

from __future__ import annotations

from pathlib import Path

from lhotse import MonoCut

from w2v2.data.audio import SAMPLE_RATE, AudioError, AudioFile
from w2v2.data.layouts import refuse_layout
from w2v2.data.names import utterance_id
from w2v2.data.sources import Row, folder_rows
from w2v2.data.splits import SPLITS, held_out, named_split
from w2v2.data.tables import listed_splits
from w2v2.data.utterance import Utterance, file_cut
from w2v2.errors import UsageError

_HELD_OUT_SPEAKERS = 0.05


def folder_cuts(root: Path, *, training: bool) -> dict[str, list[MonoCut]]:
    """Cuts of each split, and without ``training`` of each subset; the rules are those of ``read_corpus``.

    Raises:
        UsageError: as ``read_corpus``.
    """
    refuse_layout(root)
    rows = list(folder_rows(root))
    if not rows:
        raise UsageError(f"no audio in {root}: expected files such as .flac, .wav, .mp3, .ogg, .opus; check the path")
    listed = listed_splits(root / "splits.tsv") if (root / "splits.tsv").exists() else {}
    roles: dict[str, list[MonoCut]] = {}
    subsets: dict[str, list[MonoCut]] = {}
    paths: dict[str, str] = {}
    rest = "train"
    if not training and not any(row.split for row in rows):
        rest = named_split(root.absolute().name) or "test"
    for row in rows:
        name = utterance_id(row.path)
        if name in paths:
            raise UsageError(f"two files with the utterance id {name}: {paths[name]} and {row.path}; rename one")
        paths[name] = row.path
        split = listed.get(name) if listed else row.split or rest
        subset = row.path.partition("/")[0] if row.split and not training else None
        if split or subset:
            cut = _cut(root, row, name, strict=training)
            for kind, key in ((roles, split), (subsets, subset)):
                if key:
                    kind.setdefault(key, []).append(cut)
    if not roles:
        raise UsageError(f"{root / 'splits.tsv'} names no utterance of those in {root}; correct or remove it")
    if training:
        if "train" not in roles and listed:
            raise UsageError(f"{root / 'splits.tsv'} gives no utterance in {root} the role train, got {sorted(roles)}")
        if "train" not in roles:
            roles = {"train": [cut for cuts in roles.values() for cut in cuts]}
        if "valid" not in roles:
            _hold_out(roles, root)
    splits = {name: roles[name] for name in SPLITS if name in roles}
    return splits | {name: cuts for name, cuts in subsets.items() if name not in splits}


def _cut(root: Path, row: Row, name: str, *, strict: bool) -> MonoCut:
    """One file as a cut; only its header is read. One that cannot be read is refused, or a cut of a sample."""
    path, fault = root / row.path, ""
    rate, total, channels = SAMPLE_RATE, 1, 1
    try:
        with AudioFile(str(path)) as file:
            if file.frames:
                rate, total, channels = file.rate, file.frames, file.channels
            else:
                fault = f"no samples in {path}: expected audio"
    except (AudioError, OSError) as error:
        fault = f"cannot read {path}: {error}"
    if fault and strict:
        raise UsageError(f"{fault}; repair or remove it")
    return file_cut(
        name, str(path.resolve()), rate=rate, channels=channels, total=total, text=row.text, speaker=row.speaker,
        unreadable=fault,
    )  # fmt: skip


def _hold_out(roles: dict[str, list[MonoCut]], root: Path) -> None:
    """Move some speakers from train to valid."""
    cuts = [(Utterance.of(cut).speaker or "", cut) for cut in roles["train"]]
    speakers = {speaker for speaker, _ in cuts}
    if len(speakers) < 2:
        raise UsageError(
            f"no validation audio in {root}: expected a subset named dev... or valid..., or two speakers or more "
            f"to hold one out, got {len(speakers)} speaker"
        )
    held = held_out(speakers, _HELD_OUT_SPEAKERS)
    roles["valid"] = [cut for speaker, cut in cuts if speaker in held]
    roles["train"] = [cut for speaker, cut in cuts if speaker not in held]
