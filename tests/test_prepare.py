import csv
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import RATE, sound, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet

from w2v2.cli import main as cli
from w2v2.data.audio import load_audio
from w2v2.data.corpora import Splits, read_corpus
from w2v2.errors import JobError, UsageError
from w2v2.preparation.audit import audit, quiet_points
from w2v2.preparation.config import AuditConfig, PrepareConfig
from w2v2.preparation.findings import REASONS, Part
from w2v2.preparation.run import prepare

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def workers() -> Iterator[Executor]:
    """Two processes for all tests: starting them takes longer than most corpora here."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        yield executor


def run(source: Path | str, out: Path, workers: Executor, **options: Any) -> dict[str, Any]:
    return prepare(source, out, PrepareConfig(**options), executor=workers, jobs=2)


def findings(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "audit.jsonl").read_text(encoding="utf-8").splitlines()]


def reasons(location: Path, **config: Any) -> list[str]:
    """What the audit says of a whole file."""
    return [reason for reason, _ in audit(str(location), [Part(1)], AuditConfig(**config))[0].reasons]


def ids(splits: Splits) -> dict[str, set[str]]:
    return {name: {cut.id for cut in cuts} for name, cuts in splits.items()}


def save(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str | None = None) -> None:
    """By libsndfile, which does not know the ending .opus."""
    if path.suffix == ".opus":
        soundfile.write(path, samples, rate, format="OGG", subtype="OPUS")
    else:
        soundfile.write(path, samples, rate, subtype=subtype)


def encode(path: Path, samples: np.ndarray, rate: int, codec: str, **options: str) -> None:
    """By FFmpeg, which writes what libsndfile does not: AAC, ALAC, and MP3 without a header."""
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = rate
        for part in av.AudioResampler(format=stream.format, layout="mono", rate=rate).resample(frame):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))


# --- Faults -----------------------------------------------------------------------------------------------------------

TEXT = "SUN MOON STAR SKY"


def write_faults(root: Path) -> dict[str, list[str]]:
    """One file for each reason, with its reasons; and healthy ones, with none.

    Every file but one has a transcript, of 6 to 7 characters a second unless it is the transcript that is wrong, so
    that none has a fault that is not meant.
    """
    folder = root / "train" / "101" / "1"
    folder.mkdir(parents=True)
    expected: dict[str, list[str]] = {}
    texts: dict[Path, list[str]] = {}

    def plant(suffix: str, *why: str, where: Path = folder, text: str | None = TEXT) -> tuple[Path, np.ndarray]:
        where.mkdir(parents=True, exist_ok=True)
        i = len(expected)
        path = where / f"{where.parent.name}-1-{i:04d}.{suffix}"
        expected[str(path.relative_to(root))] = list(why)
        if text is not None:
            texts.setdefault(where, []).append(f"{path.stem} {text}\n")
        return path, sound(2.2, seed=i)

    def write(suffix: str, *why: str, change: Any = lambda samples: samples, **kwargs: Any) -> Path:
        subtype = kwargs.pop("subtype", None)
        path, samples = plant(suffix, *why, **kwargs)
        save(path, change(samples), subtype=subtype)
        return path

    good = write("flac")
    write("wav")
    write("flac", where=root / "dev-clean" / "104" / "1")
    plant("wav", "unreadable")[0].write_text("this is a letter, not a recording\n" * 50)
    os.mkfifo(plant("wav", "unreadable")[0])
    plant("flac", "unreadable")[0].symlink_to("nowhere.flac")
    plant("mp3", "unreadable")[0].write_bytes(np.random.default_rng(0).bytes(20_000))
    for suffix in ("flac", "wav", "mp3", "ogg", "opus"):
        path = write(suffix, "truncated")
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    plant("flac", "empty")[0].write_bytes(b"")
    write("wav", "empty", change=lambda samples: samples[:0])
    write("flac", "silent", change=lambda samples: 1e-3 * samples)
    write("flac", "clipped", change=lambda samples: np.clip(4 * samples, -0.9, 0.9))
    write("wav", "out_of_range", change=lambda samples: 4 * samples, subtype="FLOAT")
    write("flac", "out_of_phase", change=lambda samples: np.stack([samples, -samples], 1))
    write("flac", "dc_offset", change=lambda samples: samples + 0.1)
    write("wav", "non_finite", change=lambda samples: np.where(np.arange(len(samples)) == 999, np.nan, samples),
          subtype="FLOAT")  # fmt: skip
    write("flac", "too_short", change=lambda samples: samples[:399])
    path = write("flac", "wrong_extension")
    expected[str(path.with_suffix(".wav").relative_to(root))] = expected.pop(str(path.relative_to(root)))
    path.rename(path.with_suffix(".wav"))
    path, _ = plant("wav", "duplicate")  # the second in the order of paths is the one that goes
    soundfile.write(path, soundfile.read(good, dtype="int16")[0], RATE)
    write("flac", "transcript_missing", text=None)
    write("flac", "transcript_empty", text="")
    write("flac", "out_of_vocabulary", text="SUN MOON 3 SKY")
    # A word boundary after each letter makes two labels of one character: 110 labels in 109 frames at 25 a second.
    write("flac", "ctc_infeasible", text="A B C D E " * 11)
    write("flac", "speech_rate", text="A")
    write("flac", "too_long", change=lambda samples: np.tile(samples, 28), text=" ".join([TEXT] * 28))
    for subset in ("train", "test"):  # an overlap takes two files, and both are told
        write("flac", "speaker_overlap", where=root / subset / "103" / "1")
    for where, lines in texts.items():
        (where / f"{where.parent.name}-1.trans.txt").write_text("".join(lines))
    return expected


REJECTED = {"unreadable", "truncated", "empty", "silent", "non_finite", "too_short", "duplicate"}


def test_every_planted_fault_is_found_and_nothing_else(tmp_path: Path, workers: Executor) -> None:
    expected = write_faults(tmp_path / "in")
    summary = run(tmp_path / "in", tmp_path / "out", workers)

    lines = findings(tmp_path / "out")
    assert all(set(line) == {"path", "status", "reasons", "detail"} for line in lines)
    assert {line["path"]: line["reasons"] for line in lines} == expected and len(lines) == len(expected)
    for line in lines:
        status = "ok" if not line["reasons"] else "rejected" if set(line["reasons"]) & REJECTED else "warned"
        assert line["status"] == status
        assert [part.partition(": ")[0] for part in line["detail"].split("; ") if part] == line["reasons"]

    counts = Counter(reason for why in expected.values() for reason in why)
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["audit"]["reasons"] == {
        reason: counts[reason] for reason in REASONS
    }
    assert set(counts) == set(REASONS) - {"no_speech"}  # test_vad.py
    counts = {"ok": 3, "warned": 13, "rejected": 15, "unlisted": 0, "passed_over": {}, "reasons": None}
    assert summary["audit"] | {"reasons": None} == counts
    kept = {Path(path).stem for path, why in expected.items() if not set(why) & REJECTED}
    assert set.union(*ids(read_corpus(tmp_path / "out")).values()) == kept


@pytest.mark.parametrize("suffix", ["flac", "wav", "mp3", "ogg", "opus"])
def test_a_file_cut_off_anywhere_is_truncated_and_a_whole_one_is_not(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    save(path, sound(2.5, 1))
    whole = path.read_bytes()
    assert reasons(path) == []
    for share in (0.3, 0.5, 0.7, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        assert reasons(path) == ["truncated"], share


def test_a_wav_header_without_any_sound_after_it_is_truncated(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sound(1, 0), RATE)
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:44])
    assert reasons(tmp_path / "a.wav") == ["truncated"]


def test_a_warning_does_not_hide_that_a_file_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    save(path, np.clip(4 * sound(2.5, 1), -0.9, 0.9))
    assert reasons(path) == ["clipped"]
    path.write_bytes(path.read_bytes()[:70_000])
    assert reasons(path) == ["clipped", "truncated"]


def test_silence_is_found_under_an_offset(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(60 * RATE, 0.7), RATE, subtype="FLOAT")
    assert reasons(tmp_path / "a.wav") == ["silent", "dc_offset"]


def test_flat_places_count_only_at_the_peak_of_the_whole_recording(tmp_path: Path) -> None:
    rate = 8_000
    quiet = np.clip(sound(2, 0, rate), -0.15, 0.15)  # flat at 0.15, as a loud talker in another room may be
    assert len(quiet) == 2 * rate
    hour = np.concatenate([np.tile(quiet, 31), 3 * sound(2, 1, rate)])  # the peak comes in the second minute
    soundfile.write(tmp_path / "a.wav", hour, rate)
    assert reasons(tmp_path / "a.wav") == []
    soundfile.write(tmp_path / "b.wav", np.clip(hour, -0.3, 0.3), rate)
    assert reasons(tmp_path / "b.wav") == ["clipped"]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_clipping_is_found_at_every_depth(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "a.wav"
    for rate in (8_000, 48_000):
        for seed in range(3):
            loud = sound(2, seed, rate)
            soundfile.write(path, loud, rate, subtype=subtype)
            assert reasons(path) == []
            soundfile.write(path, np.clip(2 * loud, -0.3, 0.3), rate, subtype=subtype)
            assert reasons(path) == ["clipped"]


def test_healthy_audio_of_every_kind_is_not_flagged(tmp_path: Path, workers: Executor) -> None:
    root = tmp_path / "in"
    root.mkdir()
    rng = np.random.default_rng(0)
    number = 0

    def signals(rate: int) -> Iterator[np.ndarray]:
        t = np.arange(round(0.7 * rate)) / rate
        yield sound(0.7, number, rate)
        for level in (0.02, 0.11, 0.5, 1.0):
            yield level * 0.999 * np.sin(2 * np.pi * rng.choice([30, 60, 110, 440, 1000]) * t + rng.uniform(0, 6))
        yield np.clip(0.2 * rng.standard_normal(len(t)), -1, 1)

    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "ULAW", "ALAW"):
        for rate in (8_000, 11_025, 16_000, 44_100, 48_000):
            for mono in signals(rate):
                number += 1
                other = 0.5 * np.roll(mono, 100)
                samples = np.stack([mono, other], 1) if number % 2 else mono
                save(root / f"{subtype}-{rate}-{number}.wav", samples, rate, subtype)
    for suffix, rate in (("flac", 22_050), ("mp3", 44_100), ("ogg", 16_000), ("opus", 48_000), ("opus", 16_000)):
        for mono in signals(rate):
            number += 1
            save(root / f"{rate}-{number}.{suffix}", mono, rate)
    for name, codec, rate, options in (
        ("aac.m4a", "aac", 44_100, {}),
        ("alac.m4a", "alac", 16_000, {}),
        ("bare.mp3", "mp3", 16_000, {"write_xing": "0"}),
        ("stream.aac", "aac", 16_000, {}),
    ):
        # First almost nothing, then a lot: a length guessed from the first bytes would be wrong.
        samples = np.concatenate([1e-4 * rng.standard_normal(2 * rate), sound(3, number, rate)])
        encode(root / name, samples, rate, codec, **options)
        number += 1
    for length in (0x7FFF_F000, 0xFFFF_FFFF):  # what SoX and FFmpeg write into a pipe
        soundfile.write(root / f"pipe-{length}.wav", sound(1, length % 97), RATE)
        data = (root / f"pipe-{length}.wav").read_bytes()
        (root / f"pipe-{length}.wav").write_bytes(data[:40] + struct.pack("<I", length) + data[44:])
        number += 1

    summary = run(root, tmp_path / "out", workers)
    assert [line for line in findings(tmp_path / "out") if line["status"] != "ok"] == []
    assert summary["audit"]["ok"] == number


def test_m4a_is_decoded_as_ffmpeg_does_and_the_end_of_a_row_may_be_its_own(tmp_path: Path) -> None:
    samples = sound(2.5, 0)
    encode(tmp_path / "a.m4a", samples, RATE, "alac")
    rows = [Part(1), Part(2, 0.5, 1.5), Part(3, 1.0), Part(4, 2.0, 3.0)]
    whole, middle, rest, past = audit(str(tmp_path / "a.m4a"), rows, AuditConfig())
    assert (whole.samples, middle.samples, rest.samples) == (len(samples), RATE, len(samples) - RATE)
    assert [reason for reason, _ in past.reasons] == ["truncated"]
    for found in (whole, middle, rest):
        assert found.reasons == [] and found.first + found.samples <= found.total


# --- Sources ----------------------------------------------------------------------------------------------------------


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    if path.suffix == ".tsv":  # without quoting, as Common Voice
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in [rows[0], *(r.values() for r in rows)]))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_rows_of_a_table_share_a_recording(tmp_path: Path, workers: Executor, suffix: str) -> None:
    samples = sound(6, 0)
    (tmp_path / "in" / "wav").mkdir(parents=True)
    soundfile.write(tmp_path / "in" / "wav" / "talk.wav", samples, RATE)
    soundfile.write(tmp_path / "in" / "other.flac", sound(2, 1), RATE)
    none = None if suffix == "jsonl" else ""
    columns = ("file", "from", "to", "sentence", "who", "set")
    rows = [
        ("wav/talk.wav", 0, 2, "sun moon", "ann", "train"),
        ("wav/talk.wav", 2, 4.5, 'star, "sky"', "bob", "dev"),
        ("wav/talk.wav", 4.5, none, "rain", "ann", "train"),
        ("wav/talk.wav", 5.5, 8, "too far", "ann", "train"),
        ("wav/talk.wav", 7, 8, "not there", "ann", "train"),
        ("other.flac", none, none, "wind wind", "cid", "test"),
    ]
    table = tmp_path / "in" / f"table.{suffix}"
    write_table(table, [dict(zip(columns, row, strict=True)) for row in rows])
    names = ("path=file", "start=from", "end=to", "text=sentence", "speaker=who", "split=set")
    run(table, tmp_path / "out", workers, columns=names)

    lines = findings(tmp_path / "out")
    assert [(line["path"], line["row"], line["reasons"]) for line in lines] == [
        ("other.flac", 6, []),
        ("wav/talk.wav", 1, []),
        ("wav/talk.wav", 2, ["out_of_vocabulary"]),
        ("wav/talk.wav", 3, []),
        ("wav/talk.wav", 4, ["truncated"]),
        ("wav/talk.wav", 5, ["truncated"]),
    ]
    splits = read_corpus(tmp_path / "out")
    told = {
        (name, round(cut.start, 3), cut.supervisions[0].text, cut.supervisions[0].speaker)
        for name, cuts in splits.items()
        for cut in cuts
    }
    assert told == {
        ("train", 0.0, "sun moon", "ann"),
        ("valid", 2.0, 'star, "sky"', "bob"),
        ("train", 4.5, "rain", "ann"),
        ("test", 0.0, "wind wind", "cid"),
    }
    exact, _ = soundfile.read(tmp_path / "in" / "wav" / "talk.wav", dtype="float32")
    parts = {"sun moon": exact[: 2 * RATE], 'star, "sky"': exact[2 * RATE : 72_000], "rain": exact[72_000:]}
    for cut in [*splits["train"], *splits["valid"]]:
        np.testing.assert_array_equal(load_audio(cut), parts[cut.supervisions[0].text])


def test_empty_lines_of_a_table_are_passed_over(tmp_path: Path, workers: Executor) -> None:
    write_corpus(tmp_path / "in", {"train": 2}, utterances=1)
    paths = sorted(str(path) for path in (tmp_path / "in").rglob("*.flac"))
    (tmp_path / "a.csv").write_text("path\n\n" + "\n\n".join(paths) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n" + "\n\n".join(json.dumps({"path": path}) for path in paths) + "\n\n")
    for i, table in enumerate(("a.csv", "b.jsonl")):
        assert run(tmp_path / table, tmp_path / f"out{i}", workers)["audit"]["ok"] == 2


@pytest.mark.parametrize("inside", [True, False])
def test_a_hugging_face_dataset(
    tmp_path: Path, workers: Executor, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "in", {"train": 2, "dev": 1}, utterances=2)
    files = {name: sorted((tmp_path / "in" / name).rglob("*.flac")) for name in ("train", "dev")}
    for name, split in (("train", "train"), ("dev", "validation")):
        rows = {
            "sound": [{"bytes": path.read_bytes() if inside else None, "path": str(path)} for path in files[name]],
            "text": [f"word {path.stem[0]}" for path in files[name]],
            "speaker": [int(path.stem.split("-")[0]) for path in files[name]],
        }
        target = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows).to_parquet(str(target))

    summary = run("hf:set", Path("out"), workers, columns=("audio=sound",))
    assert summary["audit"]["ok"] + summary["audit"]["warned"] == 6 and summary["audit"]["rejected"] == 0
    monkeypatch.chdir("/")
    splits = read_corpus(tmp_path / "out")
    assert {name: len(cuts) for name, cuts in splits.items()} == {"train": 4, "valid": 2}
    loaded = {load_audio(cut).tobytes() for cut in splits["train"]}
    assert loaded == {soundfile.read(path, dtype="float32")[0].tobytes() for path in files["train"]}
    assert {cut.supervisions[0].speaker for cut in splits["train"]} == {"101", "102"}
    again = run(f"hf:{tmp_path / 'set'}", tmp_path / "elsewhere", workers, columns=("audio=sound",))
    assert again["content_hash"] == summary["content_hash"]
    with pytest.raises(
        UsageError, match=r"has no column 'said': got sound, text, speaker; name it with `columns` text="
    ):
        run(f"hf:{tmp_path / 'set'}", tmp_path / "wrong", workers, columns=("audio=sound", "text=said"))
    assert not (tmp_path / "wrong").exists()
    for option in ({"speaker": "(.)"}, {"audio_folder": str(tmp_path)}):
        with pytest.raises(UsageError, match=f"`{next(iter(option))}` is not for a dataset of Hugging Face"):
            run(f"hf:{tmp_path / 'set'}", tmp_path / "wrong", workers, columns=("audio=sound",), **option)


def test_a_row_without_audio_costs_nothing_that_was_downloaded(tmp_path: Path, workers: Executor) -> None:
    datasets = pytest.importorskip("datasets")
    save(tmp_path / "a.wav", sound(1.0, 1))
    data = {"bytes": (tmp_path / "a.wav").read_bytes(), "path": "a.wav"}
    rows = {"audio": [data] * 3 + [None], "locale": ["en"] * 4}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set" / "train.parquet"))
    with pytest.raises(UsageError, match="row 4: no audio in 'audio'; remove the row"):
        run(f"hf:{tmp_path / 'set'}", tmp_path / "out", workers)
    assert len([*(tmp_path / "out" / "audio").rglob("*.wav")]) == 3


def test_paths_that_differ_only_in_how_they_are_divided_get_names_of_their_own(
    tmp_path: Path, workers: Executor
) -> None:
    places = ["a/b_c.wav", "a_b/c.wav", "a/b c.wav", "x/y.wav", "x/y.flac"]
    for i, place in enumerate(places):
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "in" / place, sound(1, i), RATE)
    run(tmp_path / "in", tmp_path / "out", workers)
    names = [cut.id for cuts in read_corpus(tmp_path / "out").values() for cut in cuts]
    assert len(set(names)) == len(names) == len(places)


# --- Long recordings --------------------------------------------------------------------------------------------------


def monologue(seconds: float, rate: int) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Noise, with a pause of 0.5 s every 5 to 9 s."""
    rng = np.random.default_rng(0)
    samples = 0.2 * rng.standard_normal(round(seconds * rate))
    pauses, at = [], 0.0
    while (at := at + rng.uniform(5, 9)) < seconds - 1:
        samples[round(at * rate) : round((at + 0.5) * rate)] *= 0.001
        pauses.append((at, at + 0.5))
    return np.clip(samples, -1, 1), pauses


