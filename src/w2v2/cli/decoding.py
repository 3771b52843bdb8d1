"""Options of the verbs that decode: words, a language model, settings of the beam search."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from w2v2.cli.options import File, Settings, default
from w2v2.decoding.config import BeamConfig


@dataclass(kw_only=True)
class Decoding:
    """Without any of these, decoding is greedy."""

    lm: File = None
    """N-gram of words: ARPA, or KenLM binary with --lexicon."""
    lexicon: File = None
    """Words that can be heard, one a line, with spellings or without."""
    hot_words: Annotated[tuple[str, ...], default("none", "[WORD ...]")] = ()
    """Words to listen for, such as names."""
    beam: Settings[BeamConfig] = field(default_factory=BeamConfig)

    def decoder(self, named: Collection[str]) -> dict[str, Any]:
        """What ``make_decoder`` takes; any setting of the beam search that is named asks for one."""
        asked = any(setting.name in named for setting in fields(BeamConfig))
        beam = self.beam if asked else None
        return {"lm": self.lm, "lexicon": self.lexicon, "hot_words": self.hot_words, "beam": beam}
