"""What an objective is to the training task: a model that draws, gives sums of losses, and makes figures of sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor

from w2v2.model.masking import Draws, StepKey, Utterances


@dataclass
class SSLOutput:
    """What a self-supervised model returns for a batch: sums, so that they add over batches and ranks."""

    losses: dict[str, Tensor]
    """Scalar float32 sums over the targets; weighted and divided by the number of targets by the task."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sums of anything, without gradient; ``summarize`` makes figures of them."""
    num_targets: int = 0
    """Targets in the batch, known on the host."""


D = TypeVar("D", bound=Draws)


class SSLModel(Protocol[D]):
    """An objective: all that the training task asks of a model, which is a ``torch.nn.Module`` too."""

    def draw(self, batch: Utterances, step_key: StepKey | None) -> D:
        """Draw everything random about a batch, on the host.

        Args:
            batch: by whose ids and epochs an utterance's part is drawn.
            step_key: by which the batch's part is. None: validation, whose draws depend on the ids alone.
        """

    def forward(self, audio: Tensor, draws: D, lengths: Sequence[int] | None = None, *, step: int = 0) -> SSLOutput:
        """Sum losses and metrics over a batch.

        Args:
            audio: (B, S) float32.
            draws: on the audio's device.
            lengths: valid samples of each utterance, on the host; None when all are S.
            step: optimiser steps so far.
        """

    def summarize(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Make figures of metrics that were summed over batches and ranks.

        A validation's sums of the baseline are there too, as ``baseline/NAME``, if there is one.
        """

    def baseline(self, draws: D) -> D | None:
        """The same targets without what they are to be told from, for comparison in validation; None: no such."""

    @property
    def __call__(self) -> Callable[..., SSLOutput]:
        """``forward``, with the module's hooks."""