@pytest.mark.parametrize("rate", [8_000, 11_025])  # 20 ms of the second are no whole number of samples
def test_long_recordings_are_cut_in_pauses_and_their_pieces_tile_them(
    tmp_path: Path, workers: Executor, rate: int
) -> None:
    samples, pauses = monologue(200, rate)
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
    soundfile.write(tmp_path / "in" / "a" / "a.wav", samples, rate)
    soundfile.write(tmp_path / "in" / "b" / "b.wav", samples[: 20 * rate + 1], rate)  # one sample more than allowed
    run(tmp_path / "in", tmp_path / "out", workers, audit=AuditConfig(max_seconds=20))
    cuts = [cut for split in read_corpus(tmp_path / "out").values() for cut in split]
    assert len({cut.id for cut in cuts}) == len(cuts)
    for name, length in (("a", len(samples)), ("b", 20 * rate + 1)):
        mine = sorted((cut for cut in cuts if cut.recording_id.startswith(name)), key=lambda cut: cut.start)
        edges = [round(cut.start * rate) for cut in mine] + [round(mine[-1].end * rate)]
        assert [round(cut.end * rate) for cut in mine] == edges[1:]
        assert (edges[0], edges[-1]) == (0, length)
        assert all(0 < b - a <= 20 * rate for a, b in pairwise(edges))
        for edge in edges[1:-1]:
            assert any(start < edge / rate < end for start, end in pauses), edge / rate
        exact = soundfile.read(mine[0].recording.sources[0].source, dtype="float32")[0]
        if rate == 8_000:
            assert sum(len(load_audio(cut)) for cut in mine) == pytest.approx(length * 2, abs=len(mine))
        assert len(exact) == length


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_quiet_points_keep_their_promise(data: st.DataObject) -> None:
    longest = data.draw(st.integers(8, 400))
    length = data.draw(st.integers(1, 2000))
    seed = data.draw(st.integers(0, 1000))
    energy = np.random.default_rng(seed).exponential(size=length).astype(np.float32)
    energy[: data.draw(st.integers(0, length))] = 0  # ties too
    points = quiet_points(energy, longest)
    pieces = [b - a for a, b in pairwise([0, *points, length])]
    assert all(piece <= longest for piece in pieces)
    assert all(piece >= longest // 2 for piece in pieces[:-1])
    assert len(pieces) == 1 or pieces[-1] >= longest // 4
    assert len(points) == 0 if length <= longest else points


@given(st.integers(40, 400), st.integers(0, 1000), st.data())
@settings(max_examples=100, deadline=None)
def test_the_one_pause_within_reach_is_where_it_is_cut(longest: int, seed: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(longest + 1, longest + longest // 4))
    energy = 1 + np.random.default_rng(seed).exponential(size=length).astype(np.float32)
    high = min(longest, length - longest // 4)
    start = data.draw(st.integers(longest // 2, high - 10))
    energy[start : start + 10] = 0.01
    (point,) = quiet_points(energy, longest)
    assert start <= point <= start + 10


# --- Splits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten speakers with four utterances of a second, in no split."""
    root = tmp_path_factory.mktemp("speakers")
    for speaker in range(10):
        folder = root / f"s{speaker}" / "1"
        folder.mkdir(parents=True)
        for i in range(4):
            soundfile.write(folder / f"s{speaker}-1-{i}.wav", sound(1 + 0.1 * i, 10 * speaker + i), RATE)
        (folder / "x.trans.txt").write_text("".join(f"s{speaker}-1-{i} SUN MOON\n" for i in range(4)))
    return root


def by_speaker(splits: Splits) -> dict[str, set[str]]:
    return {name: {cut.supervisions[0].speaker for cut in cuts} for name, cuts in splits.items()}


def test_speakers_are_held_out_by_the_seed(speakers: Path, tmp_path: Path, workers: Executor) -> None:
    def held(out: str, seed: int) -> dict[str, set[str]]:
        run(speakers, tmp_path / out, workers, valid_share=0.2, test_share=0.3, seed=seed)
        splits = read_corpus(tmp_path / out)
        assert {name: len(cuts) for name, cuts in splits.items()} == {"train": 20, "valid": 8, "test": 12}
        return by_speaker(splits)

    one, again, other = held("a", 1), held("b", 1), held("c", 2)
    assert one == again != other
    assert [len(one[name]) for name in ("train", "valid", "test")] == [5, 2, 3]
    assert one["train"] | one["valid"] | one["test"] == {f"s{i}" for i in range(10)}


def test_something_is_always_left_to_train_on(tmp_path: Path, workers: Executor) -> None:
    write_corpus(tmp_path / "in", {"a": 2}, utterances=1)
    run(tmp_path / "in", tmp_path / "out", workers, valid_share=0.99, shards="wav")
    assert {name: len(cuts) for name, cuts in read_corpus(tmp_path / "out").items()} == {"train": 1, "valid": 1}


def test_lists_go_before_folders_and_what_is_not_listed_is_told(tmp_path: Path, workers: Executor) -> None:
    write_corpus(tmp_path / "in", {"train": 2, "test": 1}, utterances=2)
    listed = "role\tutt\ntrain\t103-1-0000\nvalid\t101-1-0001\ntest\t102-1-0000\n"
    (tmp_path / "list.tsv").write_text(listed)
    run(tmp_path / "in", tmp_path / "out", workers, splits=str(tmp_path / "list.tsv"))
    expected = {"train": {"103-1-0000"}, "valid": {"101-1-0001"}, "test": {"102-1-0000"}}
    assert ids(read_corpus(tmp_path / "out")) == expected
    detail = {Path(line["path"]).stem: line["detail"] for line in findings(tmp_path / "out")}
    assert {name for name, said in detail.items() if "not listed" in said} == {"101-1-0000", "102-1-0001", "103-1-0001"}
    (tmp_path / "in" / "splits.tsv").write_text(listed)
    run(tmp_path / "in", tmp_path / "out2", workers)
    assert ids(read_corpus(tmp_path / "out2")) == expected
    run(write_corpus(tmp_path / "in2", {"train": 2, "dev": 1}, utterances=2), tmp_path / "out3", workers)
    assert by_speaker(read_corpus(tmp_path / "out3")) == {"train": {"101", "102"}, "valid": {"103"}}


def test_labelled_subsets_are_balanced_nested_and_of_their_size(
    speakers: Path, tmp_path: Path, workers: Executor
) -> None:
    (tmp_path / "ids").write_text("s1-1-0 s2-1-3\nnobody-1-0\n")
    labelled = ("0.1m", "0.3m", f"mine={tmp_path / 'ids'}")
    summary = run(speakers, tmp_path / "out", workers, valid_share=0.1, labelled=labelled, shards="flac")
    splits = read_corpus(tmp_path / "out")
    small, large = splits["train-0.1m"], splits["train-0.3m"]
    assert ids(splits)["train-mine"] <= {"s1-1-0", "s2-1-3"} and len(splits["train-mine"])
    for subset, seconds in ((small, 6), (large, 18)):
        assert seconds <= sum(cut.duration for cut in subset) < seconds + 1.4
        taken = Counter(cut.supervisions[0].speaker for cut in subset)
        assert max(taken.values()) - min(taken.get(name, 0) for name in by_speaker(splits)["train"]) <= 1
    assert {cut.id for cut in small} < {cut.id for cut in large} < {cut.id for cut in splits["train"]}
    whole = {cut.id: load_shard(tmp_path / "out", cut) for cut in splits["train"]}
    assert all(np.array_equal(load_shard(tmp_path / "out", cut), whole[cut.id]) for cut in large)
    assert summary["splits"]["train-0.3m"]["transcribed"] == len(large)


def test_shards_of_a_source_whose_files_have_other_endings_now_hold_each_utterance_once(
    tmp_path: Path, workers: Executor
) -> None:
    for i in range(24):
        path = tmp_path / "in" / f"s{i % 4}" / f"u{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound(1.0 + i * 7 % 24 / 8, seed=i), 16_000, subtype="PCM_16")
    run(tmp_path / "in", tmp_path / "out", workers, valid_share=0.0, shards="wav", shard_mb=0.2)
    for path in (tmp_path / "in").rglob("*.wav"):
        soundfile.write(path.with_suffix(".flac"), *soundfile.read(path, dtype="int16"))
        path.unlink()
    told = run(tmp_path / "in", tmp_path / "out", workers, valid_share=0.0, shards="wav", shard_mb=0.2)
    train = read_corpus(tmp_path / "out")["train"]
    assert Counter(cut.id for cut in train) == Counter(f"s{i % 4}_u{i:02d}" for i in range(24))
    pieces = [len(list(piece.rows())) for piece in train.pieces]
    assert [piece["utterances"] for piece in told["splits"]["train"]["pieces"]] == pieces and len(pieces) > 4


def test_a_list_of_labels_that_has_changed_is_what_is_written(
    speakers: Path, tmp_path: Path, workers: Executor
) -> None:
    for names in ("s1-1-0 s2-1-3 s3-1-1", "s2-1-3", "s3-1-1"):
        (tmp_path / "ids").write_text(names)
        labelled = (f"mine={tmp_path / 'ids'}",)
        made = run(speakers, tmp_path / "out", workers, valid_share=0.1, labelled=labelled, shards="flac")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").iterdir()}
        splits = read_corpus(tmp_path / "out")
        assert ids(splits)["train-mine"] == {*names.split()} & ids(splits)["train"]
        assert made["splits"]["train-mine"]["utterances"] == len(splits["train-mine"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").iterdir()} == before


def test_a_recording_a_little_longer_than_it_says_is_cut_at_pauses_and_speech(tmp_path: Path) -> None:
    samples = sound(10.0, 3)
    encode(tmp_path / "a.m4a", samples, RATE, "aac")
    for vad in (True, False):
        (found,) = audit(str(tmp_path / "a.m4a"), [Part(1, text=" ")], AuditConfig(max_seconds=9.99), vad)
        assert found.samples >= len(samples) and (vad or len(found.cuts) > 1)


# --- The hash ---------------------------------------------------------------------------------------------------------


def copy_in_reverse(source: Path, target: Path) -> Path:
    for path in sorted(source.rglob("*"), reverse=True):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
    return target


def test_the_hash_depends_on_what_is_in_the_corpus_alone(corpus: Path, tmp_path: Path, workers: Executor) -> None:
    one = prepare(corpus, tmp_path / "one", jobs=1)
    two = prepare(copy_in_reverse(corpus, tmp_path / "deep" / "er" / "in"), tmp_path / "two", jobs=2)
    assert one["content_hash"] == two["content_hash"]
    assert (tmp_path / "one" / "audit.jsonl").read_bytes() == (tmp_path / "two" / "audit.jsonl").read_bytes()
    hashes = {one["content_hash"]}
    for change in ("sample", "transcript", "split", "rate"):
        root = copy_in_reverse(corpus, tmp_path / change)
        path = root / "train-clean" / "101" / "1" / "101-1-0000.flac"
        samples, _ = soundfile.read(path, dtype="int16")
        if change == "sample":
            samples[1000] += 1
            soundfile.write(path, samples, RATE)
        if change == "rate":
            soundfile.write(path, samples, RATE - 1)
        if change == "transcript":
            texts = path.with_name("101-1.trans.txt")
            texts.write_text(texts.read_text().replace("0000 ", "0000 A "))
        if change == "split":
            (root / "train-clean" / "102").rename(root / "dev-clean" / "102")
        hashes.add(run(root, tmp_path / f"out-{change}", workers)["content_hash"])
    assert len(hashes) == 5


# --- Shards -----------------------------------------------------------------------------------------------------------


def load_shard(out: Path, cut: Any) -> np.ndarray:
    """By the place that the cut knows."""
    path = Path(cut.recording.sources[0].source)
    with path.open("rb") as file:
        file.seek(cut.custom["shard_offset"])
        return load_audio(cut, data=file.read(cut.custom["shard_bytes"]))


@pytest.mark.parametrize("encoding", ["flac", "wav", "opus"])
def test_shards_hold_the_same_audio_and_lhotse_reads_them(tmp_path: Path, workers: Executor, encoding: str) -> None:
    root = write_corpus(tmp_path / "in", {"train": 3, "dev": 1}, utterances=3)
    odd = root / "train" / "Jürg 1.5 mono" / f"{'long' * 30}.wav"
    odd.parent.mkdir()
    shutil.copyfile(write_corpus(tmp_path / "w", {"t": 1}, 1, "wav") / "t/101/1/101-1-0000.wav", odd)
    soundfile.write(odd.parent / "44.wav", np.stack([sound(2, 5, 44_100)] * 2, 1), 44_100)
    soundfile.write(odd, soundfile.read(odd, dtype="int16")[0][:-777], RATE)  # else a duplicate
    run(root, tmp_path / "plain", workers)
    summary = run(root, tmp_path / "out", workers, shards=encoding, shard_mb=0.15)
    originals = {cut.id: cut for cuts in read_corpus(tmp_path / "plain").values() for cut in cuts}
    assert len(originals) == 14
    for name, cuts in read_corpus(tmp_path / "out").items():
        theirs = {cut.id: cut for cut in CutSet.from_shar(in_dir=str(tmp_path / "out" / name))}
        mine = {cut.id: cut for cut in cuts}
        assert theirs.keys() == mine.keys()
        for key, cut in mine.items():
            wanted, got = load_audio(originals[key]), load_shard(tmp_path / "out", cut)
            if encoding == "opus":
                assert len(got) == len(wanted) and np.corrcoef(got, wanted)[0, 1] > 0.9
            else:
                exact = originals[key].sampling_rate == RATE
                np.testing.assert_allclose(got, wanted, rtol=0, atol=0 if exact else 2**-15)
            np.testing.assert_array_equal(theirs[key].load_audio()[0], got)
            assert cut.supervisions[0].text == originals[key].supervisions[0].text
    pieces = [piece for split in summary["splits"].values() for piece in split["pieces"]]
    assert sum(piece["utterances"] for piece in pieces) == 14
    for piece in pieces:
        assert piece["bytes"] == (tmp_path / "out" / piece["audio"]).stat().st_size
        with tarfile.open(tmp_path / "out" / piece["audio"]) as tar:
            assert len(tar.getnames()) == 2 * piece["utterances"]
    assert not list((tmp_path / "out").rglob("*partial*"))


def test_shards_are_about_as_large_as_wanted(speakers: Path, tmp_path: Path, workers: Executor) -> None:
    summary = run(speakers, tmp_path / "out", workers, shards="wav", shard_mb=0.3)
    sizes = [piece["bytes"] for piece in summary["splits"]["train"]["pieces"]]
    assert len(sizes) >= 3
    assert all(0.15e6 < size < 0.35e6 for size in sizes[:-1])


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_shards_that_the_disk_cannot_hold_are_refused_before_any_is_written(
    speakers: Path, tmp_path: Path, workers: Executor
) -> None:
    with small_disk(tmp_path / "disk", 1000) as disk:  # 1.5 MB are needed
        with pytest.raises(JobError, match="GB free") as caught:
            run(speakers, disk / "out", workers, shards="wav")
        assert "\n" not in str(caught.value)
        assert not list(disk.rglob("*.tar*"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert run(speakers, disk / "out", workers, shards="wav")["splits"]["train"]["utterances"] == 36


def test_an_unfinished_preparation_goes_on_with_other_options_of_what_follows_the_audit(
    speakers: Path, tmp_path: Path, workers: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "ids").write_text("nobody")
    with small_disk(tmp_path / "disk", 1000) as disk:
        with pytest.raises(UsageError, match="no utterance of train has a transcript and is on the list"):
            run(speakers, disk / "out", workers, labelled=(f"mine={tmp_path / 'ids'}",))
        with pytest.raises(JobError, match="or `shards` opus"):
            run(speakers, disk / "out", workers, shards="wav")
        made = run(speakers, disk / "out", workers, shards="opus")
        assert caplog.text.count("40 of 40 checked already") == 2
        assert {piece["audio"] for piece in made["splits"]["train"]["pieces"]} == {"train/recording.000000.tar"}
        with pytest.raises(UsageError, match=r"already holds a prepared corpus with other options \(shards\)"):
            run(speakers, disk / "out", workers, shards="wav")


# --- The command ------------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> int:
    return cli.main(["prepare", *map(str, arguments), "--jobs", "1"])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    return said[0]


def test_strict_thresholds_and_a_second_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_corpus(tmp_path / "in", {"train": 2}, utterances=2), tmp_path / "out"
    path = root / "train" / "101" / "1" / "101-1-0000.flac"
    soundfile.write(path, soundfile.read(path)[0] + 0.1, RATE)
    assert command(root, out, "--strict") == 1
    assert "the audit found 1 dc_offset, and --strict allows nothing" in one_line(capsys)
    assert findings(out)[0]["reasons"] == ["dc_offset"] and not (out / "corpus.json").exists()
    assert command(root, out, "--max-dc", "0.2") == 2  # that would be another corpus
    assert "holds an unfinished preparation with other options (audit)" in one_line(capsys)
    assert command(root, out) == 0
    assert capsys.readouterr().err == ""

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert command(root, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert command(root, out, "--strict") == 1
    assert "1 dc_offset" in one_line(capsys)
    assert command(root, out, "--seed", "1") == 2
    assert "already holds a prepared corpus" in one_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    assert command(root, tmp_path / "out2", "--max-dc", "0.2", "--silent-db", "-20", "--strict") == 1
    assert "the audit found 4 silent, and" in one_line(capsys)


def short_row(root: Path) -> list[str]:
    (root / "t.csv").write_text("path,text\n" + "a.wav,hallo\n" * 16 + "a.wav\n" + "a.wav,hallo\n" * 5)
    return [str(root / "t.csv")]


def missing_key(root: Path) -> list[str]:
    rows = [{"path": "a.wav", "text": "hallo"} for _ in range(20)]
    del rows[16]["text"]
    write_table(root / "t.jsonl", rows)
    return [str(root / "t.jsonl")]


def late_key(root: Path) -> list[str]:
    write_table(root / "t.jsonl", [{"path": "a.wav"}] * 16 + [{"path": "a.wav", "text": "hallo"}])
    return [str(root / "t.jsonl")]


def half_character(root: Path) -> list[str]:
    (root / "t.jsonl").write_text('{"path": "a.wav", "text": "a"}\n{"path": "a.wav", "text": "\\ud83d"}\n')
    return [str(root / "t.jsonl")]


def no_path_column(root: Path) -> list[str]:
    (root / "t.csv").write_text("file,text\na.wav,hallo\n")
    return [str(root / "t.csv")]


def wrong_column(root: Path) -> list[str]:
    (root / "t.csv").write_text("path,text\na.wav,hallo\n")
    return [str(root / "t.csv"), "--columns", "text=sentence"]


def not_a_number(root: Path) -> list[str]:
    (root / "t.tsv").write_text("path\tstart\na.wav\t0\na.wav\t1,5\n")
    return [str(root / "t.tsv")]


def link_loop(root: Path) -> list[str]:
    (root / "in" / "train" / "101" / "back").symlink_to(root / "in", target_is_directory=True)
    return [str(root / "in")]


def not_utf8(root: Path) -> list[str]:
    Path(os.fsdecode(os.fsencode(root / "in") + b"/M\xfcller.wav")).write_bytes(b"")
    return [str(root / "in")]


def unreadable_text(root: Path) -> list[str]:
    next((root / "in").rglob("*.trans.txt")).write_bytes(b"101-1-0000 M\xdcLLER\n")
    return [str(root / "in")]


def neither(root: Path) -> list[str]:
    return [str(next(root.rglob("*.flac")))]


def nothing(root: Path) -> list[str]:
    return [str(root / "nowhere")]


def no_audio(root: Path) -> list[str]:
    (root / "void").mkdir()
    (root / "void" / "a.txt").write_text("hallo")
    return [str(root / "void")]


def no_hop(root: Path) -> list[str]:
    return [str(root / "in"), "--hop", "0"]


def not_a_length(root: Path) -> list[str]:
    return [str(root / "in"), "--max-seconds", "nan"]


def no_list(root: Path) -> list[str]:
    return [str(root / "in"), "--labelled", "10m", f"mine={root / 'nowhere'}"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_path_column, "no column 'path'"),
        (wrong_column, "no column 'sentence'"),
        (short_row, "row 17: no column 'text'"),
        (missing_key, "row 17: no column 'text'"),
        (late_key, "row 17: column 'text', which the rows before lack"),
        (half_character, "row 2: '\\ud83d' is half a character"),
        (not_a_number, "row 2: expected seconds in 'start', got '1,5'"),
        (link_loop, "symbolic link loop"),
        (not_utf8, "not UTF-8"),
        (unreadable_text, "101-1.trans.txt is not UTF-8 text; convert it"),
        (neither, "expected a folder, or a table"),
        (nothing, "no folder or table"),
        (no_audio, "no audio in"),
        (no_list, "--labelled NAME=FILE"),
        (no_hop, "--hop must be 1 or more"),
        (not_a_length, "--max-seconds must be 1 or more"),
    ],
)
def test_bad_sources_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, said: str
) -> None:
    write_corpus(tmp_path / "in", {"train": 1}, utterances=1)
    source, *options = spoil(tmp_path)
    assert command(source, tmp_path / "out", *options) == 2
    line = one_line(capsys)
    assert line.startswith("w2v2: error: ") and said in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_summary_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], speakers: Path) -> None:
    assert command(speakers, tmp_path / "out") == 0
    path = tmp_path / "out" / "corpus.json"
    corpus = json.loads(path.read_text())
    corpus["splits"]["train"]["speakers"] = [1]
    path.write_text(json.dumps(corpus))
    capsys.readouterr()
    assert command(speakers, tmp_path / "out") == 2
    assert "already holds" in one_line(capsys)


@pytest.mark.parametrize("content", ["[]", "{", '{"schema": 1}'])
def test_somebody_elses_folder_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], speakers: Path, content: str
) -> None:
    (tmp_path / "corpus.json").write_text(content)
    assert command(speakers, tmp_path) == 2
    assert "already holds" in one_line(capsys)
    (tmp_path / "corpus.json").rename(tmp_path / "thesis.json")
    assert command(speakers, tmp_path) == 2
    assert "is not empty" in one_line(capsys)
    assert (tmp_path / "thesis.json").read_text() == content and len(list(tmp_path.iterdir())) == 1


def test_a_source_that_goes_bad_keeps_what_was_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "in", {"train": 2}, utterances=2)
    (tmp_path / "in" / "splits.tsv").write_bytes(b"role\tutt\ntrain\tM\xfcller\n")
    assert command(tmp_path / "in", tmp_path / "out") == 2
    assert "splits.tsv: 'utf-8' codec can't decode" in one_line(capsys)
    link = tmp_path / "in" / "train" / "back"
    link.symlink_to(tmp_path / "in", target_is_directory=True)
    assert command(tmp_path / "in", tmp_path / "out") == 2
    assert "symbolic link loop" in one_line(capsys)
    link.unlink()
    (tmp_path / "in" / "splits.tsv").unlink()
    caught: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("w2v2.preparation.run.log.info", lambda *said: caught.append(said[0] % said[1:]))
        assert command(tmp_path / "in", tmp_path / "out") == 0
    assert "4 of 4 checked already" in caught


def test_a_full_disk_is_one_line_and_what_was_finished_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for i in range(34):  # the size of shards is estimated from train, whose quiet notes take least
        path = tmp_path / "in" / ("train" if i < 4 else "dev") / str(i) / f"{i}.wav"
        path.parent.mkdir(parents=True)
        note = 0.01 * np.sin(np.arange(RATE) * (i + 1) / 50)
        soundfile.write(path, note if i < 4 else rng.uniform(-1, 1, RATE), RATE)
    with small_disk(tmp_path / "disk", 24) as disk:

        def fails() -> None:
            assert command(tmp_path / "in", disk / "out", "--shards") == 1
            line = one_line(capsys)
            assert line.startswith("w2v2: failed: ") and ("full" in line or "No space left" in line)

        fails()  # already for the journal
        subprocess.run(["mount", "-o", "remount,size=900k", str(disk)], check=True)
        fails()
        (train,) = disk.rglob("train/*.tar")
        written = train.stat().st_mtime_ns
        assert (disk / "out" / "audit.jsonl").exists() and not list(disk.rglob("dev/cuts*"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert command(tmp_path / "in", disk / "out", "--shards") == 0
        splits = read_corpus(disk / "out")
        assert {name: len(cuts) for name, cuts in splits.items()} == {"train": 4, "valid": 30}
        assert train.stat().st_mtime_ns == written
        cut = next(iter(splits["valid"]))
        exact, _ = soundfile.read(next((tmp_path / "in" / "dev").rglob(f"{cut.id}.wav")), dtype="float32")
        np.testing.assert_array_equal(load_shard(disk / "out", cut), exact)


@pytest.mark.parametrize("what", ["source", "out"])
def test_a_folder_that_may_not_be_read_or_written_is_one_line(tmp_path: Path, speakers: Path, what: str) -> None:
    command = [sys.executable, "-m", "w2v2.cli.main", "prepare"]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("a superuser may do anything")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o300 if what == "source" else 0o500)
    places = (shut, tmp_path / "out") if what == "source" else (speakers, shut / "out")
    done = subprocess.run([*command, *map(str, places)], capture_output=True, text=True, check=False)
    shut.chmod(0o700)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("w2v2: failed: ") and "Permission denied" in line and str(shut) in line


def test_two_preparations_of_one_folder_do_not_meet(corpus: Path, tmp_path: Path) -> None:
    from w2v2.preparation.journal import open_journal

    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with (
        open_journal(tmp_path / "out" / ".prepare" / "journal.sqlite"),
        pytest.raises(JobError, match="another preparation is at work"),
    ):
        prepare(corpus, tmp_path / "out")
    assert prepare(corpus, tmp_path / "out")["splits"]["train"]["utterances"] == 16


def test_a_link_to_itself_costs_itself_alone(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", {"train": 2}, utterances=1)
    (tmp_path / "in" / "train" / "a.wav").symlink_to("a.wav")
    assert command(tmp_path / "in", tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "audit.jsonl").read_text().splitlines()]
    assert {row["path"]: row["status"] for row in rows}["train/a.wav"] == "rejected"
    assert sum(row["status"] != "rejected" for row in rows) == 2
