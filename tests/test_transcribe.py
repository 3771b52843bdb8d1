"""Windows against the whole, streams against one shot, batches against single files; and what is said of bad input."""

import io
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import sound
from hypothesis import given, settings
from hypothesis import strategies as st

from w2v2 import recipes
from w2v2.checkpoint.native import save_weights
from w2v2.cli.main import main
from w2v2.data.audio import AudioError, AudioFile, mix_down, resample, stream_audio
from w2v2.decoding.config import BeamConfig
from w2v2.decoding.decoder import make_decoder
from w2v2.decoding.greedy import Greedy
from w2v2.errors import JobError, UsageError
from w2v2.inference.align import align
from w2v2.inference.jobs import Work, in_processes
from w2v2.inference.recognizer import Recognizer, load_recognizer
from w2v2.inference.recordings import Failure, find_sources, source_of
from w2v2.inference.transcribe import Layout, cut_windows, find_pause, transcribe
from w2v2.inference.transcripts import Transcript
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.serial import save_config
from w2v2.text.vocabulary import Vocabulary
from w2v2.training.config import FinetuneConfig

RATE = 16_000
PADDED, BARE = (4, 1, 1, 1, 1, 0, 0), (0,) * 7
VOCABULARY = Vocabulary.from_texts(["ABCDEFGH"])


def narrow(**kwargs: object) -> ContrastiveConfig:
    """A model of the standard stack, as narrow as can be, that sees only so far: no attention, no norm over time."""
    config = recipes.tiny_ctc().model
    shape = {
        "n_layer": 0, "n_embd": 32, "ffn_dim": 32, "conv_channels": (8, 8, 8, 16, 16, 16, 16), "conv_norm": "layer",
        "utterance_norm": False, "pos_conv_kernel": 16, "pos_conv_groups": 4,
    }  # fmt: skip
    for name, value in {**shape, **kwargs}.items():
        setattr(config, name, value)
    return config


def recognizer(**kwargs: object) -> Recognizer:
    """Random weights, scaled up so that the labels change from frame to frame."""
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(narrow(**kwargs), len(VOCABULARY.labels))
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
        model.lm_head.bias[VOCABULARY.blank] += 1.5
        model.lm_head.bias[VOCABULARY.unknown] -= 100
    return Recognizer(model.eval(), VOCABULARY)


def blocks(audio: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(audio), size):
        yield audio[start : start + size]


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(0, 3 * 8000 + 400),
    size=st.integers(1, 20_000),
    paddings=st.sampled_from([PADDED, BARE]),
    context=st.sampled_from([0.1, 0.14, 0.2]),
)
def test_windows_keep_exactly_the_frames_of_the_whole(
    length: int, size: int, paddings: tuple[int, ...], context: float
) -> None:
    config = narrow(conv_paddings=paddings)
    audio = np.arange(length, dtype=np.float32)
    windows = list(cut_windows(blocks(audio, size), config, Layout(0.5, context)))
    assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
    frame = 0
    for number, window in enumerate(windows):
        start = int(window.audio[0]) if len(window.audio) else 0
        assert len(window.audio) <= 8000
        assert start == 320 * (frame - window.skip)  # its frame `skip` is the next of the whole
        assert window.skip == (0 if number == 0 else round(context * 50))
        available = config.frames([len(window.audio)])[0]
        assert window.skip + window.keep <= available
        assert window.last or window.skip + window.keep <= available - 3  # none that sees the window's end
        frame += window.keep
    assert frame == config.frames([length])[0]


def test_no_more_audio_is_taken_than_the_next_window_needs() -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += RATE
            yield np.zeros(RATE, np.float32)

    windows = cut_windows(endless(), narrow(), Layout(30.0, 3.0))
    for number in range(200):
        window = next(windows)
        assert len(window.audio) == 30 * RATE
        assert taken <= (24 * number + 30 + 1) * RATE


