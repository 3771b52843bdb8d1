"""Masks as previewed, against exact probabilities and enumeration."""

import itertools
import json
from dataclasses import dataclass
from math import comb
from pathlib import Path

import pytest
import torch

from w2v2 import recipes
from w2v2.cli import main
from w2v2.errors import UsageError
from w2v2.mask_preview import measure_spans, preview_masks
from w2v2.model.wav2vec2 import ContrastiveConfig


def exact_coverage(frames: int, prob: float, span: int, min_spans: int = 2) -> float:
    """Share of frames masked: n distinct starts of C, each start equally likely, the last frame never masked.

    A frame is left alone when none of the k starts that reach it is drawn: C(C - k, n) / C(C, n).
    """
    low = int(prob * frames / span)
    up = prob * frames / span - low
    total = 0.0
    for n, chance in ((low, 1 - up), (low + 1, up)):
        n = min(max(n, min_spans), frames - 1)
        starts = frames - span if frames - span > n else max(frames - n - 1, n)
        for t in range(frames - 1):
            reach = min(t, starts - 1) - max(t - span + 1, 0) + 1
            total += chance * (1 - comb(starts - max(reach, 0), n) / comb(starts, n))
    return total / frames


@pytest.mark.parametrize(("prob", "span"), [(0.65, 10), (0.65, 5), (0.3, 20)])
def test_coverage_as_drawn_is_the_exact_one(prob: float, span: int) -> None:
    config = recipes.paper_base()
    config.model.mask_prob, config.model.mask_length = prob, span
    for row in preview_masks(config, [1, 2, 4, 8, 15.6], 4000):
        assert row.drawn.coverage == pytest.approx(exact_coverage(row.frames, prob, span), abs=0.01), row.seconds
    assert row.expected == pytest.approx(row.drawn.coverage, abs=0.015)


def test_the_exact_probability_is_that_of_all_ways_to_choose_the_starts() -> None:
    frames, span, n = 12, 3, 2
    ways = list(itertools.combinations(range(frames - span), n))
    masked = [len({t for s in starts for t in range(s, s + span)} - {frames - 1}) for starts in ways]
    assert exact_coverage(frames, n * span / frames, span) == pytest.approx(sum(masked) / len(ways) / frames)


def test_equalised_coverage_is_that_of_the_row_with_fewest() -> None:
    config = recipes.paper_base()
    (row,) = preview_masks(config, [15.6], 2000)
    assert row.rows == 5
    # Of five draws of a normal distribution the least lies 1.163 standard deviations below the mean.
    drawn = [
        config.model.sample_mask(row.frames, torch.Generator().manual_seed(i)).float().mean().item()
        for i in range(2000)
    ]
    expected = torch.tensor(drawn).mean() - 1.163 * torch.tensor(drawn).std()
    assert row.equalized.coverage == pytest.approx(expected.item(), abs=0.005)
    assert row.equalized.fragmented > row.drawn.fragmented == 0


@pytest.mark.parametrize("seconds", [0.08, 0.1, 0.2, 0.3, 0.5])
def test_short_clips_are_masked_but_not_whole(seconds: float) -> None:
    config = recipes.base()
    (row,) = preview_masks(config, [seconds], 500)
    assert row.drawn.coverage == pytest.approx(exact_coverage(row.frames, 0.65, 10), abs=0.015)
    assert 2 / row.frames - 1e-6 <= row.equalized.coverage <= (row.frames - 1) / row.frames + 1e-6


def test_a_clip_of_less_than_three_frames_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"at least 3 frames to mask, got 0.04 s: 2 frames"):
        preview_masks(recipes.base(), [0.04], 10)
    assert main(["mask-preview", "base", "--durations", "0.04"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_spans_are_counted_as_by_hand() -> None:
    rows = ["0110011100", "1111100001", "0000000000"]
    spans = measure_spans(torch.tensor([[c == "1" for c in row] for row in rows]), 3)
    assert spans.coverage == pytest.approx(11 / 30)
    assert (spans.count, spans.mean, spans.median) == (pytest.approx(4 / 3), 2.75, 2.5)
    assert spans.fragmented == 0.5


def test_a_model_of_ones_own_is_asked_for_its_own_masks() -> None:
    @dataclass(kw_only=True)
    class Comb(ContrastiveConfig):
        def sample_mask(self, n_frames, rng):
            return torch.arange(n_frames) % 4 == 0

    config = recipes.base()
    config.model = Comb()
    (row,) = preview_masks(config, [8.0], 20)
    assert row.frames == 400
    assert row.drawn.coverage == row.equalized.coverage == 0.25
    assert row.drawn.mean == 1


def test_the_command_gives_a_table_json_and_the_corpus_own_durations(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--draws", "40"]
    assert main(["mask-preview", "tiny", *few, "--durations", "1", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    half = ["--model.mask-prob", "0.3", "--data.max-seconds", "2.5"]
    assert main(["mask-preview", "tiny", "--json", *few, "--data", str(corpus), *half]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(2.0 <= row["seconds"] <= 2.5 for row in rows) and len(rows) >= 2
    assert all(0.2 < row["drawn"]["coverage"] < 0.33 for row in rows)
