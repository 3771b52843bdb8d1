from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, sound, write_corpus

from w2v2.data.audio import AudioError, load_audio
from w2v2.data.batch import Batch, SpeechDataset
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Row, labelled_subset, read_corpus
from w2v2.data.loader import whole_utterances
from w2v2.data.passes import Passes
from w2v2.data.sampler import EpochSampler
from w2v2.errors import JobError, UsageError
from w2v2.preparation.run import prepare
from w2v2.training.data import SpeechDataModule


def ids(splits) -> dict[str, set[str]]:
    return {name: {cut.id for cut in cuts} for name, cuts in splits.items()}


def test_subsets_decide_the_split(corpus: Path) -> None:
    splits = read_corpus(corpus)
    assert {name: len(cuts) for name, cuts in splits.items()} == {"train": 16, "valid": 4, "test": 4}
    cut = next(c for c in splits["valid"])
    assert cut.supervisions[0].text and cut.supervisions[0].speaker == cut.id.split("-")[0]


def test_a_list_of_roles_goes_before_subsets(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"train-clean": 2})
    (tmp_path / "splits.tsv").write_text("role\tutt\ntrain\t101-1-0000\ntrain\t101-1-0001\nvalid\t102-1-0000\n")
    assert ids(read_corpus(tmp_path)) == {"train": {"101-1-0000", "101-1-0001"}, "valid": {"102-1-0000"}}


def test_without_validation_audio_whole_speakers_are_held_out_and_always_the_same(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"train-clean": 5}, utterances=2)
    splits = ids(read_corpus(tmp_path))
    speakers = {name: {utterance.split("-")[0] for utterance in part} for name, part in splits.items()}
    assert len(speakers["valid"]) == 1
    assert speakers["train"] | speakers["valid"] == {"101", "102", "103", "104", "105"}
    assert not speakers["train"] & speakers["valid"]
    assert ids(read_corpus(tmp_path)) == splits


def test_a_folder_of_one_subset_is_trained_on_whatever_its_name_and_evaluated_by_it(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"dev-clean": 3}, utterances=1)
    training = ids(read_corpus(tmp_path))
    assert (len(training["train"]), len(training["valid"])) == (2, 1)
    whole = training["train"] | training["valid"]
    assert ids(read_corpus(tmp_path, training=False)) == {"valid": whole, "dev-clean": whole}


def test_without_training_nothing_is_held_out_and_a_folder_without_subsets_is_the_split_of_its_name(
    tmp_path: Path,
) -> None:
    for folder, split in (("dev-other", "valid"), ("train-clean-100", "train"), ("speech", "test")):
        write_corpus(tmp_path / folder, {"a": 2, "b": 1} if folder == "speech" else {".": 1}, utterances=2)
        names = {path.stem for path in (tmp_path / folder).rglob("*.flac")}
        assert ids(read_corpus(tmp_path / folder, training=False)) == {split: names}
    root = write_corpus(tmp_path / "train-only", {"train-clean": 3}, utterances=1)
    assert len(read_corpus(root, training=False)["train"]) == 3


def test_without_training_an_unreadable_header_is_a_recording_that_cannot_be_read(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "speech", {"test": 1}, utterances=3)
    folder = root / "test" / "101" / "1"
    (folder / "101-1-0000.flac").write_bytes(b"this is no audio")
    (folder / "101-1-0003.flac").write_bytes(b"")
    soundfile.write(folder / "101-1-0004.wav", np.zeros(0), RATE)
    splits = read_corpus(root, training=False)
    config = DataConfig(num_workers=0, max_bad="60%", min_seconds=1.0)
    bad = {f"101-1-000{i}" for i in (0, 3, 4)}
    for loader in (
        whole_utterances("test", splits["test"], config),
        SpeechDataModule(splits, config).eval_dataloader("test"),  # which leaves out what is too short
    ):
        read = list(loader)
        assert {name for batch in read for name in batch.ids} == {"101-1-0001", "101-1-0002"}
        assert {name for batch in read for name in batch.bad} == bad
        for batch in read:
            assert all(name in why and "\n" not in why for name, why in batch.bad.items())
    with pytest.raises(JobError, match=r"3 utterances cannot be read, more than `data.max_bad` 50% of 5 allows"):
        list(whole_utterances("test", splits["test"], DataConfig(num_workers=0, max_bad="50%")))


def test_each_subset_can_be_had_alone(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "speech", {"dev-clean": 1, "dev-other": 1, "test-clean": 2, "test-other": 1})
    found = ids(read_corpus(root, training=False))
    assert list(found) == ["valid", "test", "dev-clean", "dev-other", "test-clean", "test-other"]
    for name in list(found)[2:]:
        assert found[name] == {path.stem for path in (root / name).rglob("*.flac")}
    assert found["test"] == found["test-clean"] | found["test-other"]
    assert set(read_corpus(root)) == {"train", "valid"}  # trained on, no subset is a split of its own
    (root / "splits.tsv").write_text("role\tutt\ntrain\t101-1-0000\n")
    listed = ids(read_corpus(root, training=False))
    assert listed == {"train": {"101-1-0000"}} | {name: found[name] for name in list(found)[2:]}


