"""How far a piece of work is, and how long it still takes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[str, float], None]]:
    """A function that takes a stage and the share of it done, and shows both with the time to go.

    On a terminal a bar; elsewhere a line in the log every ten seconds.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    started: dict[str, float] = {}
    told = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)

        def show(stage: str, share: float) -> None:
            nonlocal told
            now = time.monotonic()
            if stage not in started:
                started[stage] = now
                bar.reset(task, description=stage)
            bar.update(task, completed=share)
            if not console.is_terminal and now - told > 10:
                told = now
                left = clock((now - started[stage]) * (1 - share) / share) if share else "?"
                log.info("%s: %3.0f %%, %s to go", stage, 100 * share, left)

        yield show


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
