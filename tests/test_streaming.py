"""What a pass is made of, wherever the audio lies: planned without decoding, shared out, resumed, and damaged."""

import copy
import gc
import gzip
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import socket
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import sound
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from serving import Faults, s3_server, serve
from test_train import nano, same_numbers

from w2v2.cli.main import main
from w2v2.data import storage
from w2v2.data.batch import Batch, SpeechDataset
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Piece, Row, Split, labelled_subset, read_corpora, read_corpus
from w2v2.data.passes import Passes
from w2v2.data.sampler import EpochSampler, whole_updates
from w2v2.errors import JobError, UsageError
from w2v2.preparation.config import PrepareConfig
from w2v2.preparation.run import prepare
from w2v2.training.data import SpeechDataModule
from w2v2.training.pretrain import pretrain

RATE = 16_000

# --- Plans, from metadata alone ---------------------------------------------------------------------------------------


def cut_of(name: str, seconds: float) -> MonoCut:
    samples = round(seconds * RATE)
    length = samples / RATE
    recording = Recording(name, [AudioSource("file", [0], "/none")], RATE, samples, length, [0])
    said = SupervisionSegment(name, name, 0.0, length, text="A", speaker="s")
    return MonoCut(name, 0.0, length, 0, recording=recording, supervisions=[said])


def split_of(durations: list[float], sizes: list[int], weights: list[float] | None = None) -> Split:
    """Pieces of these sizes in turn, each with its weight."""
    cuts = [cut_of(f"u{i}", seconds) for i, seconds in enumerate(durations)]
    ends = [n for n in accumulate(sizes) if n < len(cuts)]
    held = [tuple(cuts[a:b]) for a, b in zip([0, *ends], [*ends, len(cuts)], strict=True)]
    weights = (weights or [1.0]) * len(held)
    pieces = tuple(
        Piece(held=part, utterances=len(part), seconds=sum(c.duration for c in part), weight=weight)
        for part, weight in zip(held, weights, strict=False)
    )
    return Split(pieces, 1, len(cuts))


def sampler_of(split, *, world=1, rank=0, seed=0, limit=20.0, crop=5.0, buckets=3, buffer=10, **resumed):
    passes = Passes("train", split, DataConfig(min_seconds=0.1), shuffle=True, seed=seed)
    options = {"batch_seconds": limit, "max_seconds": crop, "num_buckets": buckets, "buffer": buffer} | resumed
    return EpochSampler(passes, rank=rank, world_size=world, **options)


def plan(split, *, world=1, epoch=0, **options):
    """Batches of each rank, as lists of cuts; each rank plans by itself, as in a process of its own."""
    ranks = []
    for rank in range(world):
        sampler = sampler_of(split, world=world, rank=rank, **options)
        sampler.set_epoch(epoch)
        ranks.append([[row.cut() for row in rows] for _, rows in sampler])
    return ranks


def turn_of(split, seed=0, epoch=0) -> list[MonoCut]:
    """The utterances of a pass in the order in which they are read."""
    passes = Passes("train", split, DataConfig(min_seconds=0.1), shuffle=True, seed=seed)
    turns = enumerate(passes.turns(epoch))
    return [row.cut() for number, turn in turns for row in passes.rows(epoch, number, turn)]


def rows_of(cuts) -> list[Row]:
    return [Row(cut.duration, cut.id, cut) for cut in cuts]


def ids_of(ranks) -> list[list[list[str]]]:
    return [[[cut.id for cut in batch] for batch in batches] for batches in ranks]


durations = st.lists(st.floats(0.5, 12.0), min_size=1, max_size=60)
sizes = st.lists(st.integers(1, 25), min_size=1, max_size=12)
worlds = st.integers(1, 5)
shape = {"buckets": st.integers(1, 6), "buffer": st.integers(1, 80), "limit": st.floats(5.0, 40.0)}


@settings(max_examples=150, deadline=None)
@given(durations, sizes, worlds, st.booleans(), st.integers(0, 3), st.fixed_dictionaries(shape))
def test_a_pass_gives_each_utterance_to_one_rank_once_in_equally_many_batches_within_the_budget(
    lengths, parts, world, pretraining, epoch, options
) -> None:
    split = split_of(lengths, parts)
    crop = 5.0 if pretraining else None
    if len(lengths) < world:
        with pytest.raises(UsageError, match=f"{len(lengths)} utterances for {world} processes"):
            plan(split, world=world, crop=crop, **options)
        return
    ranks = plan(split, world=world, epoch=epoch, crop=crop, **options)
    seen = Counter(cut.id for batches in ranks for batch in batches for cut in batch)
    assert seen == {f"u{i}": 1 for i in range(len(lengths))}
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch for batches in ranks for batch in batches)
    for batches in ranks:
        for i, batch in enumerate(batches):
            rows = [min(cut.duration, crop or 99.0) for cut in batch]
            padded = len(rows) * (min(rows) if pretraining else max(rows))
            # One utterance alone may be longer; and where the last step has nothing to share out but single
            # utterances, fewer than ranks, they join others that are alone.
            left_over = i == len(batches) - 1 and {len(rank[-1]) for rank in ranks} == {1, 2}
            assert padded <= options["limit"] * (1 + 1e-9) or len(batch) == 1 or (left_over and len(batch) == 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.5, 6.0), min_size=1, max_size=20),
    sizes,
    st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.7]), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_weights_are_kept_to_over_the_passes_and_an_utterance_counts_its_own(
    lengths, parts, weights, passes, world, seed
) -> None:
    split = split_of(lengths, parts, weights)
    weight_of = {cut.id: piece.weight for piece in split.pieces for cut in piece.held}
    # Where a pass may have too few for all ranks, that is refused; see below.
    assume(sum(int(piece.weight) * piece.utterances for piece in split.pieces) >= world)
    numbers: dict[str, list[int]] = {name: [] for name in weight_of}
    for epoch in range(passes):
        for batches in plan(split, world=world, epoch=epoch, seed=seed):
            for cut in (cut for batch in batches for cut in batch):
                numbers[cut.id].append((cut.custom or {}).get("pass", epoch))
    for name, got in numbers.items():
        due = passes * Fraction(str(weight_of[name]))
        assert math.floor(due) <= len(got) <= math.ceil(due), (name, got, weight_of[name])
        assert sorted(got) == list(range(len(got)))


