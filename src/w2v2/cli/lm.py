"""``w2v2 lm``."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from w2v2.cli.options import File, default, refuse_without
from w2v2.errors import UsageError

log = logging.getLogger("w2v2")


@dataclass(kw_only=True)
class LM:
    """See ``main.VERBS``. Example: w2v2 lm books.txt.gz books.arpa --order 4 --prune 0 0 1."""

    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="[TEXT ...] OUT.arpa")]
    """Files of text, a sentence a line (of *.trans.txt after its id), gzipped if they end in .gz; and the file to
    write."""
    order: int = 3
    """Words in an n-gram."""
    prune: Annotated[tuple[int, ...], default("0", "[COUNT ...]")] = ()
    """Leave out n-grams that occur so many times or less, for n = 1 (always 0), 2, ..."""
    data: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="DIR")] = ()
    """Prepared corpus, or folder of audio, whose transcripts to take; again for several."""
    split: Annotated[str | None, default("train, or the only one that there is", "SPLIT")] = None
    """Whose transcripts to take."""
    keep_case: bool = False
    """Take words as they are, not in upper case."""
    language: Annotated[str, default("none", "tr|az|de")] = ""
    """Whose rules of upper case hold."""
    held_out: File = None
    """Text whose perplexity to tell; otherwise that of the text itself, which flatters."""

    def run(self, named: Collection[str]) -> None:
        """Estimate, write, and tell the perplexity."""
        from w2v2.decoding.kneser_ney import learn

        if not self.paths:
            raise UsageError("name the file to write: w2v2 lm [TEXT ...] OUT.arpa")
        refuse_without("data", ("split",), named, given=bool(self.data))
        *texts, out = self.paths
        options = {
            name: getattr(self, name) for name in ("split", "keep_case", "language", "order", "prune", "held_out")
        }
        model, score = learn(out, texts, self.data, **options)
        log.info("%s: %s", out, ", ".join(f"{len(keys):,} {n}-grams" for n, keys in enumerate(model.keys, 1)))
        log.info(
            "perplexity %.2f of %s: %d words and sentence ends, %d unknown",
            score.perplexity, self.held_out or "the text that it was learnt from", score.words, score.unknown,
        )  # fmt: skip