@pytest.mark.parametrize("layout", ["missing", "empty", "unreadable", "no_samples", "twice", "one_speaker", "listed"])
def test_bad_folders_are_refused_in_one_line(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "root"
    said = {
        "missing": "no folder",
        "empty": "no audio in",
        "unreadable": "cannot read",
        "no_samples": "no samples in",
        "twice": "two files with the utterance id",
        "one_speaker": "no validation audio",
        "listed": "names no utterance of those in",
    }[layout]
    if layout != "missing":
        root.mkdir()
    if layout in ("unreadable", "no_samples", "twice"):
        write_corpus(root, {"train": 2}, utterances=1)
    if layout == "unreadable":
        (root / "train" / "101" / "1" / "101-1-0009.flac").write_bytes(b"this is no audio")
    if layout == "no_samples":
        soundfile.write(root / "train" / "101" / "1" / "101-1-0009.wav", np.zeros(0), RATE)
    if layout == "twice":
        soundfile.write(root / "train" / "101" / "1" / "101-1-0000.wav", sound(2, 0), RATE)
    if layout == "listed":
        write_corpus(root, {"train": 1}, utterances=1)
        (root / "splits.tsv").write_text("role\tutt\ntrain\tanother\n")
    if layout == "one_speaker":
        write_corpus(root, {"train": 1}, utterances=3)
    with pytest.raises(UsageError, match=said) as caught:
        read_corpus(root)
    assert "\n" not in str(caught.value)


def test_prepare_writes_a_manifest_that_reads_back_as_the_folder(corpus: Path, tmp_path: Path) -> None:
    summary = prepare(corpus, tmp_path / "out")
    assert ids(read_corpus(tmp_path / "out")) == ids(read_corpus(corpus))
    assert summary["splits"]["train"]["speakers"] == 4
    assert summary["splits"]["train"]["transcribed"] == 16
    hours = sum(soundfile.info(path).duration for path in (corpus / "train-clean").rglob("*.flac")) / 3600
    assert summary["splits"]["train"]["hours"] == pytest.approx(hours)


def test_part_of_a_file_is_the_same_as_that_part_of_the_whole(corpus: Path) -> None:
    cut = next(c for c in read_corpus(corpus)["train"])
    whole, _ = soundfile.read(cut.recording.sources[0].source, dtype="float32")
    np.testing.assert_array_equal(load_audio(cut, 0.5, 1.0), whole[8000:24000])
    np.testing.assert_array_equal(load_audio(cut), whole)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_other_rates_and_channels_become_16_khz_mono(tmp_path: Path, rate: int) -> None:
    seconds = np.arange(rate * 3) / rate
    left, right = np.sin(2 * np.pi * 440 * seconds), np.zeros(rate * 3)
    for speaker in (1, 2):
        folder = tmp_path / "train" / str(speaker)
        folder.mkdir(parents=True)
        soundfile.write(folder / f"{speaker}-1.wav", np.stack([left, right], 1), rate, subtype="FLOAT")
    cut = next(c for c in read_corpus(tmp_path)["train"])
    audio = load_audio(cut, 1.0, 1.0)
    assert abs(len(audio) - RATE) <= 1
    middle = audio[4000:12000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() * RATE / len(middle) == pytest.approx(440, abs=3)
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.02)  # the mean of a full-scale and a silent channel


def module(corpus: Path, **settings) -> SpeechDataModule:
    data = {"batch_seconds": 8.0, "max_seconds": 2.5, "num_buckets": 2, "num_workers": 0} | settings
    return SpeechDataModule(read_corpus(corpus), DataConfig(**data), seed=3)


def batches(data: SpeechDataModule, epoch: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_pretraining_batches_hold_crops_of_one_length_within_the_budget(corpus: Path) -> None:
    for batch in batches(module(corpus)):
        assert batch.lengths.unique().numel() == 1
        assert batch.audio.shape == (len(batch.ids), int(batch.lengths[0]))
        assert batch.lengths.sum() <= 8.0 * RATE
        assert 2.0 * RATE <= batch.lengths[0] <= 2.5 * RATE


@pytest.mark.parametrize("workers", [0, 2])
def test_every_utterance_comes_exactly_once_a_pass(corpus: Path, workers: int) -> None:
    data = module(corpus, num_workers=workers)
    seen = Counter(name for batch in batches(data) for name in batch.ids)
    assert seen == Counter(cut.id for cut in read_corpus(corpus)["train"])


def test_order_and_crops_depend_on_seed_and_epoch_alone(corpus: Path) -> None:
    first, again = batches(module(corpus)), batches(module(corpus, num_workers=1))
    assert [batch.ids for batch in first] == [batch.ids for batch in again]
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(first, again, strict=True))
    later = batches(module(corpus), epoch=1)
    assert [batch.ids for batch in first] != [batch.ids for batch in later]
    assert {number for batch in later for number in batch.epochs} == {1}


def test_a_resumed_pass_continues_with_the_next_batch(corpus: Path) -> None:
    whole = batches(module(corpus))
    data = module(corpus)
    data.skip = 2
    loader = data.train_dataloader()
    assert [batch.ids for batch in loader] == [batch.ids for batch in whole[2:]]
    loader.sampler.set_epoch(1)
    assert sorted(n for b in loader for n in b.ids) == sorted(n for b in whole for n in b.ids)


def test_ranks_share_a_pass_without_overlap_and_take_as_many_batches(corpus: Path) -> None:
    cuts = read_corpus(corpus)["train"]

    def part(rank: int) -> list[list[str]]:
        passes = Passes("train", cuts, DataConfig(), shuffle=True)
        sampler = EpochSampler(passes, batch_seconds=6.0, max_seconds=2.5, num_buckets=2, rank=rank, world_size=2)
        return [[row.id for row in rows] for _, rows in sampler]

    one, two = part(0), part(1)
    assert len(one) == len(two)
    assert Counter(name for batch in one + two for name in batch) == Counter(cut.id for cut in cuts)


def test_validation_crops_depend_on_the_utterance_alone(corpus: Path) -> None:
    def crops(batch_seconds: float) -> dict[str, torch.Tensor]:
        data = module(corpus, batch_seconds=batch_seconds)
        return {
            name: row[:n]
            for batch in data.val_dataloader()
            for name, row, n in zip(batch.ids, batch.audio, batch.lengths, strict=True)
        }

    alone, together = crops(2.5), crops(40.0)
    assert alone.keys() == together.keys() and len(alone) == 4
    assert all(torch.equal(alone[name], together[name]) for name in alone)


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_utterance_longer_than_a_batch_is_alone_in_one_without_a_complaint(corpus: Path) -> None:
    config = DataConfig(batch_seconds=2.0, min_seconds=0.1, num_buckets=1, num_workers=0)
    batches = list(SpeechDataModule(read_corpus(corpus), config, encode=lambda _: [0]).train_dataloader())
    assert [len(batch.ids) for batch in batches] == [1] * 16
    assert all(batch.lengths[0] > 2.0 * RATE for batch in batches)


def test_fine_tuning_batches_hold_whole_utterances_with_their_labels(corpus: Path) -> None:
    splits = read_corpus(corpus)
    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    data = SpeechDataModule(splits, DataConfig(batch_seconds=9.0, max_seconds=2.0, num_workers=0), encode=encode)
    texts = {cut.id: cut.supervisions[0].text for cut in splits["train"]}
    durations = {cut.id: cut.recording.num_samples for cut in splits["train"]}
    for batch in data.train_dataloader():
        for name, n, labels, count in zip(batch.ids, batch.lengths, batch.targets, batch.target_lengths, strict=True):
            assert int(n) == durations[name]
            assert labels[:count].tolist() == encode(texts[name])


def test_normalising_uses_the_whole_utterance_and_comes_before_the_crop(corpus: Path) -> None:
    cuts = list(read_corpus(corpus)["train"])[:1]
    rows = [Row(cut.duration, cut.id, cut) for cut in cuts]
    plain = SpeechDataset(max_seconds=1.0)[(0, 0), rows].audio[0]
    normal = SpeechDataset(max_seconds=1.0, normalize=1e-5)[(0, 0), rows].audio[0]
    whole = load_audio(cuts[0])
    expected = (plain - whole.mean()) / np.sqrt(whole.var() + 1e-5)
    torch.testing.assert_close(normal, expected, atol=1e-5, rtol=1e-5)


def test_a_labelled_subset_covers_speakers_and_keeps_its_size(corpus: Path) -> None:
    cuts = read_corpus(corpus)["train"]
    chosen = labelled_subset(cuts, 0.2, seed=0)
    assert sum(cut.duration for cut in chosen) == pytest.approx(12, abs=4)
    assert {cut.supervisions[0].speaker for cut in chosen} == {"101", "102", "103", "104"}
    assert [cut.id for cut in labelled_subset(cuts, 0.2, seed=0)] == [cut.id for cut in chosen]
    assert [cut.id for cut in labelled_subset(cuts, 0.2, seed=1)] != [cut.id for cut in chosen]


def test_a_file_that_changes_its_rate_is_noticed(tmp_path: Path) -> None:
    root = write_corpus(tmp_path, {"train": 2}, utterances=1, suffix="wav")
    cut = next(c for c in read_corpus(root)["train"])
    soundfile.write(cut.recording.sources[0].source, sound(2, 0, 8000), 8000)
    with pytest.raises(AudioError, match="8000 Hz, the manifest says 16000"):
        load_audio(cut)