def test_a_pass_of_fewer_utterances_than_processes_is_refused_rather_than_losing_them() -> None:
    split = split_of([1.0] * 3, [3], [0.5])
    seed = next(seed for seed in range(99) if len(turn_of(split, seed)) == 2)
    samplers = [sampler_of(split, world=2, rank=rank, seed=seed) for rank in range(2)]
    kept, refused = 0, 0
    for epoch in range(4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
            try:
                kept += sum(len(rows) for _, rows in sampler)
            except UsageError:
                refused += 1
    # Each comes every other time, so two and one in turn.
    assert (kept, refused) == (4, 4)


@settings(max_examples=40, deadline=None)
@given(durations, sizes, worlds, st.integers(0, 9), st.integers(0, 9))
def test_the_order_is_a_function_of_seed_and_epoch(lengths, parts, world, seed, epoch) -> None:
    assume(len(lengths) >= world)
    split = split_of(lengths, parts)
    first = plan(split, world=world, seed=seed, epoch=epoch)
    plan(split, world=world, seed=seed, epoch=epoch + 1)
    torch.manual_seed(seed + 1)
    np.random.default_rng(seed).random()
    assert ids_of(plan(split, world=world, seed=seed, epoch=epoch)) == ids_of(first)


def test_another_seed_or_epoch_is_another_order() -> None:
    split = split_of([3.0] * 40, [7] * 5)
    orders = [ids_of(plan(split, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)]
    assert len({json.dumps(order) for order in orders}) == 9
    # Before the buckets too: what comes within reach of the buffer changes with the pass.
    firsts = [tuple(cut.id for cut in turn_of(split, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(firsts)) == 9


def test_a_labelled_subset_keeps_the_weights_of_its_corpora() -> None:
    split = split_of([3.0] * 20, [10, 10], [2.0, 0.5])
    subset = labelled_subset(split, 0.5, seed=0)
    seen = Counter(cut.id for epoch in range(2) for cut in turn_of(subset, 0, epoch))
    assert len(subset) == len(seen) == subset.transcribed >= 10
    assert seen == {cut.id: 4 if int(cut.id[1:]) < 10 else 1 for cut in subset}
    assert set(seen.values()) == {1, 4}


def test_a_sampler_that_goes_on_to_the_next_pass_plans_as_a_new_one() -> None:
    split = split_of([1.0 + i % 7 for i in range(50)], [8] * 6, [1.0, 1.5])
    sampler = sampler_of(split, seed=4, skip=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        got = [[row.id for row in rows] for _, rows in sampler]
        whole = ids_of(plan(split, epoch=epoch, seed=4))[0]
        assert got == whole[3 if epoch == 0 else 0 :]


@settings(max_examples=60, deadline=None)
@given(durations, sizes, st.integers(1, 3), st.integers(0, 2), st.floats(0, 1), st.fixed_dictionaries(shape))
def test_a_pass_goes_on_from_a_window_as_if_nothing_had_happened(lengths, parts, world, epoch, share, options) -> None:
    assume(len(lengths) >= world)
    split = split_of(lengths, parts, [1.0, 1.5])
    whole = ids_of(plan(split, world=world, epoch=epoch, **options))
    done = int(share * len(whole[0]))
    for rank in range(world):
        before = sampler_of(split, world=world, rank=rank, **options)
        before.set_epoch(epoch)
        list(itertools.islice(before, done))
        position = before.position(done)
        assert position.epoch == epoch and position.steps <= done
        after = sampler_of(split, world=world, rank=rank, skip=done, start=position, **options)
        after.set_epoch(epoch)
        assert [[row.id for row in rows] for _, rows in after] == whole[rank][done:]
        after.set_epoch(epoch + 1)
        assert [[row.id for row in rows] for _, rows in after] == ids_of(
            plan(split, world=world, epoch=epoch + 1, **options)
        )[rank]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_pass_of_crops_of_one_length_goes_on_as_if_nothing_had_happened(share: float) -> None:
    split = split_of([20.0] * 510, [17] * 30)
    whole = ids_of(plan(split, limit=60.0, crop=15.6, buffer=50, accumulate=4))[0]
    done = int(share * len(whole))
    before = sampler_of(split, limit=60.0, crop=15.6, buffer=50, accumulate=4)
    list(itertools.islice(before, done))
    position = before.position(done)
    assert position.carried
    after = sampler_of(split, limit=60.0, crop=15.6, buffer=50, accumulate=4, skip=done, start=position)
    assert [[row.id for row in rows] for _, rows in after] == whole[done:]


def test_a_pass_that_goes_on_reads_nothing_of_the_windows_before(tmp_path: Path) -> None:
    split = many_rows(tmp_path, 4_000, 100)
    whole = ids_of(plan(split, world=2, buffer=500))[0]
    done = len(whole) - 5
    before = sampler_of(split, world=2, buffer=500)
    list(itertools.islice(before, done))
    position = before.position(done)
    needed = {number for number, _ in position.carried} | set(range(position.turn, 40))
    assert len(needed) < 20
    turns = Passes("train", split, DataConfig(min_seconds=0.1), shuffle=True).turns(0)
    kept = {0} | {turns[number][0] for number in needed}  # the first is looked at to see whether there is anything
    for i, piece in enumerate(split.pieces):
        if i not in kept:
            Path(piece.manifest).unlink()
    after = sampler_of(split, world=2, buffer=500, skip=done, start=position)
    assert [[row.id for row in rows] for _, rows in after] == whole[done:]


def test_the_batches_of_a_step_are_of_similar_utterances() -> None:
    lengths = [1.0 + i % 100 / 10 for i in range(2_000)]
    ranks = plan(split_of(lengths, [100]), world=4, limit=60.0, crop=None, buckets=10, buffer=2_000)
    longest = [[max(cut.duration for cut in batch) for batch in batches] for batches in ranks]
    spread = [max(each) - min(each) for each in zip(*longest, strict=True)]
    assert sorted(spread)[len(spread) // 2] < 1.0  # a bucket is 1 s wide, the utterances 10


@pytest.mark.parametrize(("world", "every"), [(1, 8), (2, 4), (8, 1)])
def test_updates_of_a_corpus_that_is_less_than_one_have_their_size_all_the_same(
    world: int, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten minutes in updates of 8 batches of 200 s, as the published recipe for so little has them."""
    rng = random.Random(0)
    split = split_of([rng.uniform(4.0, 14.0) for _ in range(67)], [67])
    options = {"crop": None, "limit": 200.0, "buckets": 10, "buffer": 10_000, "accumulate": every}

    def batches(rank: int, **more: int) -> list[list[Row]]:
        sampler = sampler_of(split, world=world, rank=rank, **options, **more)
        sampler.fill_updates()
        return [rows for _, rows in sampler]

    ranks = [batches(rank) for rank in range(world)]
    steps = [[row for rank in together for row in rank] for together in zip(*ranks, strict=True)]
    assert len(steps) % every == 0
    updates = [[row for step in steps[i : i + every] for row in step] for i in range(0, len(steps), every)]
    seconds = sorted(sum(row.seconds for row in update) for update in updates)
    assert seconds[1] > 0.8 * 1600 and seconds[0] > 300 and len(updates) >= 8  # the last may have less
    counts = Counter(row.id for update in updates for row in update)
    assert len(counts) == 67 and len(set(counts.values())) == 1
    repeats = [(row.id, row.repeats) for update in updates for row in update]
    assert len(set(repeats)) == len(repeats)  # each with masks and crops of its own
    assert "an update is 8 batches of 200 s, all utterances" in caplog.text
    assert [[r.id for r in rows] for rows in batches(0, skip=11)] == [[r.id for r in rows] for rows in ranks[0]][11:]


def test_a_split_that_comes_rarely_and_is_less_than_an_update_is_heard_all_the_same() -> None:
    sampler = sampler_of(split_of([5.0] * 20, [20], [0.02]), accumulate=2, buffer=100)
    sampler.fill_updates()
    assert sum(len(rows) for _, rows in sampler) > 1


def test_a_pass_that_is_an_update_or_more_is_left_alone() -> None:
    split = split_of([9.0] * 16, [16])
    for every, count in ((8, 16), (4, 16), (1, 16)):
        sampler = sampler_of(split, crop=None, limit=18.0, accumulate=every)
        sampler.fill_updates()
        assert sum(len(rows) for _, rows in sampler) == count


@settings(max_examples=150, deadline=None)
@given(durations, sizes, st.sampled_from([(2, 1), (3, 1), (2, 2), (2, 3)]), st.fixed_dictionaries(shape))
def test_an_update_has_the_same_batches_however_many_processes_share_them(lengths, parts, product, options) -> None:
    size = math.prod(product)
    assume(sum(length >= 0.5 for length in lengths) >= size)
    split = split_of(lengths, parts)

    def updates(world: int) -> list[list[list[str]]]:
        every = size // world
        ranks = ids_of(plan(split, world=world, accumulate=every, **options))
        in_turn = [batch for together in zip(*ranks, strict=True) for batch in together]
        return [in_turn[i : i + size] for i in range(0, len(in_turn), size)]

    alone = updates(1)
    for world in {product[0], product[1], size}:
        shared = updates(world)
        assert shared[:-2] == alone[:-2] or all(len(batch) == 1 for batch in alone[-1])
        if len(alone[-1]) == size:  # else there is but one utterance in each of the last batches
            assert shared == alone
        elif len(alone[-1]) >= world:
            assert [sorted(chain(*update)) for update in shared] == [sorted(chain(*update)) for update in alone]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=6), min_size=1, max_size=4), worlds, st.integers(1, 3))
def test_updates_become_whole_without_loss_and_no_batch_grows_but_where_it_must(updates, world, every) -> None:
    """Batch sizes of each update; all but the last have as many as they need."""
    size = world * every
    updates = [(update * size)[:size] for update in updates[:-1]] + [updates[-1][:size]]
    names = iter(range(1000))
    before = [[[next(names) for _ in range(n)] for n in update] for update in updates]
    everything = [name for update in before for batch in update for name in batch]
    if len(everything) < world:
        with pytest.raises(UsageError, match=f"{len(everything)} utterances for {world}"):
            whole_updates(before, size, world)
        return
    whole = whole_updates(copy.deepcopy(before), size, world)
    assert sorted(name for update in whole for batch in update for name in batch) == everything
    assert all(len(update) == size for update in whole[:-1]) and all(map(all, whole))
    assert len(whole[-1]) % world == 0 and 0 < len(whole[-1]) <= size
    if len(before[-1]) == size:
        assert whole == before
        return
    assert whole[: len(before) - 2] == before[:-2]
    last_two = [batch for update in before[-2:] for batch in update]
    grown = [batch for update in whole for batch in update if not any(set(batch) <= set(old) for old in last_two)]
    grown = [batch for batch in grown if not any(batch in update for update in before)]
    spare = sum(len(batch) - 1 for batch in last_two)
    if spare >= size - len(before[-1]):  # enough to make all batches by splitting
        assert not grown and len(whole) == len(before) and len(whole[-1]) == size
    else:
        assert len(grown) < world and all(len(batch) == 2 for batch in grown)


# --- Real audio -------------------------------------------------------------------------------------------------------

KINDS = {"1": ("flac", 16_000, 1), "2": ("wav", 16_000, 1), "3": ("wav", 44_100, 2), "4": ("flac", 8_000, 1)}


def write_source(root: Path) -> Path:
    """Five loud utterances of each of five speakers, in files of several kinds and rates; the fifth to validate on."""
    rng = np.random.default_rng(0)
    for speaker, (kind, rate, channels) in {**KINDS, "5": ("flac", 16_000, 1)}.items():
        folder = root / ("dev" if speaker == "5" else "train") / speaker
        folder.mkdir(parents=True)
        texts = []
        for i in range(5):
            samples = rng.integers(-32_768, 32_768, (round(rng.uniform(2.0, 3.0) * rate), channels), dtype=np.int16)
            soundfile.write(folder / f"{speaker}-{i}.{kind}", samples, rate)
            texts.append(f"{speaker}-{i} SUN AND MOON\n")
        (folder / f"{speaker}.trans.txt").write_text("".join(texts))
    return root


def prepared(source: Path | str, out: Path, shards: str = "", **options) -> Path:
    with ThreadPoolExecutor(1) as executor:
        prepare(source, out, PrepareConfig(shards=shards, shard_mb=0.25, **options), executor=executor)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def corpora(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source prepared without shards (``files``) and with, by their encoding."""
    out = tmp_path_factory.mktemp("corpora")
    found = {kind or "files": prepared(source, out / (kind or "files"), kind) for kind in ("", "flac", "wav", "opus")}
    for kind in ("flac", "wav"):
        assert len(read_corpus(found[kind])["train"].pieces) > 2
    return found


def module(splits, **options) -> SpeechDataModule:
    if isinstance(splits, (str, Path)):
        splits = read_corpus(splits)
    data = {"batch_seconds": 5.0, "max_seconds": 1.5, "min_seconds": 1.0, "num_buckets": 2, "num_workers": 0} | options
    return SpeechDataModule(splits, DataConfig(**data), seed=3)


def batches_of(data: SpeechDataModule, epoch: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def names_of(batches: list[Batch]) -> Counter[str]:
    return Counter(name for batch in batches for name in batch.ids)


def everyone() -> Counter[str]:
    return Counter(f"{speaker}-{i}" for speaker in KINDS for i in range(5))


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert [batch.ids for batch in one] == [batch.ids for batch in two]
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(one, two, strict=True))


def reference(source: Path, name: str) -> np.ndarray:
    """The whole utterance at 16 kHz, mono, without code of ours."""
    (path,) = [path for path in source.rglob(f"{name}.*") if path.suffix != ".txt"]
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(1), rate, RATE)


def lies_in(crop: np.ndarray, whole: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(whole, 16)
    starts = np.flatnonzero((windows == crop[:16]).all(1))
    return any(np.array_equal(whole[start : start + len(crop)], crop) for start in starts)


@pytest.mark.parametrize("kind", ["files", "flac", "wav"])
def test_audio_of_every_rate_is_that_of_the_source_whole(source: Path, corpora: dict[str, Path], kind: str) -> None:
    for cut in read_corpus(corpora[kind])["train"]:
        got, whole = SpeechDataset()[(0, 0), rows_of([cut])].audio[0].numpy(), reference(source, cut.id)
        if cut.id[0] in "12":
            np.testing.assert_array_equal(got, whole)
        else:  # 16 bits are kept, also of what resampling puts above full scale
            np.testing.assert_allclose(got, whole, atol=max(1.0, np.abs(whole).max()) / 32_000)


def test_opus_shards_hold_the_utterances_in_their_length(source: Path, corpora: dict[str, Path]) -> None:
    for cut in read_corpus(corpora["opus"])["train"]:
        got, whole = SpeechDataset()[(0, 0), rows_of([cut])].audio[0].numpy(), reference(source, cut.id)
        assert len(got) == len(whole)
        assert np.corrcoef(got, whole)[0, 1] > 0.5  # noise, so little more can be asked


@pytest.mark.parametrize("kind", ["flac", "wav"])
def test_crops_from_shards_are_those_from_the_files_sample_by_sample(corpora: dict[str, Path], kind: str) -> None:
    files = [c for c in read_corpus(corpora["files"])["train"] if c.id[0] in "12"]
    shards = {cut.id: cut for cut in read_corpus(corpora[kind])["train"]}
    dataset = SpeechDataset(seed=1, max_seconds=1.5, same_length=True)
    for epoch in range(3):
        for cuts in (files[:3], files[3:6], files[6:]):
            one, two = dataset[(epoch, 0), rows_of(cuts)], dataset[(epoch, 0), rows_of(shards[cut.id] for cut in cuts)]
            assert not one.bad and one.audio.shape == (len(cuts), 24_000)
            assert_same([one], [two])


@pytest.mark.parametrize("kind", ["files", "flac", "wav", "opus"])
def test_workers_change_nothing_in_the_batches(source: Path, corpora: dict[str, Path], kind: str) -> None:
    alone = batches_of(module(corpora[kind]), epoch=2)
    assert names_of(alone) == everyone()
    if kind != "opus":
        for batch in alone:
            for name, row in zip(batch.ids, batch.audio.numpy(), strict=True):
                assert name[0] not in "12" or lies_in(row, reference(source, name))
    for workers in (1, 3):
        assert_same(batches_of(module(corpora[kind], num_workers=workers), epoch=2), alone)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_crop_of_a_long_remote_file_asks_for_its_part_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "served").mkdir()
    samples = np.random.default_rng(1).integers(-20_000, 20_000, 150 * RATE, dtype=np.int16)
    path = tmp_path / "served" / f"long.{kind}"
    soundfile.write(path, samples, RATE)
    with serve(tmp_path / "served") as server:
        table = tmp_path / "table.csv"
        url = f"{server.url}/long.{kind}"
        table.write_text(f"path,start,end,split\n{url},0,30,train\n{url},100,140,train\n{url},0,20,valid\n")
        splits = read_corpus(prepared(table, tmp_path / "out"))
        cuts = sorted(splits["train"], key=lambda cut: cut.start)
        server.log.clear()
        batch = SpeechDataset(max_seconds=2.0, same_length=True)[(0, 0), rows_of(cuts[-1:])]
        assert 0 < server.bytes < path.stat().st_size / 4
    assert lies_in(batch.audio[0].numpy(), samples[100 * RATE : 140 * RATE].astype(np.float32) / 32_768)


# --- Remote -----------------------------------------------------------------------------------------------------------

FAULTS = Faults(error=0.1, cut=0.1, seed=1)


def damage(corpus: Path, name: str) -> None:
    """Overwrite the beginning of an utterance in its shard."""
    (cut,) = [cut for cut in read_corpus(corpus)["train"] if cut.id == name]
    with open(cut.recording.sources[0].source, "r+b") as file:
        file.seek(cut.custom["shard_offset"])
        file.write(b"\0" * (cut.custom["shard_bytes"] // 2))


def run_rank(rank: int, port: int, url: str, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    storage.BACKOFF = 0.001
    torch.distributed.init_process_group("gloo")
    data = module(url, num_workers=2, max_bad="5%")
    passes = [batches_of(data, epoch) for epoch in range(2)]
    saved = [[(b.ids, b.audio, list(b.bad)) for b in batches] for batches in passes]
    torch.save(saved, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_with_two_workers_share_a_corpus_of_a_faulty_server(
    source: Path, corpora: dict[str, Path], tmp_path: Path
) -> None:
    """One utterance of twenty is damaged, as many as are allowed, whichever process meets it."""
    shutil.copytree(corpora["flac"], tmp_path / "corpus")
    damage(tmp_path / "corpus", "1-2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve(tmp_path / "corpus", replace(FAULTS)) as server:
        torch.multiprocessing.start_processes(
            run_rank, args=(port, server.url, tmp_path), nprocs=2, start_method="fork"
        )
        assert {"error", "cut"} <= {request.outcome for request in server.log}
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one, two in zip(*ranks, strict=True):
        assert len(one) == len(two) > 1
        assert Counter(name for ids, _, _ in one + two for name in ids) == everyone() - Counter(["1-2"])
        assert [name for _, _, bad in one + two for name in bad] == ["1-2"]
        for ids, audio, _ in one + two:
            for name, row in zip(ids, audio.numpy(), strict=True):
                assert name[0] not in "12" or lies_in(row, reference(source, name))


def test_batches_from_s3_are_those_from_disk(corpora: dict[str, Path]) -> None:
    with s3_server() as s3:
        remote = read_corpus(s3.upload(corpora["flac"], "a/corpus"))
        assert list(remote) == ["train", "valid"]
        for workers in (0, 2):
            assert_same(batches_of(module(remote, num_workers=workers)), batches_of(module(corpora["flac"])))


def nano_here(**options):
    config = nano(**({"val_every": 4, "checkpoint_every": 1, "max_steps": 4} | options))
    config.data.min_seconds, config.data.num_workers = 1.0, 0
    return config


def test_pretraining_from_a_faulty_server_gives_the_numbers_of_local_disk(
    corpora: dict[str, Path], tmp_path: Path, impatient: None
) -> None:
    config = nano_here()
    pretrain(config, read_corpus(corpora["flac"]), tmp_path / "disk")
    config.data.num_workers = 2
    with serve(corpora["flac"], replace(FAULTS, error=0.05, cut=0.05)) as server:
        pretrain(config, read_corpus(server.url), tmp_path / "http")
        assert {"error", "cut"} & {request.outcome for request in server.log}
    same_numbers(tmp_path / "disk", tmp_path / "http")


# --- Resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(corpora: dict[str, Path]):
    """Shards of several pieces and files, one and a half times and half a time a pass."""
    return read_corpora([str(corpora["flac"]), str(corpora["files"])], [1.5, 0.5])


@pytest.fixture(scope="module")
def uninterrupted(mixed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run of a pass and a bit more, and the steps of its first pass."""
    config = nano_here(val_every=100)
    config.data.batch_seconds = 10.0
    steps = len(batches_of(SpeechDataModule(mixed, config.data, seed=config.train.seed)))
    config.train.max_steps = steps + 3
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config, mixed, out)
    return out, steps


@pytest.mark.parametrize(
    ("after", "workers", "validate"), [(-2, (0, 2), False), (0, (2, 1), False), (0, (0, 0), True), (2, (1, 0), False)]
)
def test_a_run_resumed_around_the_end_of_a_pass_with_other_workers_gives_the_same_numbers(
    mixed, uninterrupted: tuple[Path, int], tmp_path: Path, after: int, workers: tuple[int, int], validate: bool
) -> None:
    whole, steps = uninterrupted
    config = nano_here(max_steps=steps + after, val_every=steps if validate else 100)
    config.data.batch_seconds, config.data.num_workers = 10.0, workers[0]
    out = tmp_path / "run"
    pretrain(config, mixed, out)
    config.train.max_steps, config.data.num_workers = steps + 3, workers[1]
    pretrain(config, mixed, out, resume=True)
    trained = [[row for row in figures(run) if row["train/loss"]] for run in (whole, out)]
    assert [row["step"] for row in trained[0]] == [str(i + 1) for i in range(steps + 3)]
    assert trained[0] == trained[1]


def test_a_corpus_of_less_than_an_update_is_heard_in_whole_updates_resumed_and_validated_at_the_end(
    tmp_path: Path,
) -> None:
    for i, part in enumerate(("train", "train", "train", "dev")):
        (folder := tmp_path / "in" / part / f"s{i}").mkdir(parents=True)
        soundfile.write(folder / "a.flac", sound(2.0 + 0.3 * i, i), RATE)
    splits = read_corpus(tmp_path / "in")
    for name, ends in (("whole", [5]), ("resumed", [3, 5])):
        for end in ends:
            config = nano(accumulate=4, val_every=2, checkpoint_every=3, max_steps=end)
            pretrain(config, splits, tmp_path / name, resume=end > ends[0])
    rows = [[row for row in figures(tmp_path / name) if row["train/loss"]] for name in ("whole", "resumed")]
    assert rows[0] == rows[1]
    heard = [3600 * float(row["train/hours_heard"]) for row in rows[0]]
    assert heard == pytest.approx([16.0 * step for step in range(1, 6)])  # 4 batches of 2 crops of 2 s
    lines = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    loss, step = (lines[0].split(",").index(name) for name in ("valid/loss", "step"))
    assert [line.split(",")[step] for line in lines[1:] if line.split(",")[loss]] == ["2", "4", "5"]


def figures(run: Path) -> list[dict[str, str]]:
    names, *lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    timed = ("train/audio_seconds_per_second", "train/wait_share", "train/flops_utilisation")
    keep = [i for i, name in enumerate(names) if name == "step" or (name.startswith("train/") and name not in timed)]
    return [{names[i]: line[i] for i in keep} for line in lines]


# --- Bad audio --------------------------------------------------------------------------------------------------------


@pytest.fixture
def breakable(corpora: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that may be damaged."""
    return {kind: Path(shutil.copytree(corpora[kind], tmp_path / kind)) for kind in ("flac", "wav")}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_member_of_a_shard_is_left_out_and_named_within_max_bad_and_refused_beyond(
    breakable: dict[str, Path], caplog: pytest.LogCaptureFixture, remote: bool, workers: int
) -> None:
    damage(breakable["flac"], "2-3")
    damage(breakable["flac"], "1-1")
    with serve(breakable["flac"]) as server:
        root = server.url if remote else breakable["flac"]
        with caplog.at_level(logging.WARNING, "w2v2"):
            left = batches_of(module(root, num_workers=workers, max_bad="10%"))
        assert names_of(left) == everyone() - Counter(["2-3", "1-1"])
        said = [record.message for record in caplog.records if "left out" in record.message]
        assert len(said) == 2 and all(any(name in line for line in said) for name in ("(2-3)", "(1-1)"))
        with pytest.raises(JobError, match=r"2 utterances cannot be read, more than `data.max_bad` 5% of 20") as caught:
            batches_of(module(root, num_workers=workers, max_bad="5%"))
        assert "(2-3)" in str(caught.value) and "(1-1)" in str(caught.value) and "\n" not in str(caught.value)


def test_workers_of_a_loader_that_is_garbage_end_when_they_are_told_to(corpora: dict[str, Path]) -> None:
    def begun() -> list[multiprocessing.Process]:
        loader = module(corpora["flac"], num_workers=2).train_dataloader()
        cycle = [loader, iter(loader)]
        next(cycle[1])
        cycle.append(cycle)
        return loader._iterator._workers

    workers = begun()
    gc.collect()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_an_utterance_that_is_bad_in_every_pass_counts_once(breakable: dict[str, Path]) -> None:
    damage(breakable["flac"], "2-3")
    loader = module(breakable["flac"], max_bad="5%").train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        assert names_of(list(loader)) == everyone() - Counter(["2-3"])


@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_that_is_gone_or_cut_off_takes_its_own_utterances_alone(
    breakable: dict[str, Path], remote: bool
) -> None:
    first, second = read_corpus(breakable["flac"])["train"].pieces[:2]
    Path(first.audio).unlink()
    lost = {cut.id for cut in first.read()}
    cuts = list(second.read())
    os.truncate(second.audio, cuts[-1].custom["shard_offset"] + 100)
    lost.add(cuts[-1].id)
    with serve(breakable["flac"]) as server:
        root = server.url if remote else breakable["flac"]
        assert names_of(batches_of(module(root, max_bad="100%"))) == everyone() - Counter(lost)
        with pytest.raises(JobError, match=r"cannot be read.*recording\.0000"):
            batches_of(module(root, max_bad="0"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_goes_for_good_is_a_failure_and_no_hang(
    corpora: dict[str, Path], impatient: None, workers: int
) -> None:
    with serve(corpora["flac"]) as server:
        batches = iter(module(server.url, num_workers=workers).train_dataloader())
        assert next(batches).ids
        server.faults = Faults(error=1.0)
        server.log.clear()
        with pytest.raises(storage.UnreachableError, match=r"HTTP 500.*at the last of 8 attempts"):
            list(batches)


def test_a_server_that_is_gone_is_one_line_of_the_command(
    corpora: dict[str, Path], tmp_path: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = [path.relative_to(corpora["flac"]) for path in corpora["flac"].rglob("*.tar")]
    with serve(corpora["flac"], Faults(statuses={f"/{path}": 503 for path in tars})) as server:
        call = ["pretrain", "tiny", "--data", server.url, "--out", str(tmp_path / "run"), "--train.max-steps", "1"]
        assert main(call) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("w2v2:")]
    assert len(said) == 1 and "503" in said[0] and server.url in said[0]


@pytest.mark.parametrize("how", ["not gzip", "cut off", "flipped"])
def test_a_damaged_manifest_is_named(breakable: dict[str, Path], how: str) -> None:
    splits = read_corpus(breakable["wav"])
    path = Path(splits["train"].pieces[-1].manifest)
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    path.write_bytes({"not gzip": b"<html>", "cut off": good[:middle], "flipped": flipped}[how])
    with pytest.raises(JobError, match=f"{path} is damaged"):
        batches_of(module(splits))


def test_an_address_with_something_else_than_a_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("<html>Welcome</html>")
    with serve(tmp_path) as server, pytest.raises(UsageError, match=r"corpus\.json is not JSON"):
        read_corpus(server.url)


def test_another_rate_in_a_shard_or_a_file_cannot_pass(breakable: dict[str, Path], tmp_path: Path) -> None:
    cut = next(iter(read_corpus(breakable["wav"])["train"]))
    with open(cut.recording.sources[0].source, "r+b") as file:
        file.seek(cut.custom["shard_offset"] + 24)  # the rate's place in a WAV header
        assert int.from_bytes(file.read(4), "little") == RATE
        file.seek(-4, os.SEEK_CUR)
        file.write((8_000).to_bytes(4, "little"))
    with pytest.raises(JobError, match=rf"\({cut.id}\): it has 8000 Hz, the manifest says 16000"):
        batches_of(module(breakable["wav"]))
    source = write_source(tmp_path / "source")
    corpus = prepared(source, tmp_path / "out")
    samples, _ = soundfile.read(source / "train" / "2" / "2-0.wav")
    soundfile.write(source / "train" / "2" / "2-0.wav", np.tile(samples, 3), 44_100)
    with pytest.raises(JobError, match=r"\(2-0\): it has 44100 Hz, the manifest says 16000"):
        batches_of(module(corpus))


# --- Memory -----------------------------------------------------------------------------------------------------------


def many_rows(root: Path, rows: int, piece: int) -> Split:
    """Manifests of so many cuts."""
    pieces = []
    template = json.dumps(cut_of("NAME", 3.0).to_dict())
    for start in range(0, rows, piece):
        path = root / f"cuts.{start:07d}.jsonl.gz"
        lines = [template.replace("NAME", f"utterance-{i}") for i in range(start, min(rows, start + piece))]
        path.write_bytes(gzip.compress("\n".join(lines).encode(), 1))
        pieces.append(Piece(manifest=str(path), utterances=len(lines), seconds=3.0 * len(lines)))
    return Split(tuple(pieces), 1, rows)


def peak_of_a_pass(split: Split) -> tuple[int, int]:
    """Most bytes of Python's held at once while a pass is planned, and its utterances."""
    sampler = sampler_of(split, limit=87.5, crop=15.0, buffer=500)
    tracemalloc.start()
    try:
        count = sum(len(rows) for _, rows in sampler)
        return tracemalloc.get_traced_memory()[1], count
    finally:
        tracemalloc.stop()


def test_planning_a_pass_takes_no_more_memory_for_more_rows(tmp_path: Path) -> None:
    splits = [many_rows(tmp_path, rows, 100) for rows in (2_000, 16_000)]
    # How far the reading thread is when a window is planned is chance: two windows are held, or three.
    passes = [[peak_of_a_pass(split) for _ in range(5)] for split in splits]
    (small, few), (big, many) = max(passes[0]), min(passes[1])
    assert (few, many) == (2_000, 16_000)
    assert big < 1.3 * small
    assert big < 16_000 * 200  # less than their lines alone would take


# --- Verbs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus: one utterance of speaker 1 without a transcript, one of 2 with too long a one; a subset."""
    root = tmp_path_factory.mktemp("spoken")
    source = write_source(root / "source")
    one, two = (source / "train" / speaker / f"{speaker}.trans.txt" for speaker in "12")
    one.write_text("".join(one.read_text().splitlines(keepends=True)[1:]))
    two.write_text("".join([f"2-0 {'LONG WORDS ' * 60}\n", *two.read_text().splitlines(keepends=True)[1:]]))
    (root / "few.txt").write_text("3-0\n3-1\n4-0\n")
    return prepared(source, root / "corpus", labelled=(f"few={root / 'few.txt'}",))


def test_fine_tuning_leaves_out_and_counts_what_has_no_transcript_or_too_long_a_one(
    spoken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = read_corpus(spoken)
    assert [cut.id for cut in splits["train"] if (cut.custom or {}).get("ctc_infeasible")] == ["2-0"]
    config = DataConfig(batch_seconds=9.0, num_workers=0, min_seconds=1.0)
    data = SpeechDataModule(splits, config, encode=lambda text: [ord(c) for c in text])
    with caplog.at_level(logging.INFO, "w2v2"):
        batches = batches_of(data)
    assert names_of(batches) == everyone() - Counter(["1-0", "2-0"])
    assert all(batch.audio.numel() <= 9 * RATE for batch in batches)
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert sorted(said) == [
        "train: 1 utterances with more labels than CTC can emit in their frames left out",
        "train: 1 utterances without a transcript left out",
    ]


def test_the_command_trains_on_a_split_of_several_corpora_with_their_weights(
    spoken: Path, corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    small = ["--model.n-layer", "1", "--model.n-embd", "48", "--model.ffn-dim", "48", "--train.max-steps", "1"]
    both = ["--data", str(spoken), "--data", str(corpora["flac"])]
    call = ["finetune", "tiny_ctc", *both, "--data.weights", "2", "0.5", *small, "--out"]
    assert main([*call, str(out), "--data.train-split", "train-few"]) == 0
    config = json.loads((out / "config.json").read_text())["data"]
    assert config["sources"] == [str(spoken), str(corpora["flac"])]
    assert (config["weights"], config["train_split"]) == ([2.0, 0.5], "train-few")
    data = json.loads((out / "environment.json").read_text())["data"]
    assert (data["train"]["utterances"], data["valid"]["utterances"]) == (3, 10)
    capsys.readouterr()
    assert main([*call, str(tmp_path / "no"), "--data.train-split", "train-many"]) == 2
    assert "no split 'train-many'" in capsys.readouterr().err
    assert main(["finetune", "tiny_ctc", *both, "--data.weights", "2", *small]) == 2
    assert "one number for each of the 2 corpora, got 1" in capsys.readouterr().err


def test_weights_of_the_command_are_those_of_each_corpus(spoken: Path, corpora: dict[str, Path]) -> None:
    splits = read_corpora([str(spoken), str(corpora["flac"])], [2.0, 0.5])
    seen: Iterator[Counter[str]] = (names_of(batches_of(module(splits, max_bad="0"), epoch)) for epoch in range(2))
    assert sum(seen, Counter()) == Counter({name: 4 + 1 for name in everyone()})
    assert {piece.weight for piece in splits["valid"].pieces} == {1.0}
