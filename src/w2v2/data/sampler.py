"""Which utterances make up which batch of which rank, from metadata alone.

A pass goes over the pieces of a split in a keyed order and reads some at a time: a window. Its utterances are shuffled,
sorted into buckets of similar duration, cut into batches in the order of the buckets, and these into updates: as many
for each rank as it accumulates, all of similar utterances, so that none waits long for another. The updates of a window
are shuffled. What is left over of a window, too little for an update, goes into the next one.
"""

from __future__ import annotations

import logging
import math
import random
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeVar

from w2v2.data.corpora import Row
from w2v2.data.passes import Passes
from w2v2.errors import UsageError

T = TypeVar("T")
log = logging.getLogger(__name__)

_UPDATES = 8  # of a pass over a small split at least: in one of so many something may be missing
_PIECES = 8
"""Of which a window is made, at least, where they are shuffled."""


@dataclass(frozen=True)
class Position:
    """Where in a pass a window begins: all that planning needs to go on from there."""

    epoch: int = 0
    steps: int = 0
    """Batches of each rank in the pass before it."""
    turn: int = 0
    """Pieces before it."""
    carried: tuple[tuple[int, int], ...] = ()
    """Places of the utterances that were left over of the window before."""


class EpochSampler:
    """Yields ((epoch, number in it), rows) of one rank's batches; where they stand travels with them to any worker.

    What is in an update depends on the split, the seed, the epoch and the number of its batches: not on how many of
    them come at once or one after another, nor on workers. Every utterance of a pass goes to exactly one rank, and
    all ranks get as many batches.

    Args:
        passes: the utterances.
        batch_seconds: audio in a batch at most, each utterance counted as long as the longest; a longer one is alone.
        max_seconds: what counts of an utterance at most, as it will be cropped.
        num_buckets: groups of similar duration in a window.
        buffer: utterances of a window, at least: what shuffling can reach, and what bounds memory.
        rank, world_size: this process and how many there are.
        accumulate: batches of each for an update.
        skip: batches of the first pass that a run had before it was resumed; nothing is decoded for them.
        start: of the last window before these, if known; otherwise the pass is planned up to there.

    Raises:
        UsageError: fewer utterances than ranks.
    """

    def __init__(
        self,
        passes: Passes,
        *,
        batch_seconds: float,
        max_seconds: float | None = None,
        num_buckets: int = 10,
        buffer: int = 10_000,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        skip: int = 0,
        start: Position | None = None,
    ) -> None:
        self.passes, self.rank, self.world_size = passes, rank, world_size
        self.update = world_size * accumulate  # batches
        self.batch_seconds, self.max_seconds = batch_seconds, max_seconds or math.inf
        self.num_buckets, self.enough = num_buckets, max(buffer, self.update)
        self.skip, self.start = skip, start
        self.epoch = 0
        self.windows: list[Position] = []
        """Those that began since somebody last asked for a position."""
        if (count := passes.count(world_size)) < world_size:
            raise UsageError(
                f"the {passes.name} split has {count} utterances for {world_size} processes; use fewer processes"
            )

    def fill_updates(self) -> None:
        """Let a pass go over a split several times that is less than one update: else each would be as small as it."""
        split = self.passes.split
        if self.update == 1 or len(split) > self.enough:
            return
        rows = [row for turn in enumerate(self.passes.turns(0)) for row in self.passes.rows(0, *turn)]
        self.passes.left_out.clear()
        if (batches := len(self._batches(rows, random.Random(0)))) >= self.update:
            return
        seconds = sum(min(row.seconds, self.max_seconds) for row in rows)
        self.passes.times = math.ceil(_UPDATES * self.update * self.batch_seconds / max(seconds, 1.0))
        if self.rank == 0:
            what = f"an update is {self.update} batches of {self.batch_seconds:g} s, all utterances {batches} of them"
            log.warning("%s: %s: a pass takes each %d times", self.passes.name, what, self.passes.times)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each pass."""
        self.epoch = epoch

    def position(self, steps: int) -> Position:
        """Where the window began that the step after so many is in."""
        while len(self.windows) > 1 and self.windows[1].steps <= steps:
            del self.windows[0]
        return self.windows[0] if self.windows else Position(self.epoch)

    def __iter__(self) -> Iterator[tuple[tuple[int, int], list[Row]]]:
        skip, self.skip = self.skip, 0
        start, self.start = self.start, None
        if start is None or start.epoch != self.epoch or start.steps > skip:
            start = Position(self.epoch)
        for number, step in enumerate(islice(self._steps(start), skip - start.steps, None), skip):
            yield (start.epoch, number), step[self.rank]

    def _steps(self, start: Position) -> Iterator[list[list[Row]]]:
        """Steps of a pass from a window on, while a thread reads the next one."""
        self.windows = []
        turns = self.passes.turns(start.epoch)
        carried = []
        for number in dict.fromkeys(number for number, _ in start.carried):
            rows = self.passes.rows(start.epoch, number, turns[number])
            carried += [row for row in rows if row.place in start.carried]
        windows = self._windows(start, turns)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(next, windows, None)
            while window := ahead.result():
                turn, rows, last = window
                ahead = reader.submit(next, windows, None)
                self.windows.append(replace(start, turn=turn, carried=tuple(row.place for row in carried)))
                steps, carried = self._plan([*carried, *rows], f"{start.epoch}/{turn}", last)
                start = replace(start, steps=start.steps + len(steps))
                yield from steps
                del window, rows, steps  # before the one after the next is read

    def _windows(self, start: Position, turns: list[tuple[int, int]]) -> Iterator[tuple[int, list[Row], bool]]:
        """(pieces before it, utterances, whether it is the last) of each window from one on.

        The last is enough for an update, unless it is the only one.
        """
        self.passes.left_out.clear()
        begin, end = start.turn, start.turn
        rows: list[Row] = []
        ahead: list[Row] = []
        for number in range(start.turn, len(turns)):
            part = self.passes.rows(start.epoch, number, turns[number])
            if len(rows) < self.enough or (self.passes.shuffle and end - begin < _PIECES):
                rows, end = rows + part, number + 1
                continue
            ahead += part
            if len(ahead) >= self.update:
                yield begin, rows, False
                rows, ahead, begin, end = ahead, [], end, number + 1
        yield begin, rows + ahead, True
        if start.turn == 0:
            self.passes.report()

    def _plan(self, rows: list[Row], key: str, last: bool) -> tuple[list[list[list[Row]]], list[Row]]:
        """Steps of a window, and the utterances left over, unless it is the last."""
        rng = random.Random(f"{self.passes.seed}/{key}")
        batches = self._batches(rows, rng)
        whole, spare = divmod(len(batches), self.update)
        at = self.update * rng.randint(0, whole) if self.passes.shuffle else 0  # none is always the one left over
        rest = batches[at : at + spare]
        del batches[at : at + spare]
        updates = [batches[i : i + self.update] for i in range(0, len(batches), self.update)]
        if self.passes.shuffle:
            rng.shuffle(updates)
        if last and rest:
            updates, rest = whole_updates([*updates, rest], self.update, self.world_size), []
        steps = [update[i : i + self.world_size] for update in updates for i in range(0, len(update), self.world_size)]
        return steps, list(chain.from_iterable(rest))

    def _batches(self, rows: list[Row], rng: random.Random) -> list[list[Row]]:
        """Batches of a window, of similar utterances."""

        def seconds(row: Row) -> float:
            return min(row.seconds, self.max_seconds)

        rows.sort(key=lambda row: (seconds(row), row.place))  # carried rows come in another order where a run goes on
        if self.passes.shuffle:
            bounds = [seconds(row) for row in rows[:: math.ceil(len(rows) / self.num_buckets) or 1]]
            rng.shuffle(rows)
            rows.sort(key=lambda row: bisect_right(bounds, seconds(row)))
        batches: list[list[Row]] = []
        longest = 0.0
        for row in rows:
            longest = max(longest, seconds(row))
            if not batches or (len(batches[-1]) + 1) * longest > self.batch_seconds:
                batches.append([])
                longest = seconds(row)
            batches[-1].append(row)
        return batches


def whole_updates(updates: list[list[list[T]]], size: int, world_size: int) -> list[list[list[T]]]:
    """Updates of ``size`` batches, where the last one may have come with fewer.

    The missing batches are halves of the largest of the last ones, so that no batch grows. Where these have nothing to
    spare, the last update has fewer batches, as many for each rank; the left-over utterances are added to the others.

    Raises:
        UsageError: when there are fewer utterances than ranks.
    """
    *full, update = updates or [[]]
    before = full[-1] if full else []
    while len(update) < size and len(donor := max([*update, *before], key=len, default=[])) > 1:
        update.append(donor[len(donor) // 2 :])
        del donor[len(donor) // 2 :]
    whole = len(update) - len(update) % world_size
    rest = update[whole:]
    if rest and not full and not whole:  # weights below 1 may leave so few
        raise UsageError(
            f"a pass has {len(update)} utterances for {world_size} processes; use fewer, or larger `data.weights`"
        )
    del update[whole:]
    for left, batch in zip(chain.from_iterable(rest), [*update, *before], strict=False):
        batch.append(left)
    return updates if whole else full
