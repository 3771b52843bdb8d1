"""One model for many: what several ask for at the same time goes through it in one batch."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from w2v2.inference.recognizer import Recognizer

Job = tuple[int, int, Tensor, "Future[Tensor]"]
"""Rank (what is spoken just now is before files), number, waveform, its log-probabilities."""


class Engine:
    """Runs a model in a thread.

    Args:
        batch_size: waveforms that go through the model together at most.
    """

    def __init__(self, recognizer: Recognizer, batch_size: int) -> None:
        self.recognizer, self.batch_size = recognizer, batch_size
        self.jobs: queue.PriorityQueue[Job] = queue.PriorityQueue()
        self.numbers = itertools.count()
        threading.Thread(target=self._work, daemon=True, name="model").start()

    def submit(self, audio: Tensor, *, live: bool = False) -> Future[Tensor]:
        """Ask for the log-probabilities (T, labels) of a waveform (S,), as of ``Recognizer.emissions``.

        Args:
            live: whether somebody is speaking it just now; it does not wait for files.
        """
        future: Future[Tensor] = Future()
        self.jobs.put((0 if live else 1, next(self.numbers), audio, future))
        return future

    def _work(self) -> None:
        while True:
            jobs = [self.jobs.get()]
            while len(jobs) < self.batch_size:
                try:
                    job = self.jobs.get_nowait()
                except queue.Empty:
                    break
                if job[0] != jobs[0][0]:  # files would make those who speak wait
                    self.jobs.put(job)
                    break
                jobs.append(job)
            jobs = [job for job in jobs if job[3].set_running_or_notify_cancel()]
            if not self._run(jobs) and len(jobs) > 1:  # such as for want of memory
                for job in jobs:
                    self._run([job])

    def _run(self, jobs: Sequence[Job]) -> bool:
        try:
            emissions = self.recognizer.emissions([audio for _, _, audio, _ in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0][3].set_exception(error)
            return False
        for (_, _, _, future), log_probs in zip(jobs, emissions, strict=True):
            future.set_result(log_probs)
        return True


@dataclass
class SharedRecognizer(Recognizer):
    """A recogniser whose model others use too."""

    engine: Engine

    def emissions(self, audio: Sequence[Tensor]) -> list[Tensor]:
        """As of ``Recognizer``, by the engine."""
        return [future.result() for future in [self.engine.submit(row) for row in audio]]
