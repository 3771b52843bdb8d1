"""Files whose headers say less than the truth, or nothing, or more; formats that cannot seek; containers; damage."""

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import RATE, sound

from w2v2.data import child, containers
from w2v2.data.audio import FORMATS, AudioError, AudioFile, TruncatedError, load_audio
from w2v2.data.corpora import read_corpus
from w2v2.data.tables import table_rows
from w2v2.errors import UsageError
from w2v2.inference.recordings import find_sources
from w2v2.preparation.audit import audit
from w2v2.preparation.config import AuditConfig, PrepareConfig
from w2v2.preparation.findings import Part
from w2v2.preparation.run import prepare

av = pytest.importorskip("av")


def read(path: Path) -> np.ndarray:
    """The whole file, (samples, channels), which is also what is read from any place on, and of an open file."""
    with AudioFile(str(path)) as file:
        samples = file.read()
        file.check_end()
        assert abs(len(samples) - file.frames) <= file.slack
        for start in (len(samples) // 2, len(samples) // 3, len(samples) - 100):  # forward and back
            file.seek(start)
            np.testing.assert_allclose(file.read(1000), samples[start : start + 1000], atol=1e-3)
    with path.open("rb") as stream, AudioFile(stream) as file:
        np.testing.assert_array_equal(file.read(), samples)
    return samples


def reasons(path: Path, *parts: Part) -> list[list[str]]:
    """What the audit says of the parts of a file, or of all of it."""
    findings = audit(str(path), parts or [Part(1)], AuditConfig())
    return [[reason for reason, _ in finding.reasons] for finding in findings]


def by_ffmpeg(path: Path) -> int:
    """Samples that FFmpeg decodes."""
    with av.open(str(path)) as file:
        return sum(frame.samples for frame in file.decode(audio=0))


def write(path: Path, samples: np.ndarray, **options: Any) -> bytes:
    """A file by libsndfile; returns its bytes."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".opus":
        options = {"format": "OGG", "subtype": "OPUS"}
    soundfile.write(path, samples, options.pop("rate", RATE), **options)
    return path.read_bytes()


def encode(
    path: Path,
    samples: np.ndarray,
    codec: str,
    *,
    rate: int = RATE,
    bit_rate: int | None = None,
    gap: tuple[int, int] = (0, 0),
    **options: str,
) -> None:
    """A file by FFmpeg; from a sample on, time stamps are later by so many."""
    with av.open(str(path), "w", options={name: value for name, value in options.items() if value}) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        packets = []
        for part in av.AudioResampler(format=stream.format, layout="mono", rate=rate).resample(frame):
            packets += stream.encode(part)
        for packet in packets + list(stream.encode(None)):
            if packet.pts is not None and packet.pts * packet.time_base * rate >= gap[0]:
                packet.pts += round(gap[1] / (packet.time_base * rate))
                packet.dts += round(gap[1] / (packet.time_base * rate))
            file.mux(packet)


# --- Headers that are wrong -------------------------------------------------------------------------------------------


def test_mp3_of_variable_bit_rate_without_a_header_is_read_to_its_end(tmp_path: Path) -> None:
    path, joined = tmp_path / "a.mp3", b""
    for number, bits in enumerate((160_000, 16_000, 32_000)):  # the first frames are the largest
        encode(path, sound(4, number), "mp3", bit_rate=bits, write_xing="0", id3v2_version="0")
        joined += path.read_bytes()
    path.write_bytes(joined)
    with soundfile.SoundFile(path) as file:  # what it believes
        assert file.frames < 8 * RATE
    assert len(read(path)) == by_ffmpeg(path) == pytest.approx(12.3 * RATE, rel=0.03)
    whole, row, past = audit(str(path), [Part(1), Part(2, 10.0, 11.0), Part(3, 60.0, 61.0)], AuditConfig())
    assert (whole.reasons, row.reasons, row.samples) == ([], [], RATE)
    assert [reason for reason, _ in past.reasons] == ["truncated"]


def test_joined_mp3s_are_read_as_players_do(tmp_path: Path) -> None:
    parts = [write(tmp_path / "a.mp3", sound(2 + number, number)) for number in range(3)]
    (tmp_path / "a.mp3").write_bytes(b"".join(parts))
    assert len(read(tmp_path / "a.mp3")) == pytest.approx(by_ffmpeg(tmp_path / "a.mp3"), abs=2 * 576)
    tag = b"ID3\x04\0\0" + bytes((0, 0, 2, 0)) + bytes(256)
    (tmp_path / "b.mp3").write_bytes(tag + parts[0] + tag + parts[1] + b"TAG".ljust(128))
    assert len(read(tmp_path / "b.mp3")) == pytest.approx(5 * RATE, abs=0.2 * RATE)
    (tmp_path / "c.mp3").write_bytes(tag + parts[0] + b"TAG".ljust(128))  # one alone is what it was
    assert len(read(tmp_path / "c.mp3")) == 2 * RATE


@pytest.mark.parametrize("suffix", ["flac", "ogg", "opus", "wav"])
@pytest.mark.parametrize("seconds", [(2, 3, 1), (2, 2)])
def test_joined_files_are_read_one_after_the_other(tmp_path: Path, suffix: str, seconds: tuple[int, ...]) -> None:
    path, parts, encoded = tmp_path / f"a.{suffix}", [], b""
    for number, length in enumerate(seconds):
        encoded += write(path, sound(length, number if len(seconds) > 2 else 0))
        parts.append(soundfile.read(path, dtype="float32", always_2d=True)[0])
    path.write_bytes(encoded)
    np.testing.assert_array_equal(read(path), np.concatenate(parts))
    start = seconds[0] + 0.5
    (row,) = audit(str(path), [Part(1, start, start + 1)], AuditConfig())
    assert (row.reasons, row.samples, row.total) == ([], RATE, len(np.concatenate(parts)))
    path.write_bytes(encoded[:-900])
    assert reasons(path) == [["truncated"]]


def test_joined_files_that_differ_in_rate_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    path.write_bytes(write(path, sound(1, 0)) + write(path, sound(1, 0), rate=8_000))
    assert reasons(path) == [["unreadable"]]
    with pytest.raises(AudioError, match="16000 Hz with 1 channels, then 8000 Hz"):
        AudioFile(str(path))


def with_length(data: bytes, length: int) -> bytes:
    """A WAV file of libsndfile whose header announces so many bytes."""
    assert data[36:40] == b"data"
    return data[:40] + struct.pack("<I", length) + data[44:]


@pytest.mark.parametrize("length", [2 * RATE, 0, 2_000_000_000, 0x7FFF_F000, 0x8000_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("subtype", ["PCM_16", "ULAW"])
def test_a_wav_is_read_to_its_end_whatever_its_header_says(tmp_path: Path, length: int, subtype: str) -> None:
    path = tmp_path / "a.wav"
    data = write(path, sound(4, 0), subtype=subtype)
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0]
    at = data.index(b"data")
    path.write_bytes(data[: at + 4] + struct.pack("<I", length) + data[at + 8 :])
    np.testing.assert_array_equal(read(path), whole)
    assert reasons(path, Part(1), Part(2, 2.0, 4.0)) == [[], []]


def test_what_follows_the_samples_of_a_wav_is_not_heard(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    data = write(path, sound(1, 0))
    note = b"LIST" + struct.pack("<I", 8000) + b"INFO".ljust(8000, b"x")
    for rest in (note, note + note, b"TAG".ljust(5000, b"x"), bytes(4096), b"odds and ends"):
        path.write_bytes(data + rest)
        assert len(read(path)) == RATE, rest[:4]
    write(path, np.zeros(0))
    assert reasons(path) == [["empty"]]
    path.write_bytes(with_length(data, 6 * RATE))  # and what is announced and does not come is missed
    assert reasons(path) == [["truncated"]]


def test_a_wav_above_4_gib_is_read_to_its_end(tmp_path: Path) -> None:
    path, size = tmp_path / "a.wav", (1 << 32) + 40_000  # bytes of samples, which 32 bits do not count
    header = write(path, np.zeros(0))
    end = (sound(1, 0) * 32_767).astype("<i2")
    with path.open("wb") as file:  # sparse: next to nothing on the disk
        file.write(with_length(header, size % (1 << 32)))
        file.seek(len(header) + size - 2 * len(end))
        file.write(end.tobytes())
    with AudioFile(str(path)) as file:
        assert file.frames == size // 2 and not file.missing
        file.seek(file.frames - len(end))
        np.testing.assert_array_equal(file.read()[:, 0], end / np.float32(32_768))
    hours = size / 2 / RATE
    assert reasons(path, Part(1, hours - 1, hours)) == [[]]


@pytest.mark.parametrize("announced", [0, RATE])
@pytest.mark.parametrize("blocks", ["fixed", "variable"])
def test_a_flac_from_a_pipe_is_read_to_its_end(tmp_path: Path, announced: int, blocks: str) -> None:
    path = tmp_path / "a.flac"
    if blocks == "fixed":
        write(path, sound(4, 0))
    else:
        encode(path, sound(4, 0), "flac", compression_level="8")
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0]
    data = bytearray(path.read_bytes())
    data[21:26] = (int.from_bytes(data[21:26], "big") >> 36 << 36 | announced).to_bytes(5, "big")
    data[26:42] = bytes(16)  # the check sum of all samples
    path.write_bytes(data)
    np.testing.assert_array_equal(read(path), whole)
    assert reasons(path) == [[]]
    path.write_bytes(data[: len(data) // 2])
    assert reasons(path) == [["truncated"]]


def ogg_crc(page: bytes) -> int:
    """RFC 3533, bit by bit."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 & 0xFFFF_FFFF ^ (0x04C1_1DB7 if crc >> 31 else 0)
    return crc


@pytest.mark.parametrize("suffix", ["ogg", "opus"])
def test_an_ogg_without_an_end_mark_is_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    data = bytearray(write(path, sound(4, 0)))
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0]
    at = data.rfind(b"OggS")
    assert data[at + 5] & 4
    data[at + 5] &= ~4
    data[at + 22 : at + 26] = bytes(4)
    data[at + 22 : at + 26] = struct.pack("<I", ogg_crc(bytes(data[at:])))
    path.write_bytes(data)
    np.testing.assert_array_equal(read(path), whole)
    assert reasons(path) == [[]]