@pytest.mark.parametrize("paddings", [PADDED, BARE])
@pytest.mark.parametrize("seconds", [1.0, 2.0, 2.01, 3.99, 7.3])
def test_stitched_log_probabilities_are_those_of_the_whole_where_the_context_suffices(
    tmp_path: Path, paddings: tuple[int, ...], seconds: float
) -> None:
    model = recognizer(conv_paddings=paddings)
    audio = sound(seconds, 1)
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    found: list[torch.Tensor] = []

    def keep(log_probs: torch.Tensor):  # type: ignore[no-untyped-def]
        found.append(log_probs)
        return Greedy(VOCABULARY)(log_probs)

    list(transcribe(model, [source_of(str(tmp_path / "a.wav"))], keep, layout=Layout(2.0, 0.3), stretch=math.inf))
    torch.testing.assert_close(found, model.emissions([torch.from_numpy(audio)]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("stretch", [2.5, 5.0, math.inf])
def test_decoding_in_stretches_changes_no_word_and_no_time(tmp_path: Path, stretch: float) -> None:
    model = recognizer()
    audio = sound(14.0, 2)
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    source = source_of(str(tmp_path / "a.wav"))
    (whole,) = transcribe(model, [source], Greedy(VOCABULARY), layout=Layout(60.0), stretch=math.inf)
    (found,) = transcribe(model, [source], Greedy(VOCABULARY), layout=Layout(2.0, 0.5), stretch=stretch)
    assert isinstance(found, Transcript) and isinstance(whole, Transcript)
    assert len(whole.words) > 20
    assert found.text == whole.text == Greedy(VOCABULARY)(model.emissions([torch.from_numpy(audio)])[0]).text
    assert [(w.text, w.start, w.end) for w in found.words] == [
        (w.text, pytest.approx(w.start), pytest.approx(w.end)) for w in whole.words
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 0, 2, 2, 3, 4]), min_size=2, max_size=40))
def test_a_pause_is_a_place_where_greedy_decoding_may_be_cut(ids: list[int]) -> None:
    log_probs = torch.zeros(len(ids), len(VOCABULARY.labels))
    log_probs[torch.arange(len(ids)), ids] = 5.0
    cut = find_pause(log_probs, VOCABULARY)
    assert len(ids) // 2 <= cut <= len(ids) or set(ids) & {3, 4} == set(ids)
    decode = Greedy(VOCABULARY)
    pieces = [decode(part).text for part in (log_probs[:cut], log_probs[cut:])]
    pauses = [i for i in range(len(ids) // 2, len(ids)) if ids[i] == 2]
    if pauses and (set(ids[pauses[-1] :]) & {3, 4}):  # a word ends and another one begins in the second half
        assert " ".join(piece for piece in pieces if piece) == decode(log_probs).text


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("length", [0, 1, 37, 4_000, 50_001])
def test_a_stream_is_what_one_shot_gives(rate: int, length: int) -> None:
    samples = 0.3 * np.random.default_rng(0).standard_normal((length, 2)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    file.seek(0)
    with AudioFile(file) as opened:
        found = np.concatenate(list(stream_audio(opened, seconds=0.3)))
    np.testing.assert_allclose(found, resample(mix_down(samples), rate), atol=1e-6)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several formats, rates and lengths; one longer than a window, one silent, one of 20 ms, an empty one."""
    root = tmp_path_factory.mktemp("recordings")
    for i, (name, seconds, rate) in enumerate(
        [("a.wav", 1.3, 16_000), ("b.flac", 7.1, 8_000), ("deep/c.mp3", 2.2, 44_100), ("deep/d.ogg", 3.0, 48_000)]
    ):
        (root / name).parent.mkdir(exist_ok=True)
        soundfile.write(root / name, np.stack([sound(seconds, i, rate)] * 2, 1), rate)
    soundfile.write(root / "e.wav", np.zeros(16_000), RATE)
    soundfile.write(root / "f.wav", sound(0.02, 9), RATE)
    soundfile.write(root / "g.wav", np.zeros(0), RATE)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with attention, GroupNorm and statistics over the utterance, as models have them."""
    folder = tmp_path_factory.mktemp("run")
    made = recognizer(n_layer=1, n_head=4, conv_norm="group:8", utterance_norm=True, normalize_audio=True)
    config = recipes.tiny_ctc()
    config.model = made.model.config
    assert isinstance(config, FinetuneConfig)
    save_config(config, folder / "config.json")
    made.vocabulary.save(folder / "vocab.json")
    save_weights(made.model, folder)
    return folder


@pytest.mark.parametrize("size", [3, 16])
def test_text_and_times_do_not_depend_on_the_batch(run: Path, recordings: Path, size: int) -> None:
    model = load_recognizer(run)
    sources, failures = find_sources([str(recordings)])
    assert not failures and len(sources) == 7
    single, batched = (
        list(transcribe(model, sources, Greedy(model.vocabulary), layout=Layout(2.0, 0.4), batch_size=n))
        for n in (1, size)
    )
    assert len("".join(t.text for t in single if isinstance(t, Transcript))) > 50
    assert [*map(tell, single)] == [*map(tell, batched)]


def tell(result: Transcript | Failure) -> tuple[object, ...]:
    """What of a transcript is equal to the bit."""
    assert isinstance(result, Transcript)
    return result.name, result.text, result.seconds, [(w.text, w.start, w.end) for w in result.words]


class Overheard(Recognizer):
    """Notes how much audio comes at once."""

    def emissions(self, audio: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        batches.append([len(row) for row in audio])
        return super().emissions(audio)


batches: list[list[int]] = []


@pytest.mark.parametrize("size", [1, 2])
def test_short_recordings_are_heard_together_but_no_more_than_whole_windows_are(
    run: Path, tmp_path: Path, size: int
) -> None:
    rng = np.random.default_rng(0)
    for i, seconds in enumerate([*rng.uniform(0.05, 1.5, 20), *[0.03] * 60, 5.0, 2.0, 0.001]):
        soundfile.write(tmp_path / f"{i:02}.wav", sound(float(seconds), i), RATE, subtype="FLOAT")
    sources, _ = find_sources([str(tmp_path)])
    model, layout = load_recognizer(run), Layout(2.0, 0.4)
    decoder = Greedy(model.vocabulary)
    alone = [tell(next(transcribe(model, [source], decoder, layout=layout))) for source in sources]
    batches.clear()
    overheard = Overheard(model.model, model.vocabulary)
    assert [*map(tell, transcribe(overheard, sources, decoder, layout=layout, batch_size=size))] == alone
    assert len(batches) <= 30 / size and max(map(len, batches)) == 16 * size
    for batch, coming in itertools.pairwise(batches):
        assert sum(batch) <= size * 2 * RATE
        assert len(batch) == 16 * size or sum(batch) + coming[0] > size * 2 * RATE


def test_a_short_file_is_heard_as_in_evaluation(run: Path, recordings: Path) -> None:
    model = load_recognizer(run)
    audio = torch.from_numpy(mix_down(soundfile.read(recordings / "a.wav", dtype="float32")[0]))
    (found,) = transcribe(model, [source_of(str(recordings / "a.wav"))], Greedy(model.vocabulary))
    assert isinstance(found, Transcript)
    assert found.text == Greedy(model.vocabulary)(model.emissions([audio])[0]).text != ""


def test_a_file_that_breaks_in_the_middle_is_a_failure_and_the_others_are_not(run: Path, tmp_path: Path) -> None:
    model = load_recognizer(run)
    for name in ("a.wav", "b.flac", "c.wav", "d.wav"):
        soundfile.write(tmp_path / name, sound(4.0, 3), RATE, subtype=None if name == "b.flac" else "FLOAT")
    whole = (tmp_path / "b.flac").read_bytes()
    (tmp_path / "b.flac").write_bytes(whole[:20_000] + bytes(len(whole) - 20_000))
    noise = sound(4.0, 3)
    noise[50_000] = np.nan
    soundfile.write(tmp_path / "c.wav", noise, RATE, subtype="FLOAT")
    sources, _ = find_sources([str(tmp_path)])
    found = list(transcribe(model, sources, Greedy(model.vocabulary), layout=Layout(1.0, 0.2), batch_size=2))
    assert [type(result) for result in found] == [Transcript, Failure, Failure, Transcript]
    assert isinstance(found[2], Failure) and "not finite" in found[2].reason


@pytest.mark.parametrize("suffix", ["flac", "wav", "mp3", "ogg", "opus"])
def test_half_a_file_is_a_failure_by_name_and_from_standard_input_and_a_whole_one_is_not(
    run: Path, tmp_path: Path, suffix: str
) -> None:
    model, path = load_recognizer(run), tmp_path / f"a.{suffix}"
    soundfile.write(path, sound(4.0, 3), RATE, **({"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}))
    whole = path.read_bytes()
    for share, kind in ((1.0, Transcript), (0.5, Failure)):
        path.write_bytes(whole[: round(share * len(whole))])
        (found,) = transcribe(model, [source_of(str(path))], Greedy(model.vocabulary))
        assert type(found) is kind
        with path.open("rb") as stream, AudioFile(stream) as file:
            if kind is Failure:
                with pytest.raises(AudioError):
                    list(stream_audio(file))
            else:
                assert sum(map(len, stream_audio(file))) == pytest.approx(4 * RATE, rel=0.05)


def test_audio_that_the_model_cannot_bear_is_a_failure_and_the_others_are_not(run: Path, tmp_path: Path) -> None:
    model = load_recognizer(run)
    soundfile.write(tmp_path / "a.wav", 1e38 * sound(4.0, 3), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", sound(4.0, 3), RATE)
    sources, _ = find_sources([str(tmp_path)])
    for decoder in (Greedy(model.vocabulary), make_decoder(model.vocabulary, beam=BeamConfig(beam_size=4))):
        found = list(transcribe(model, sources, decoder, layout=Layout(1.0, 0.2)))
        assert [type(result) for result in found] == [Failure, Transcript]
        assert isinstance(found[0], Failure) and "not finite" in found[0].reason


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode there")
def test_a_file_name_need_not_be_utf_8(run: Path, tmp_path: Path) -> None:
    model, name = load_recognizer(run), os.fsdecode(bytes(tmp_path) + b"/a\xff.wav")
    soundfile.write(tmp_path / "a.wav", sound(1.0, 3), RATE)
    (tmp_path / "a.wav").rename(name)
    assert [type(found) for found in transcribe(model, [source_of(name)], Greedy(model.vocabulary))] == [Transcript]


def test_one_whose_text_cannot_be_written_for_its_name_stops_no_other(run: Path, tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/a\xff.wav")
    for path in (name, tmp_path / "b.wav"):
        with open(path, "wb") as file:
            soundfile.write(file, sound(1.0, 3), RATE, format="WAV")
    for verb, ending in (("transcribe", "json"), ("extract", "safetensors")):
        options = ["--out", tmp_path / verb, *(["--format", "json"] if verb == "transcribe" else [])]
        command = [sys.executable, "-m", "w2v2.cli.main", verb, run, name, tmp_path / "b.wav", *options]
        done = subprocess.run(command, capture_output=True, check=False)  # no runner of tests bears the name
        assert done.returncode == 1 and b"1 of 2" in done.stderr.splitlines()[-1], done.stderr
        assert [path.stem for path in (tmp_path / verb).glob(f"*.{ending}")] == ["b"]


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_one_bad_file_never_stops_the_others(
    run: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.wav").write_text("no audio")
    bad = [tmp_path / "missing.wav", tmp_path / "text.wav", tmp_path / "nothing"]
    code, out, err = call(capsys, "transcribe", run, bad[0], recordings / "a.wav", *bad[1:], recordings / "e.wav")
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(recordings / name) for name in ("a.wav", "e.wav")]
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [
        f"{bad[2]}: no audio files in this folder",
        f"{bad[0]}: No such file or directory",
        f"{bad[1]}: it is no audio but text, which begins with 'no audio'",
    ]
    assert err.splitlines()[-1].startswith("w2v2: failed: 3 of 5 could not be transcribed")


def test_several_processes_give_the_texts_of_one_in_the_same_order(
    run: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    files = [recordings / "e.wav", tmp_path / "text.wav", *sorted(recordings.glob("*.wav"))]
    code, out, _ = call(capsys, "transcribe", run, *files, "--timestamps", "char")
    assert code == 1 and len({line.split("\t")[0] for line in out.splitlines()}) == len({*files}) - 1 > 2
    again, shared, err = call(capsys, "transcribe", run, *files, "--timestamps", "char", "--jobs", "2")
    assert (again, shared) == (code, out)
    assert err.splitlines()[-1].startswith(f"w2v2: failed: 1 of {len(files)} could not be transcribed")


def end_the_process(_device: str | None) -> Work:
    return lambda sources: os._exit(9)


def test_a_process_that_is_ended_is_one_line() -> None:
    sources = [source_of(f"{name}.wav") for name in "abc"]
    with pytest.raises(JobError, match=r"one of 2 processes was ended.*lower `jobs`"):
        list(in_processes(2, end_the_process, sources, None, lambda share: None))


def test_a_result_that_cannot_be_written_stops_no_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a" * 251 + ".wav", "b.wav"]  # as long as a name can be; its .json would be longer
    (tmp_path / "in").mkdir()
    for name in names:
        soundfile.write(tmp_path / "in" / name, sound(1.0, 3), RATE)
    code, _, err = call(capsys, "transcribe", run, tmp_path / "in", "--out", tmp_path / "out", "--format", "json")
    assert code == 1 and "1 of 2 could not be transcribed" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.json"]
    assert "cannot write what is said in it: File name too long" in caplog.text
    assert call(capsys, "transcribe", run, tmp_path / "in", "--out", tmp_path / "text")[0] == 0


def test_decoder_options_reach_the_decoder(
    run: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flashlight.lib.text")
    audio, lexicon = recordings / "b.flac", tmp_path / "words.txt"
    lexicon.write_text("GAGA\nHEGE\n")
    layout = ["--window-seconds", "2", "--context-seconds", "0.5"]
    _, greedy, _ = call(capsys, "transcribe", run, audio, *layout)
    code, found, _ = call(capsys, "transcribe", run, audio, *layout, "--lexicon", lexicon, "--beam-size", "5")
    assert code == 0 and found != greedy and set(found.split()) <= {"GAGA", "HEGE"}
    code, free, _ = call(capsys, "transcribe", run, audio, *layout, "--beam-size", "1", "--beam-size-token", "1")
    assert (code, free) == (0, greedy)
    code, _, err = call(capsys, "transcribe", run, audio, "--beam-sise", "5")
    assert code == 2 and "did you mean --beam-size" in err
    code, _, err = call(capsys, "transcribe", run, audio, "--lm", tmp_path / "none.arpa")
    assert code == 2 and "none.arpa" in err


def test_silence_an_empty_file_and_twenty_milliseconds_are_no_failure(
    run: Path, recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("f.wav", "g.wav"):
        code, out, _ = call(capsys, "transcribe", run, recordings / name, "--format", "json")
        assert code == 0 and json.loads(out)["seconds"] == pytest.approx(0.02 if name == "f.wav" else 0.0)
        code, out, _ = call(capsys, "transcribe", run, recordings / name, "--format", "json", "--vad")
        assert code == 0 and json.loads(out)["text"] == ""
    assert json.loads(out)["text"] == "" and json.loads(out)["words"] == []
    assert call(capsys, "transcribe", run, recordings / "e.wav", "--format", "TextGrid")[0] == 0


def test_standard_input_is_a_file_like_any_other(
    run: Path, recordings: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, _ = call(capsys, "transcribe", run, recordings / "deep" / "c.mp3")

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe((recordings / "deep" / "c.mp3").read_bytes())))
    assert call(capsys, "transcribe", run, "-")[:2] == (0, expected)


def test_names_and_texts_of_any_language_are_written_whatever_the_locale(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = tmp_path / "ünï 文件 name.flac"
    soundfile.write(audio, sound(1.0, 5), RATE)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="latin-1") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["transcribe", str(run), str(audio), "--format", "json"]) == 0
    assert main(["transcribe", str(tmp_path / "文"), str(audio)]) == 2
    err.flush()
    assert json.loads(out.buffer.getvalue().decode())["path"] == str(audio)
    assert f"no {tmp_path}/文/config.json" in err.buffer.getvalue().decode()


def test_a_folder_becomes_a_folder_and_names_do_not_clash(
    run: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    same = tmp_path / "a.flac"
    soundfile.write(same, sound(1.0, 5), RATE)
    assert call(capsys, "transcribe", run, recordings, same, "--out", out, "--format", "srt")[:2] == (0, "")
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert found == ["a.flac.srt", "a.wav.srt", "b.srt", "deep/c.srt", "deep/d.srt", "e.srt", "f.srt", "g.srt"]
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "deep" / "a.flac", sound(1.0, 5), RATE)
    code, _, err = call(capsys, "transcribe", run, same, tmp_path / "deep" / "a.flac", "--out", tmp_path / "other")
    assert code == 2 and "would both go to a.flac.txt" in err
    assert not (tmp_path / "other").exists()


def test_recordings_of_the_same_name_have_names_of_their_own_in_a_ctm(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "x.wav", sound(2.0, 5), RATE)
    code, out, _ = call(capsys, "transcribe", run, tmp_path / "a", tmp_path / "b", "--format", "ctm")
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == {"a_x", "b_x"}


def test_a_transcript_beside_its_audio_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        soundfile.write(tmp_path / f"{name}.wav", sound(1.0, 5), RATE)
    text = tmp_path / "deep" / "b.txt"
    text.write_text("ABBA")
    monkeypatch.chdir(tmp_path / "deep")
    for call_of in (["transcribe", run, tmp_path], ["transcribe", run, "b.wav"], ["align", run, "b.wav", "ABBA"]):
        out = tmp_path if tmp_path in call_of else "."
        code, _, err = call(capsys, *call_of, "--out", out, "--format", "txt")
        assert code == 2 and len(err.strip().splitlines()) == 1 and "b.txt is beside its audio" in err
    assert text.read_text() == "ABBA" and not (tmp_path / "a.txt").exists()
    assert call(capsys, "transcribe", run, tmp_path, "--out", tmp_path, "--format", "json")[0] == 0
    assert call(capsys, "transcribe", run, tmp_path, "--out", tmp_path / "out")[0] == 0
    assert call(capsys, "transcribe", run, tmp_path, "--out", tmp_path / "out")[0] == 0  # its own it may replace
    assert text.read_text() == "ABBA"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "srt"], "--format srt holds one recording, got 2; name a folder with --out"),
        (["--format", "srt", "--timestamps", "char"], "has times of words"),
        (["--format", "ctm", "--timestamps", "none"], "is made of times"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--window-seconds", "5"], "longer than its two contexts"),
        (["--window-seconds", "inf"], "a window must be a finite number of seconds, got inf"),
        (["--context-seconds", "nan"], "longer than its two contexts"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--device", "abacus", "--jobs", "2"], "--device abacus cannot be used"),
        (["--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["-", "--jobs", "2"], "--jobs 2 are for files, got - for standard input"),
        (["--out", __file__], "is a file; expected a folder"),
        (["--wrong", "1"], "--wrong"),
        (["--rate", "8000"], "--rate is of --live; add that, or leave --rate out"),
        (["--look-ahead", "3"], "--look-ahead is of --live; add that, or leave --look-ahead out"),
        (["--beam", "50"], "Unrecognized options: --beam, 50; did you mean --beam-size?"),
    ],
)
def test_a_wrong_call_is_one_line(
    run: Path, recordings: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code, out, err = call(capsys, "transcribe", run, recordings / "a.wav", recordings / "e.wav", *options)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1 and message in err


def test_a_model_without_ctc_head_is_refused(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipes.tiny()
    save_config(config, tmp_path / "config.json")
    save_weights(config.model.build(), tmp_path)
    for verb in (["transcribe"], ["align"]):
        code, _, err = call(capsys, *verb, tmp_path, recordings / "a.wav", *(["A"] if verb == ["align"] else []))
        assert code == 2 and "no CTC head" in err and "w2v2 finetune" in err


def test_a_file_has_the_text_that_is_printed(
    run: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run, recordings / "b.flac", "abba https://x.org/?token=1 cafe", "--skip-unknown", "--format", "txt"]
    code, printed, _ = call(capsys, "align", *words)
    assert code == 0 and "https://x.org/?token=1" in printed
    assert call(capsys, "align", *words, "--out", tmp_path)[0] == 0
    assert (tmp_path / "b.txt").read_text() == printed


def test_align_writes_the_given_words(
    run: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("abba\ncafe\n")
    said = {}
    for text in ("abba cafe", tmp_path / "text.txt"):
        code, said[str(text)], _ = call(capsys, "align", run, recordings / "b.flac", text, "--format", "json")
        assert code == 0
    first, second = said.values()
    assert first == second
    words = json.loads(first)["words"]
    assert [word["text"] for word in words] == ["ABBA", "CAFE"]
    assert all(0 <= word["start"] < word["end"] <= 7.1 and word["score"] < 0 for word in words)
    code, out, _ = call(capsys, "align", run, recordings / "b.flac", "abba", "--timestamps", "char")
    assert code == 0 and out.count('text = "B"') == 2


def test_align_takes_a_corpus_and_says_what_does_not_fit(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    texts = (("a", b"ABBA"), ("b", b"ZEBRA"), ("c", b"CAFE " * 100), ("d", b""), ("e", b"\xff"), ("f", None))
    for name, text in texts:
        soundfile.write(tmp_path / f"{name}.wav", sound(2.0, 1), RATE)
        if text is not None:
            (tmp_path / f"{name}.txt").write_bytes(text)
    code, out, err = call(capsys, "align", run, tmp_path, "--format", "ctm")
    assert code == 1 and [line.split()[4] for line in out.splitlines()] == ["ABBA"]
    assert "5 of 6 could not be aligned" in err
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = [
        "b.wav: no label for R Z",
        "c.wav: a text of 500 labels needs",
        "d.wav: no text to align",
        f"e.wav: {tmp_path / 'e.txt'} is not UTF-8 text",
        "f.wav: no transcript: expected",
    ]
    assert len(lines) == 5 and all(said in line for said, line in zip(expected, lines, strict=True))


@pytest.mark.parametrize(
    ("audio", "text", "message"),
    [
        ("a.wav", ["ÄH"], "no label for Ä: the model knows A B C"),
        ("a.wav", ["A" * 500], "needs at least 1000 frames, the audio has 65"),
        ("f.wav", ["CAFE"], "frames, the audio has"),
        ("a.wav", [""], "no text to align"),
        ("a.wav", ["no file.txt"], "no such file: no file.txt; expected the words"),
        ("a.wav", ["nowhere/words"], "no such file: nowhere/words; expected the words"),
        ("a.wav", ["ABBA / CAFE"], "no label for /"),
        ("a.wav", ["/"], "/ is a folder; expected the words"),
        ("a.wav", [], "name the text of"),
        ("", ["A"], "is a folder, whose transcripts lie beside the audio"),
        ("deep", [], "no transcripts in"),
    ],
)
def test_a_text_that_cannot_be_aligned_is_one_line(
    run: Path, recordings: Path, capsys: pytest.CaptureFixture[str], audio: str, text: list[str], message: str
) -> None:
    code, out, err = call(capsys, "align", run, recordings / audio, *text)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1 and message in err


def test_a_recording_too_long_to_align_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, sound(2.0, 1), RATE)
    content = bytearray(path.read_bytes())
    content[22:26] = (20 * 3600 * RATE).to_bytes(4, "big")  # STREAMINFO: samples in all
    path.write_bytes(content)
    with pytest.raises(UsageError, match="3600000 frames times 5000 labels would take too long"):
        align(recognizer(), source_of(str(path)), "ABCD " * 1000)


def test_windows_too_short_for_their_context_are_refused() -> None:
    with pytest.raises(UsageError, match="got 6 s with 3 s"):
        Layout(6.0, 3.0)


# --- Channels ---------------------------------------------------------------------------------------------------------


def test_the_channel_that_is_asked_for_is_heard(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = sound(3.0, 1), sound(3.0, 2)
    alone = {}
    for name, samples in (("1", one), ("2", two), ("mix", (one + two) / 2)):
        soundfile.write(tmp_path / "alone.wav", samples, RATE, subtype="FLOAT")
        alone[name] = call(capsys, "transcribe", run, tmp_path / "alone.wav")[1].strip()
    assert len(set(alone.values())) == 3
    path = tmp_path / "call.wav"
    soundfile.write(path, np.stack([one, two], 1), RATE, subtype="FLOAT")
    for name, text in alone.items():
        assert call(capsys, "transcribe", run, path, "--channel", name)[1].strip() == text
    code, out, _ = call(capsys, "transcribe", run, path, "--channel", "each")
    assert (code, out) == (0, f"{path}:1\t{alone['1']}\n{path}:2\t{alone['2']}\n")

    for name, channels in (("2", {"2"}), ("mix", {"1"}), ("each", {"1", "2"})):
        code, out, _ = call(capsys, "transcribe", run, path, "--channel", name, "--format", "ctm")
        assert {tuple(line.split()[:2]) for line in out.splitlines()} == {("call", channel) for channel in channels}
    code, out, _ = call(capsys, "transcribe", run, path, "--channel", "each", "--format", "json")
    assert [(row["path"], row["channel"]) for row in map(json.loads, out.splitlines())] == [
        (str(path), 1),
        (str(path), 2),
    ]
    call(capsys, "transcribe", run, path, "--channel", "each", "--format", "srt", "--out", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["call.1.srt", "call.2.srt"]
    code, out, _ = call(capsys, "align", run, path, alone["2"], "--channel", "2", "--format", "ctm")
    assert code == 0 and {line.split()[1] for line in out.splitlines()} == {"2"}

    caplog.clear()
    code, _, _ = call(capsys, "transcribe", run, path, "--channel", "3")
    assert code == 1 and f"{path}: it has no channel 3, only 2" in caplog.messages
    code, _, err = call(capsys, "transcribe", run, "-", "--channel", "each")
    assert code == 2 and "standard input" in err
    code, _, err = call(capsys, "transcribe", run, path, "--channel", "left")
    assert code == 2 and "--channel must be 1, 2, ..., each, or mix, got 'left'" in err


def test_channels_that_cancel_each_other_out_are_warned_of(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.stack([sound(3.0, 1), -sound(3.0, 1)], 1), RATE)
    assert call(capsys, "transcribe", run, path)[0] == 0
    assert f"{path}: its channels cancel each other out; choose one of them" in caplog.messages
    caplog.clear()
    assert call(capsys, "transcribe", run, path, "--channel", "2")[0] == 0 and not caplog.messages
