"""Which utterances of a split come in a pass, and in which order they are read."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from itertools import islice

from w2v2.data.batch import Fits
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Row, Split
from w2v2.errors import UsageError

log = logging.getLogger(__name__)


class Passes:
    """The usable utterances of a split, in the order of each pass; logs once how many are not usable.

    A piece of weight w gives each of its utterances w times a pass, or ``times`` as often. For a w that is not whole,
    utterances take turns, so that after n passes each has come n·w times, rounded up or down.

    Args:
        name, split: of the utterances.
        config: ``min_seconds`` of it leaves out shorter ones.
        labelled: leave out what has no transcript, or one that does not fit.
        shuffle, seed: of the pieces.
        fits: whether a transcript fits; None: what was noted when the corpus was prepared.

    Raises:
        UsageError: not one utterance is usable.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        config: DataConfig,
        *,
        labelled: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        fits: Fits | None = None,
    ) -> None:
        self.name, self.split, self.config = name, split, config
        self.labelled, self.shuffle, self.seed = labelled, shuffle, seed
        self.fits = fits
        self.left_out: Counter[str] = Counter()
        """Of the pass so far, by what is wrong with them."""
        self.logged = False
        self.times = 1  # that a pass goes over the split
        if self.count(1) == 0:
            kind = "with a transcript " if labelled else ""
            raise UsageError(
                f"no utterance {kind}of the {name} split is as long as `data.min_seconds` {config.min_seconds:g}; "
                "lower it, or add audio"
            )

    def count(self, enough: int) -> int:
        """The most usable utterances of a pass, counted no further than to so many."""
        pieces = (piece for piece in self.split.pieces for _ in range(math.ceil(piece.weight * self.times)))
        rows = (row for piece in pieces for row in piece.rows() if not self._fault(row))
        return sum(1 for _ in islice(rows, enough))

    def _fault(self, row: Row) -> str:
        if row.seconds < self.config.min_seconds and not row.utterance().unreadable:
            return f"shorter than {self.config.min_seconds:g} s"
        if self.labelled:
            utterance = row.utterance()
            text = utterance.text or ""
            if not text.strip():
                return "without a transcript"
            if utterance.ctc_infeasible if self.fits is None else not self.fits(row.seconds, text):
                return "with more labels than CTC can emit in their frames"
        return ""

    def turns(self, epoch: int) -> list[tuple[int, int]]:
        """The pieces of a pass in its order, as (piece, for which time)."""
        weights = [piece.weight * self.times for piece in self.split.pieces]
        turns = [(i, n) for i, weight in enumerate(weights) for n in range(math.ceil(weight))]
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(turns)
        return turns

    def rows(self, epoch: int, number: int, turn: tuple[int, int]) -> list[Row]:
        """The usable utterances of the piece that comes as the ``number``-th of a pass."""
        piece = self.split.pieces[turn[0]]
        rows = []
        for row in piece.rows(number):
            if (weight := piece.weight * self.times) != 1.0:
                phase = random.Random(f"{self.seed}/{row.id}").random()
                before, after = (int(passes * weight + phase) for passes in (epoch, epoch + 1))
                if before + turn[1] >= after:
                    continue
                row = row._replace(repeats=before + turn[1])
            if fault := self._fault(row):
                self.left_out[fault] += 1
            else:
                rows.append(row)
        return rows

    def report(self) -> None:
        """Log, once, what was left out of a pass."""
        if not self.logged:
            for fault, count in self.left_out.items():
                log.info("%s: %d utterances %s left out", self.name, count, fault)
        self.logged = True
