"""What augmentation does to audio, by measurement of the audio; that it is drawn from a key and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, sound
from hypothesis import given
from hypothesis import strategies as st

from w2v2.data.augment import Augmentation, draw_room, keyed_rng
from w2v2.data.batch import SpeechDataset
from w2v2.data.config import AugmentConfig, DataConfig
from w2v2.data.corpora import Row, Splits, read_corpus
from w2v2.errors import UsageError
from w2v2.training.data import SpeechDataModule

AUDIO = sound(3.0, 0)
ALL = {"speed": 0.2, "tilt_db": 4.0, "gain_db": 6.0, "noise": 0.7, "room": 0.5, "low_pass": 0.3, "codec": 0.2}


def changed(samples: np.ndarray, stretch: float = 1.0, key: int = 0, **settings) -> np.ndarray:
    return Augmentation(AugmentConfig(**settings))(samples.astype(np.float32), stretch, keyed_rng(0, key))


def power(samples: np.ndarray, low: float = 0.0, high: float = 8000.0) -> float:
    spectrum, frequency = np.fft.rfft(samples), np.fft.rfftfreq(len(samples), 1 / RATE)
    return float(np.sum(np.abs(spectrum[(frequency >= low) & (frequency < high)]) ** 2)) / len(samples)


def db(ratio: float) -> float:
    return 10 * np.log10(ratio)


def test_what_a_model_that_normalises_is_given_is_normalised_after_augmentation(splits: Splits) -> None:
    cuts = list(splits["train"])[:6]
    rows = [Row(cut.duration, cut.id, cut) for cut in cuts]
    loud, plain = (
        SpeechDataset(normalize=1e-5, augmentation=Augmentation(AugmentConfig(gain_db=gain, noise=0.5)))[(0, 0), rows]
        for gain in (12.0, 1e-6)
    )
    for row, same, length in zip(loud.audio, plain.audio, loud.lengths, strict=True):
        assert abs(row[:length].mean()) < 1e-4 and abs(row[:length].std() - 1) < 0.01
        assert (row - same).abs().max() < 0.05  # so the gain, which is drawn before the noise, is not noticed


@pytest.fixture(scope="module")
def splits(corpus: Path) -> Splits:
    return read_corpus(corpus)


# --- What is done to the audio ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stretch", [0.8, 0.97, 1.2])
def test_speed_moves_length_and_pitch_together(stretch: float) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    played = changed(tone, stretch)
    assert abs(len(played) - 2 * RATE * stretch) <= 1
    peak = np.argmax(np.abs(np.fft.rfft(played * np.hanning(len(played))))) * RATE / len(played)
    assert peak == pytest.approx(440 / stretch, abs=1)


def test_factors_of_speed_stay_within_their_bounds_and_fill_them() -> None:
    drawn = [Augmentation(AugmentConfig(speed=0.2)).draw_stretch(keyed_rng(0, i)) for i in range(300)]
    assert 1 / 1.2 <= min(drawn) < 0.85 and 1.18 < max(drawn) <= 1.2
    assert np.mean(np.log(drawn)) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("key", range(5))
def test_noise_is_as_far_below_the_voice_as_asked(key: int) -> None:
    noisy = changed(AUDIO, key=key, noise=1.0, snr_db=(12.0, 12.0))
    assert db(power(AUDIO) / power(noisy - AUDIO)) == pytest.approx(12, abs=0.3)


@pytest.mark.parametrize("key", range(5))
def test_a_microphone_tilts_the_spectrum_around_1_khz(key: int) -> None:
    gain = [db(power(changed(AUDIO, key=key, tilt_db=6.0), f, f + 50) / power(AUDIO, f, f + 50)) for f in (500, 1975)]
    middle = db(power(changed(AUDIO, key=key, tilt_db=6.0), 950, 1050) / power(AUDIO, 950, 1050))
    assert abs(middle) < 0.5 and gain[1] - gain[0] == pytest.approx(0, abs=12.1)
    assert gain[0] * gain[1] < 0


def test_a_low_pass_takes_the_highest_band_and_leaves_the_lowest() -> None:
    hiss = np.random.default_rng(0).standard_normal(4 * RATE)
    muffled = changed(hiss, low_pass=1.0)
    assert db(power(muffled, 0, 2000) / power(hiss, 0, 2000)) == pytest.approx(0, abs=0.3)
    assert db(power(muffled, 7800) / power(hiss, 7800)) < -5


@pytest.mark.parametrize("key", range(5))
def test_a_room_begins_with_the_direct_sound_and_rings_as_it_was_drawn(key: int) -> None:
    click = np.zeros(RATE)
    click[100] = 1.0
    heard = changed(click, key=key, room=1.0)
    assert heard[100] == pytest.approx(1, abs=1e-3) and np.abs(heard[:100]).max() < 1e-3
    assert 3 - 0.1 <= -db(np.sum(heard[101:] ** 2)) <= 12 + 0.1
    assert np.abs(heard[100 + round(0.41 * RATE) :]).max() < 1e-3


def test_a_drawn_room_has_decayed_by_60_db_at_its_end() -> None:
    impulse, start = draw_room(keyed_rng(0, 0))
    echoes = impulse[start + 200 :]
    tenth = len(echoes) // 10
    fall = db(np.mean(echoes[:tenth] ** 2) / np.mean(echoes[-tenth:] ** 2))
    assert fall == pytest.approx(54, abs=4)


def test_a_codec_keeps_the_length_and_most_of_the_sound() -> None:
    for key in range(6):
        coded = changed(AUDIO, key=key, codec=1.0)
        assert len(coded) == len(AUDIO) and not np.array_equal(coded, AUDIO)
        assert abs(db(power(coded, 100, 3000) / power(AUDIO, 100, 3000))) < 1.5


def test_gain_is_within_its_bounds() -> None:
    gains = [db(power(changed(AUDIO, key=i, gain_db=6.0)) / power(AUDIO)) for i in range(100)]
    assert -6 <= min(gains) < -4 and 4 < max(gains) <= 6


def test_folders_give_noises_and_rooms_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    for name, samples in (("hum", np.sin(2 * np.pi * 50 * np.arange(RATE) / RATE)), ("click", np.r_[0, 0, 0.5, 0.25])):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / f"{name}.wav", samples, RATE)
    hum = changed(AUDIO, noise=1.0, noise_folder=str(tmp_path / "hum"), snr_db=(0.0, 0.0)) - AUDIO
    assert power(hum, 40, 60) > 0.9 * power(hum)
    echo = changed(AUDIO, room=1.0, room_folder=str(tmp_path / "click"))
    assert np.allclose(echo, AUDIO + 0.5 * np.r_[0, AUDIO[:-1]], atol=1e-4)
    with pytest.raises(
        UsageError, match=r"`data.augment.noise_folder`: expected a folder with audio files, got .*none"
    ):
        Augmentation(AugmentConfig(noise=1.0, noise_folder=str(tmp_path / "none")))
    (tmp_path / "click" / "b.wav").write_text("junk")
    with pytest.raises(UsageError, match=r"`data.augment.room_folder`: cannot read .*b.wav: .*; repair or remove it"):
        Augmentation(AugmentConfig(room=1.0, room_folder=str(tmp_path / "click")))


@given(st.integers(0, 10**6), st.integers(0, 3 * RATE), st.floats(0.7, 1.4))
def test_whatever_is_drawn_leaves_finite_audio_of_the_length_that_was_asked_for(key: int, n: int, by: float) -> None:
    audio = changed(AUDIO[:n], by, key, **ALL | {"codec": 0.0})
    assert audio.dtype == np.float32 and np.isfinite(audio).all() and abs(len(audio) - n * by) <= 1


# --- When -------------------------------------------------------------------------------------------------------------


def utterances(splits: Splits) -> list[Row]:
    return [row for piece in splits["train"].pieces for row in piece.rows()][:4]


def dataset(**options) -> SpeechDataset:
    return SpeechDataset(augmentation=Augmentation(AugmentConfig(**ALL)), **options)


def test_the_same_key_gives_the_same_audio_whatever_else_is_in_the_batch(splits: Splits) -> None:
    rows = utterances(splits)
    together = dataset()[(3, 0), rows]
    for i in (2, 0):
        alone = dataset()[(3, 7), [rows[i]]]
        assert torch.equal(alone.audio[0], together.audio[i, : int(alone.lengths[0])])
    later, other = dataset()[(4, 0), rows], dataset(seed=1)[(3, 0), rows]
    assert not torch.equal(later.audio, together.audio) and not torch.equal(other.audio, together.audio)


def test_crops_stay_as_long_as_ever(splits: Splits) -> None:
    rows = utterances(splits)
    batch = dataset(same_length=True, max_seconds=1.5)[(0, 0), rows]
    assert batch.audio.shape == (4, batch.lengths[0]) and abs(int(batch.lengths[0]) - 1.5 * RATE) <= 1
    whole = dataset(same_length=True)[(0, 0), rows]  # where there is no more audio to be sped up
    assert abs(int(whole.lengths[0]) - RATE * min(row.seconds for row in rows)) <= 1


def test_an_utterance_whose_labels_would_no_longer_fit_keeps_its_speed(splits: Splits) -> None:
    row = utterances(splits)[0]
    seconds = row.seconds

    def lengths(fits) -> list[float]:
        data = dataset(fits=fits)
        return [int(data[(epoch, 0), [row]].lengths[0]) / RATE for epoch in range(30)]

    free, tight = lengths(None), lengths(lambda s, text: s >= seconds)
    assert min(free) < seconds - 0.1 and min(tight) > seconds - 1e-3
    assert [s for s in free if s > seconds] == [s for s in tight if s > seconds + 1e-3]


def test_training_is_augmented_validation_never(splits: Splits) -> None:
    def first(augment: AugmentConfig, split: str) -> torch.Tensor:
        config = DataConfig(num_workers=0, augment=augment, max_seconds=2.0)
        data = SpeechDataModule(splits, config)
        return next(iter(data.train_dataloader() if split == "train" else data.eval_dataloader(split))).audio

    off, on = AugmentConfig(), AugmentConfig(**ALL)
    assert torch.equal(first(off, "valid"), first(on, "valid"))
    assert not torch.equal(first(off, "train"), first(on, "train"))