CUT_OFF = {
    "a.aiff": {},
    "float.aiff": {"subtype": "FLOAT"},
    "a.aif": {"subtype": "PCM_24", "format": "AIFF"},
    "a.au": {},
    "law.au": {"subtype": "ULAW"},
    "a.sph": {"format": "NIST"},
    "a.rf64": {"format": "RF64"},
    "a.w64": {"format": "W64"},
    "a.caf": {"format": "CAF"},
    "gsm.wav": {"subtype": "GSM610"},
    "adpcm.wav": {"subtype": "MS_ADPCM"},
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_file_of_any_kind_that_breaks_off_is_truncated(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = write(path, sound(4, 0), **CUT_OFF[name])
    assert reasons(path) == [[]] and len(read(path)) >= 4 * RATE
    for share in (0.3, 0.6, 0.97):
        path.write_bytes(data[: round(share * len(data))])
        assert reasons(path) == [["truncated"]], share
        with pytest.raises(TruncatedError, match="breaks off"):
            read(path)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32"])
def test_formats_that_cannot_seek_are_read_from_any_place(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "call.wav"
    write(path, sound(6, 0), rate=8_000, subtype=subtype)
    whole = read(path)
    parts = [Part(1), Part(2, 4.0, 5.0), Part(3, 1.0, 2.0), Part(4, 11.0)]
    findings = audit(str(path), parts, AuditConfig())
    assert [finding.reasons for finding in findings] == [[], [], [], []]
    assert [finding.samples for finding in findings] == [len(whole), 8_000, 8_000, len(whole) - 88_000]


# --- Containers -------------------------------------------------------------------------------------------------------


def beep(seconds: float, at: float, rate: int = 48_000) -> np.ndarray:
    """Noise, but for a loud beep of a tenth of a second."""
    samples = 0.001 * np.random.default_rng(0).standard_normal(round(seconds * rate))
    start = round(at * rate)
    samples[start : start + rate // 10] += 0.5 * np.sin(2 * np.pi * 1000 / rate * np.arange(rate // 10))
    return samples


def beeps(samples: np.ndarray, rate: int = 48_000) -> list[float]:
    """When beeps begin, in seconds."""
    loud = np.flatnonzero(np.abs(samples) > 0.1)
    return [round(float(place) / rate, 2) for i, place in enumerate(loud) if not i or place - loud[i - 1] > rate // 4]


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("mkv", "aac"),
        ("mkv", "flac"),
        ("mka", "libopus"),
        ("webm", "libopus"),
        ("avi", "mp3"),
        ("ts", "aac"),
        ("wma", "ac3"),
        ("3gp", "aac"),
        ("mov", "pcm_s16le"),
        ("m4a", "alac"),
        ("aac", "aac"),
    ],
)
def test_containers_are_read_and_found_in_folders(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"a.{suffix}"
    encode(path, beep(4, 2.5), codec, rate=48_000)
    samples = read(path)
    assert len(samples) / 48_000 == pytest.approx(4, abs=0.1)
    assert beeps(samples[:, 0]) == [pytest.approx(2.5, abs=0.06)]  # some count the encoder's delay, others do not
    assert reasons(path, Part(1), Part(2, 2.0, 3.0)) == [[], []]
    assert [source.path for source in find_sources([str(tmp_path)])[0]] == [str(path)]
    assert suffix != "mkv" or path.suffix in FORMATS


def test_amr_is_read(tmp_path: Path) -> None:
    frame = b"\x3c" + np.random.default_rng(0).bytes(31)  # 12.2 kbit/s
    (tmp_path / "a.amr").write_bytes(b"#!AMR\n" + 50 * frame)
    with AudioFile(str(tmp_path / "a.amr")) as file:
        assert (file.rate, len(file.read())) == (8_000, 8_000)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_times_follow_the_packets(tmp_path: Path, suffix: str) -> None:
    late, hole = tmp_path / f"late.{suffix}", tmp_path / f"hole.{suffix}"
    encode(late, beep(4, 1), "aac", rate=48_000, gap=(-10_000, 95_040))
    samples = read(late)
    assert beeps(samples[:, 0]) == [pytest.approx(2.98, abs=0.03)] and not samples[: int(1.9 * 48_000)].any()
    encode(hole, np.concatenate([beep(2, 1), beep(2, 1)]), "aac", rate=48_000, gap=(96_000, 240_000))
    samples = read(hole)
    assert len(samples) / 48_000 == pytest.approx(9, abs=0.1)
    assert beeps(samples[:, 0]) == [pytest.approx(1, abs=0.03), pytest.approx(8, abs=0.03)]
    assert not samples[int(2.2 * 48_000) : int(6.8 * 48_000)].any()
    assert reasons(hole, Part(1), Part(2, 7.5, 8.5)) == [[], []]


def test_a_hole_of_days_is_refused(tmp_path: Path) -> None:
    encode(tmp_path / "a.mkv", beep(4, 1), "aac", rate=48_000, gap=(96_000, 10**5 * 48_000))
    with pytest.raises(AudioError, match="no audio for"), AudioFile(str(tmp_path / "a.mkv")) as file:
        file.read()


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "aac"), ("avi", "mp3"), ("mp4", "aac")])
def test_a_container_that_breaks_off_is_truncated(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"a.{suffix}"
    encode(path, sound(8, 0), codec, movflags="faststart" if suffix == "mp4" else "")
    assert reasons(path) == [[]]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    assert reasons(path) == [["truncated"]]


def test_without_pyav_a_container_says_what_it_needs(tmp_path: Path) -> None:
    encode(tmp_path / "a.webm", sound(1, 0), "libopus")
    write(tmp_path / "b.wav", sound(1, 0))
    program = (
        "import sys; sys.modules['av'] = None\n"
        "from w2v2.preparation.audit import audit\n"
        "from w2v2.preparation.config import AuditConfig\n"
        "from w2v2.preparation.findings import Part\n"
        "print([audit(path, [Part(1)], AuditConfig())[0].reasons for path in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.webm"), str(tmp_path / "b.wav")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[('unreadable', 'Matroska needs PyAV: pip install av')], []]"


# --- Channels and levels ----------------------------------------------------------------------------------------------


def prepared(source: Path, out: Path, **options: Any) -> dict[str, list[Any]]:
    """The cuts of each split of a corpus."""
    prepare(source, out, PrepareConfig(**options))
    return {name: list(cuts) for name, cuts in read_corpus(out).items()}


def test_a_speaker_on_each_channel_is_chosen_by_the_table(tmp_path: Path) -> None:
    speakers = np.stack([sound(4, 0), sound(4, 1)], 1)
    write(tmp_path / "call.wav", speakers)
    (tmp_path / "t.csv").write_text(
        "path,start,end,channel,speaker,note\ncall.wav,,,1,A,x\ncall.wav,,,2,B,x\ncall.wav,1,2,2,B,x\n"
        "call.wav,1,2,,C,x\ncall.wav,,,3,C,x\n"
    )
    for encoding in ("", "flac"):
        out = tmp_path / f"out{encoding}"
        splits = prepared(tmp_path / "t.csv", out, shards=encoding, valid_share=0.0)
        cuts = {(cut.supervisions[0].speaker, cut.duration): cut for cut in splits["train"]}
        assert set(cuts) == {("A", 4.0), ("B", 4.0), ("B", 1.0), ("C", 1.0)}
        if not encoding:
            assert {cut.id for cut in cuts.values()} == {
                "call-ch1",
                "call-ch2",
                "call-1.000-2.000-ch2",
                "call-1.000-2.000",
            }
        for key, expected in (
            (("A", 4.0), speakers[:, 0]),
            (("B", 4.0), speakers[:, 1]),
            (("B", 1.0), speakers[RATE : 2 * RATE, 1]),
            (("C", 1.0), speakers[RATE : 2 * RATE].mean(1)),
        ):
            cut = cuts[key]
            data = None
            if encoding:
                with (out / "train/recording.000000.tar").open("rb") as file:
                    file.seek(cut.custom["shard_offset"])
                    data = file.read(cut.custom["shard_bytes"])
            np.testing.assert_allclose(load_audio(cut, data=data), expected, atol=1e-4)
        audit_lines = [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]
        assert audit_lines[-1]["reasons"] == ["unreadable"] and "no channel 3, only 2" in audit_lines[-1]["detail"]
    (tmp_path / "t.csv").write_text("path,channel\ncall.wav,0\n")
    with pytest.raises(UsageError, match="row 1: expected a channel from 1 in 'channel', got '0'"):
        prepared(tmp_path / "t.csv", tmp_path / "bad")


def test_columns_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text("path,sentence,age\na.wav,HALLO,3\n")
    assert [row.text for row in table_rows(tmp_path / "t.csv")] == [None]
    assert caplog.messages == [
        f"{tmp_path / 't.csv'}: nobody reads the columns sentence, age; name them with `columns`"
    ]


def test_the_rows_of_a_recording_are_never_in_two_splits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = ["path,start,end,speaker"]
    for number in range(8):
        write(tmp_path / f"{number}.wav", sound(4, number))
        for start in range(4):  # speakers of neighbouring recordings, so that some recordings hang together
            speaker = number // 2 if number < 6 else rng.integers(10, 14)
            rows.append(f"{number}.wav,{start},{start + 1},{'' if start == 3 and number > 5 else speaker}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    for seed in range(5):
        splits = prepared(tmp_path / "t.csv", tmp_path / f"out{seed}", valid_share=0.3, test_share=0.2, seed=seed)
        assert set(splits) == {"train", "valid", "test"}
        for key in (lambda cut: cut.recording.sources[0].source, lambda cut: cut.supervisions[0].speaker or cut.id):
            groups = [{key(cut) for cut in cuts} for cuts in splits.values()]
            assert sum(map(len, groups)) == len(set.union(*groups))
    (tmp_path / "one.csv").write_text("\n".join(row for row in rows if not row.startswith(tuple("1234567"))))
    assert set(prepared(tmp_path / "one.csv", tmp_path / "one")) == {"train"}


def test_channels_that_cancel_each_other_out_are_told_of_and_the_first_is_heard(tmp_path: Path) -> None:
    samples = sound(4, 0)
    write(tmp_path / "in" / "a.flac", np.stack([samples, -samples], 1))
    write(tmp_path / "in" / "b.flac", np.stack([samples, np.roll(samples, 5000)], 1))
    (cut,) = (
        cut
        for cut in prepared(tmp_path / "in", tmp_path / "out", valid_share=0.0)["train"]
        if "a.flac" in str(cut.recording)
    )
    np.testing.assert_allclose(load_audio(cut), samples, atol=1e-4)
    assert reasons(tmp_path / "in" / "a.flac", Part(1), Part(2, channel=2)) == [["out_of_phase"], []]
    assert reasons(tmp_path / "in" / "b.flac") == [[]]


def test_samples_beyond_full_scale_keep_their_shape_in_shards(tmp_path: Path) -> None:
    samples = sound(4, 0)
    write(tmp_path / "in" / "a.wav", samples * 32_767, subtype="FLOAT")
    write(tmp_path / "in" / "b.wav", sound(4, 1))
    assert reasons(tmp_path / "in" / "a.wav") == [["out_of_range"]]
    for encoding in ("flac", "wav", "opus"):
        splits = prepared(tmp_path / "in", tmp_path / encoding, shards=encoding, valid_share=0.0)
        (cut,) = (cut for cut in splits["train"] if cut.id == "a")
        with (tmp_path / encoding / "train/recording.000000.tar").open("rb") as file:
            file.seek(cut.custom["shard_offset"])
            loaded = load_audio(cut, data=file.read(cut.custom["shard_bytes"]))
        expected = samples * 32_767
        assert np.corrcoef(loaded[: len(expected)], expected)[0, 1] > 0.99 and np.abs(loaded).max() > 5_000
        if encoding != "opus":
            np.testing.assert_allclose(loaded, expected, atol=1.0)


# --- Damage -----------------------------------------------------------------------------------------------------------


def seeds(folder: Path) -> Iterator[Path]:
    """One file of each kind."""
    for suffix in ("wav", "flac", "mp3", "ogg", "opus", "aiff", "au", "caf"):
        write(folder / f"a.{suffix}", sound(1, 0))
        yield folder / f"a.{suffix}"
    for suffix, codec in (("m4a", "aac"), ("mp4", "alac"), ("mkv", "libopus"), ("ts", "aac"), ("avi", "mp3")):
        encode(folder / f"a.{suffix}", sound(1, 0), codec)
        yield folder / f"a.{suffix}"


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, removed, or doubled, most of them where headers are."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 12)):
        at = int(rng.integers(0, len(changed) if rng.random() < 0.5 else min(len(changed), 700)))
        kind = rng.integers(0, 5)
        if kind == 0:
            changed[at] = rng.integers(0, 256)
        elif kind == 1:
            changed[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"])
        elif kind == 2:
            del changed[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            changed[at:at] = changed[at : at + int(rng.integers(1, 64))]
        elif kind == 4 and rng.random() < 0.2:
            del changed[at:]
        if not changed:
            return b""
    return bytes(changed)


MUTANTS = int(os.environ.get("W2V2_MUTANTS", "8"))  # of each kind


def test_damaged_files_of_every_kind_cost_nothing_but_themselves(tmp_path: Path) -> None:
    (tmp_path / "seeds").mkdir()
    rng = np.random.default_rng(1)
    for seed in list(seeds(tmp_path / "seeds")):
        for number in range(MUTANTS):
            path = tmp_path / f"{number}{seed.suffix}"
            path.write_bytes(mutate(seed.read_bytes(), rng))
            (finding,) = audit(str(path), [Part(1)], AuditConfig())  # no exception, no end of the process
            assert finding.samples < 1e8 and all("\n" not in detail for _, detail in finding.reasons)
        assert reasons(seed) == [[]]


def test_an_mp4_of_37_channels_and_one_whose_decoder_dies_are_refused_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, good = tmp_path / "a.m4a", tmp_path / "b.m4a"
    encode(path, sound(1, 0), "alac")
    encode(good, sound(1, 0), "alac")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"alac")  # of the decoder's own header: 4 bytes of version, 9 of settings, channels
    data[at + 17] = 37
    path.write_bytes(data)
    assert reasons(path) == [["unreadable"]] and reasons(good) == [[]]
    with AudioFile(str(good)) as file:
        assert isinstance(file.file, containers.ContainerFile)
        file.file.process.popen.kill()
        with pytest.raises(AudioError, match="crashed"):
            file.read()
    assert reasons(good) == [[]]
    monkeypatch.setattr(child, "PATIENCE_SECONDS", 0.0)
    assert reasons(good) == [["unreadable"]]
    monkeypatch.undo()
    assert reasons(good) == [[]]


def test_a_decoder_that_is_ended_while_it_waits_costs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    encode(path, sound(1, 0), "alac")
    for _ in range(20):
        with AudioFile(str(path)) as file:
            assert isinstance(file.file, containers.ContainerFile)
            process = file.file.process.popen
        process.kill()  # it seems to run for a moment
        with AudioFile(str(path)) as file:
            assert len(file.read()) == file.frames


@pytest.mark.parametrize("rate", [16, 10_000_000])
def test_rates_that_no_recording_has_are_refused(tmp_path: Path, rate: int) -> None:
    data = write(tmp_path / "a.wav", sound(1, 0))
    (tmp_path / "a.wav").write_bytes(data[:24] + struct.pack("<I", rate) + data[28:])
    with pytest.raises(AudioError, match=f"{rate} Hz, expected 1000 to 768000"):
        AudioFile(str(tmp_path / "a.wav"))


def test_samples_without_a_header_and_a_page_of_text_are_refused_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes((sound(1, 0) * 20_000).astype("<i2").tobytes())
    (tmp_path / "a.mp3").write_text("<!DOCTYPE html>\n<html><body>404 Not Found</body></html>")
    with pytest.raises(AudioError, match="samples without a header"):
        AudioFile(str(tmp_path / "a.raw"))
    with pytest.raises(AudioError, match="no audio but text, which begins with '<!DOCTYPE html>'"):
        AudioFile(str(tmp_path / "a.mp3"))
    whole = write(tmp_path / "a.wav", sound(1, 0))
    (tmp_path / "b.raw").write_bytes(whole)  # it has one
    assert len(read(tmp_path / "b.raw")) == RATE
    with AudioFile(io.BytesIO(whole)) as file:
        assert len(file.read()) == RATE
