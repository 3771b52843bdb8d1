"""Options of the verbs that decode: words, a language model, settings of the beam search."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2v2.cli.options import override

if TYPE_CHECKING:
    from w2v2.text.vocabulary import Vocabulary


SETTINGS = (
    "Settings of the beam search can follow, such as --beam-size 500 or --lm-weight 1.5; any of them asks for one, and "
    "--beam-settings lists them."
)


def add_decoder_options(sub: argparse.ArgumentParser) -> None:
    """Add them; without any, decoding is greedy."""
    sub.add_argument("--lm", type=Path, help="n-gram of words: ARPA, or KenLM binary with --lexicon (default: none)")
    sub.add_argument("--lexicon", type=Path, help="words that can be heard, one a line, with spellings or without")
    sub.add_argument("--hot-words", nargs="+", metavar="WORD", help="words to listen for, such as names")
    sub.add_argument("--beam-settings", action="store_true", help="list the settings of the beam search")


def decoder_asked_for(args: argparse.Namespace, rest: Sequence[str], vocabulary: Vocabulary, usage: str) -> Any:
    """``decode.make_decoder`` for what the command line says."""
    from w2v2.decoding.config import BeamConfig
    from w2v2.decoding.decoder import make_decoder

    beam = override(BeamConfig(), rest, usage) if rest else None
    hot_words = tuple(args.hot_words or ())
    return make_decoder(vocabulary, lm=args.lm, lexicon=args.lexicon, hot_words=hot_words, beam=beam)


def show_beam_settings(args: argparse.Namespace, usage: str) -> None:
    """List the settings and end, if ``--beam-settings`` says so."""
    if args.beam_settings:
        from w2v2.decoding.config import BeamConfig

        override(BeamConfig(), ["--help"], usage)
