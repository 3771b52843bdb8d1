"""A folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from w2v2.errors import UsageError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``out`` when all went well and is gone otherwise.

    Raises:
        UsageError: there is something in ``out``.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder; choose another one, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        partial.chmod(0o755)
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
