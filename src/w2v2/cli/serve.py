"""``w2v2 serve``."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from w2v2.cli.decoding import Decoding
from w2v2.cli.options import MODEL, Device, Language, Settings
from w2v2.decoding.decoder import make_decoder
from w2v2.errors import UsageError, public
from w2v2.inference.recognizer import load_recognizer, place
from w2v2.serve.config import ServeConfig


@dataclass(kw_only=True)
class Serve(Decoding):
    """See ``main.VERBS``."""

    model: Annotated[Positional[str], arg(metavar="MODEL", help=MODEL)]
    language: Language = None
    device: Device = None
    """cpu, cuda, cuda:1, mps."""
    server: Settings[ServeConfig] = field(default_factory=ServeConfig)

    def run(self, named: Collection[str]) -> None:
        """Serve until interrupted."""
        for name in ("starlette", "uvicorn", "websockets", "python_multipart"):
            if find_spec(name) is None:
                raise UsageError(f"`serve` needs {name}: pip install starlette uvicorn websockets python-multipart")
        from w2v2.serve.app import serve

        config = replace(self.server, token=self.server.token or os.environ.get("W2V2_TOKEN"))
        config.check()
        recognizer = load_recognizer(self.model, self.language)
        place(recognizer.model, self.device)
        decoder = make_decoder(recognizer.vocabulary, **self.decoder(named))
        name = Path(self.model).resolve().name if Path(self.model).exists() else public(self.model)
        serve(recognizer, name, decoder, config)
