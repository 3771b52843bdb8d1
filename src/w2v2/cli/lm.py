"""``w2v2 lm``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from w2v2.cli.options import AddVerb
from w2v2.errors import UsageError

log = logging.getLogger("w2v2")


def add(verb: AddVerb) -> None:
    """Add the verb."""
    lm = verb(
        "lm",
        _lm,
        "n-gram language model of words from text, or from a corpus's transcripts: modified Kneser-Ney, as ARPA",
        usage="w2v2 lm [TEXT ...] OUT.arpa [options]",
        epilog="Examples: w2v2 lm books.txt.gz books.arpa --order 4 --prune 0 0 1; "
        "w2v2 lm --data LibriSpeech librispeech.arpa --held-out test.txt.",
    )
    lm.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="TEXT",
        help="files of text, a sentence a line (of *.trans.txt after its id), gzipped if they end in .gz; the last "
        "name is the file to write",
    )
    lm.add_argument("--order", type=int, default=3, help="words in an n-gram (default: %(default)s)")
    lm.add_argument(
        "--prune",
        type=int,
        nargs="+",
        default=(),
        metavar="COUNT",
        help="leave out n-grams that occur so many times or less, for n = 1 (always 0), 2, ... (default: 0)",
    )
    lm.add_argument(
        "--data", action="append", default=[], help="prepared corpus, or folder of audio; again for several"
    )
    lm.add_argument("--split", help="whose transcripts to take (default: train, or the only one that there is)")
    lm.add_argument("--keep-case", action="store_true", help="take words as they are, not in upper case")
    lm.add_argument(
        "--held-out", type=Path, help="text whose perplexity to tell (default: that of the text itself, which flatters)"
    )


def _lm(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.decoding.kneser_ney import estimate
    from w2v2.decoding.ngram import ORDERS, is_arpa

    *texts, out = args.paths
    if not texts and not args.data:
        raise UsageError(f"nothing to learn {out} from: name files of text before it, or a corpus with --data")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: expected the name of a file in a folder that exists")
    if out.exists() and not is_arpa(out):
        raise UsageError(f"{out} exists and is no ARPA file to replace; name the file to write last, or remove it")
    if args.order not in ORDERS:
        raise UsageError(
            f"--order must be {min(ORDERS)} to {max(ORDERS)}, which beam search can read, got {args.order}"
        )
    normal = _as_it_is if args.keep_case else _normalizer()
    model = estimate(_sentences(texts, args.data, args.split, normal), args.order, args.prune)
    tested = [args.held_out] if args.held_out else texts
    score = model.score(_sentences(tested, [] if args.held_out else args.data, args.split, normal))
    model.save(out)
    counts = ", ".join(f"{len(keys):,} {n}-grams" for n, keys in enumerate(model.keys, 1))
    log.info("%s: %s", out, counts)
    of = args.held_out or "the text that it was learnt from"
    log.info(
        "perplexity %.2f of %s: %d words and sentence ends, %d unknown",
        score.perplexity,
        of,
        score.words,
        score.unknown,
    )


def _normalizer() -> Callable[[str], str]:
    from w2v2.text.spelling import normalize_text

    return normalize_text


def _as_it_is(text: str) -> str:
    return text


def _sentences(
    texts: list[Path], corpora: list[str], split: str | None, normal: Callable[[str], str]
) -> Iterator[list[str]]:
    """Words of each line and transcript that has any; lines of LibriSpeech's ``*.trans.txt`` without their ids."""
    from w2v2.decoding.ngram import open_text

    for path in texts:
        with open_text(path) as file:
            with_ids = path.name.removesuffix(".gz").endswith(".trans.txt")
            lines = (line.partition(" ")[2] if with_ids else line for line in file)
            yield from filter(None, (normal(line).split() for line in lines))
    for corpus in corpora:
        from w2v2.data.corpora import read_corpus

        splits = read_corpus(corpus, training=False)
        chosen = split or (next(iter(splits)) if len(splits) == 1 else "train")
        if chosen not in splits:
            raise UsageError(f"--split must be one of {', '.join(splits)}, which {corpus} has; got {chosen!r}")
        yield from filter(None, (normal(u.text or "").split() for u in splits[chosen].utterances()))
