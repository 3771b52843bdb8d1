"""The plateau of blanks: CTC first learns to say nothing, and stays there for a while. It is named in the log."""

from __future__ import annotations

from dataclasses import dataclass

BLANK, SILENT, SPEAKS = 0.7, 0.1, 0.2
"""Share of blank frames above which, and labels said per label of the reference below which, a model says nothing; and
from how many on it does. Word boundaries, the first that is learned, are not said."""


FLAT = 0.95
"""Of the loss per label of the interval before: above, it does not fall."""


LONG = 50
"""Optimiser steps from which on it is worth a word."""


@dataclass
class Plateau:
    """Takes a run's figures in order of steps, and says once when a plateau has begun and once when it is over."""

    step: int = 0
    """Last look."""
    loss: float = float("inf")
    """Per label, at that."""
    since: int | None = None
    """Step at which the plateau began."""
    told: bool = False
    """Whether it has been named."""

    def look(self, step: int, figures: dict[str, float], total_steps: int, frozen_steps: int = 0) -> str | None:
        """Take the figures of the interval that ends with a step.

        Args:
            figures: ``loss_per_label``, ``blank_share``, ``length_ratio``.
            total_steps, frozen_steps: of the run, and of its beginning, in which the encoder is frozen.

        Returns:
            A line, if there is news.
        """
        before, flat = self.step, figures["loss_per_label"] > FLAT * self.loss
        self.step, self.loss = step, figures["loss_per_label"]
        if figures["blank_share"] < BLANK or figures["length_ratio"] > (SPEAKS if self.told else SILENT):
            since, told = self.since, self.told
            self.since, self.told = None, False
            return self._over(since, figures) if told and since is not None else None
        if self.since is None and flat:
            self.since = before
        if self.since is None or self.told or step - self.since < LONG:
            return None
        self.told = True
        rest = f"the encoder is frozen until step {frozen_steps}" if step < frozen_steps else "that is no fault yet"
        return (
            f"steps {self.since} to {step}: {figures['blank_share']:.0%} of the frames are blank, "
            f"{figures['length_ratio']:.2f} labels are said for each of the reference, the loss stays at "
            f"{self.loss:.2f} nats per label: the plateau of blanks, which every CTC run goes through before its first "
            f"letters; {rest}. If it lasts for more than a third of the run, until step "
            f"{self.since + total_steps // 3}, raise `optim.schedule.peak`, mask less, or see with `preflight` whether "
            "the set-up can learn"
        )

    def _over(self, since: int, figures: dict[str, float]) -> str:
        return (
            f"step {self.step}: out of the plateau of blanks after {self.step - since} steps, "
            f"{figures['blank_share']:.0%} of the frames are blank, {figures['length_ratio']:.2f} labels are said for "
            "each of the reference"
        )
