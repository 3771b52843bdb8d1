"""How far a piece of work is, and how long it still takes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from datetime import timedelta

from w2v2.errors import Show

log = logging.getLogger(__name__)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Show]:
    """A function that takes a stage and the share of it done, and shows both with the time to go.

    On a terminal a bar; elsewhere a line in the log every ten seconds.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=1.0)
    started: dict[str, float] = {}
    logged = time.monotonic()

    def show(stage: str, share: float) -> None:
        nonlocal logged
        now = time.monotonic()
        if stage not in started:
            started[stage] = now
            bar.reset(task, description=stage)
            bar.start()
        bar.update(task, completed=share)
        if share >= 1:
            bar.stop()  # what comes next may write lines of its own
        if not console.is_terminal and now - logged > 10:
            logged = now
            left = timedelta(seconds=round((now - started[stage]) * (1 - share) / share)) if share else "?"
            log.info("%s: %3.0f %%, %s to go", stage, 100 * share, left)

    try:
        yield show
    finally:
        bar.stop()
