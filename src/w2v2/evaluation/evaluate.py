"""Word and character error rates of a corpus: how many, how sure, where and which.

Rates are of all utterances together, edits / reference words, as LibriSpeech's are reported: not means of utterances.
Nothing is left out in silence: audio too short for a frame has an empty transcript, all of its words deleted; an
utterance whose reference is empty adds insertions; recordings that cannot be read are counted and named.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jiwer

from w2v2.data.config import DataConfig
from w2v2.data.corpora import Split, Splits, choose_split
from w2v2.data.loader import whole_utterances
from w2v2.decoding.config import BeamConfig
from w2v2.decoding.decoder import TunableDecoder, make_decoder
from w2v2.decoding.greedy import Decoder
from w2v2.errors import Show, UsageError, public, quiet
from w2v2.evaluation.scoring import COUNTS, Tally
from w2v2.evaluation.significance import Units, paired_difference
from w2v2.evaluation.tuning import tune_on
from w2v2.files import open_text, whole, write_text
from w2v2.inference.recognizer import NOT_FINITE, Recognizer, load_recognizer, place, weights_key
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.serial import checked, parse_json

if TYPE_CHECKING:
    from w2v2.data.batch import Batch


log = logging.getLogger(__name__)


SCHEMA = 2
"""Of ``evaluation.json`` and ``hypotheses.jsonl``; their keys change only with it."""


EVALUATION, HYPOTHESES = "evaluation.json", "hypotheses.jsonl"


@dataclass(frozen=True)
class ErrorRates:
    """Edits over all references together, not means of utterances. Shares, not per cent."""

    wer: float
    """Word errors / reference words."""
    cer: float
    """Character errors, spaces included / reference characters."""


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Corpus-level WER and CER of hypotheses against references, both already in the same spelling.

    An empty reference adds its hypothesis' words as insertions. Where no reference has any, rates are numbers of edits.
    """
    references, hypotheses = list(references), list(hypotheses)
    return ErrorRates(wer=jiwer.wer(references, hypotheses), cer=jiwer.cer(references, hypotheses))


def evaluate(recognizer: Recognizer, decoder: Decoder, batches: Iterable[Batch], file: TextIO) -> Tally:
    """Transcribe utterances and count the errors, batch by batch.

    Args:
        batches: whole utterances, not normalised (``data/loader.py: whole_utterances``).
        file: a JSON line of each utterance is written here, as it comes (``hypotheses.jsonl``).

    Raises:
        UsageError: no utterance has a transcript, or all of them are empty.
    """
    tally = Tally()
    for batch in batches:
        tally.unreadable |= batch.bad
        known = [i for i, text in enumerate(batch.texts) if text is not None]
        tally.without_transcript += len(batch.ids) - len(known)
        lengths = batch.lengths.tolist()
        started = time.perf_counter()
        emissions = recognizer.emissions([batch.audio[i, : lengths[i]] for i in known])
        heard = {i: row for i, row in zip(known, emissions, strict=True) if not row.isnan().any()}
        tally.unreadable |= {batch.ids[i]: NOT_FINITE for i in known if i not in heard}
        hypotheses = {i: decoder(row) for i, row in heard.items()}
        tally.compute_seconds += time.perf_counter() - started
        tally.too_short += sum(not len(row) for row in emissions)
        for i, hypothesis in hypotheses.items():
            seconds = lengths[i] / SAMPLE_RATE
            row = {
                "id": batch.ids[i],
                "speaker": batch.speakers[i],
                "seconds": round(seconds, 3),
                "reference": recognizer.vocabulary.normalize(batch.texts[i] or ""),
                "hypothesis": recognizer.vocabulary.normalize(hypothesis.text),
            }
            counts = tally.add(row["reference"], row["hypothesis"], speaker=row["speaker"], seconds=seconds)
            row |= dict(zip(COUNTS, counts, strict=True))
            tally.see_strange(recognizer.vocabulary.strange(batch.texts[i] or ""))
            file.write(public(json.dumps(row, ensure_ascii=False)) + "\n")
    if not tally.all.words.reference:
        raise UsageError(
            f"no words to compare with: of {tally.all.utterances + tally.without_transcript} utterances "
            f"{tally.without_transcript} have no transcript and {tally.empty_references} an empty one; choose a split "
            "with transcripts"
        )
    return tally


def evaluate_model(
    model: str | PathLike[str],
    splits: Splits,
    split: str = "test",
    *,
    corpus: str = "",
    lm: Path | None = None,
    lexicon: Path | None = None,
    hot_words: Sequence[str] = (),
    beam: BeamConfig | None = None,
    tune: str | None = None,
    trials: int = 64,
    out: Path | None = None,
    against: Path | None = None,
    data: DataConfig | None = None,
    language: str | None = None,
    device: str | None = None,
    show: Show = quiet,
) -> dict[str, Any]:
    """Error rates of a fine-tuned model on a split of a corpus, kept in a folder: all that ``w2v2 evaluate`` does.

    Args:
        model, language: as of ``load``.
        splits: of ``read_corpus``; ``corpus`` is its name, for the record.
        lm, lexicon, hot_words, beam: of ``make_decoder``.
        tune: split to tune the weights of LM, words and blanks on, with so many ``trials``.
        out: folder of results; None: RUN/evaluation/SPLIT, of a model that is a folder here.
        against, show: as in ``run_evaluation``; stage ``evaluate``, and those of ``tune_on``.
        data, device: how the corpus is read; as in ``place``.

    Returns what ``evaluation.json`` holds. Raises as ``choose_split``, ``make_decoder``, ``run_evaluation``.
    """
    (data := data or DataConfig()).check()
    scored = choose_split(splits, split, corpus)
    tuned_on = None if tune is None else choose_split(splits, tune, corpus, "tune")
    if against is not None:
        hypotheses_file(against)
    folder = _folder(model, out)
    recognizer = load_recognizer(model, language)
    place(recognizer.model, device)
    decoder = make_decoder(recognizer.vocabulary, lm=lm, lexicon=lexicon, hot_words=hot_words, beam=beam)
    if tuned_on is not None:
        if not isinstance(decoder, TunableDecoder) or (lm is None and lexicon is None):
            raise UsageError("`tune` looks for weights of an LM and of words; name one with `lm`, or a `lexicon`")
        _refuse_scored(tune, tuned_on, scored)
        key = weights_key(model, language)
        tuning = tune_on(recognizer, decoder, tuned_on, data, folder, key, trials=trials, show=show)
        decoder = decoder.tuned(tuning.best)
        for line in tuning.table()[:6]:
            log.info("%s", line)
    asked = {"lm": lm and str(lm), "lexicon": lexicon and str(lexicon), "hot_words": tuple(hot_words), "tuned_on": tune}
    settings = {**asked, **asdict(decoder.config)} if isinstance(decoder, TunableDecoder) else {}
    return run_evaluation(
        recognizer,
        decoder,
        _watched(whole_utterances(split, scored, data), scored.seconds, show),
        out or folder / "evaluation" / split,
        {"run": str(model), "data": corpus, "split": split, "decoder": settings},
        against=against,
    )


def _folder(model: str | PathLike[str], out: Path | None) -> Path:
    """Of a model, or where its results go."""
    folder = Path(model) if os.path.isdir(model) else out
    if folder is None:
        raise UsageError(f"{model} is no folder to put results into; name one with `out`")
    return folder


def _refuse_scored(name: str | None, tuned_on: Split, scored: Split) -> None:
    ids = {u.id for u in scored.utterances()}
    shared = sum(u.id in ids for u in tuned_on.utterances())
    if shared:
        raise UsageError(
            f"`tune` {name} is what is scored, {shared} utterances of it; tune on others than those of `split`"
        )


def _watched(batches: Iterable[Batch], seconds: float, show: Show) -> Iterator[Batch]:
    heard = 0.0
    for batch in batches:
        yield batch
        heard += batch.lengths.sum().item() / SAMPLE_RATE
        show("evaluate", min(1.0, heard / seconds))


def run_evaluation(
    recognizer: Recognizer,
    decoder: Decoder,
    batches: Iterable[Batch],
    out: Path,
    about: dict[str, Any],
    *,
    against: Path | None = None,
) -> dict[str, Any]:
    """``evaluate``, and leave ``evaluation.json`` and ``hypotheses.jsonl`` in a folder; earlier ones are replaced.

    Args:
        about: what was evaluated and how, for the record.
        against: results of another system to test against; they may be those that are replaced.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        UsageError: as ``evaluate``; as ``paired_test``, once the results are written, ``against`` null.
    """
    out.mkdir(parents=True, exist_ok=True)
    with whole(out / HYPOTHESES) as partial:
        with partial.open("w", encoding="utf-8") as file:
            tally = evaluate(recognizer, decoder, batches, file)
        tested, fault = None, None
        try:  # before ours replace them
            tested = None if against is None else paired_test(partial, against)
        except UsageError as error:
            fault = error
    summary = {"schema": SCHEMA, **about, **tally.summary(), "against": tested}
    write_text(out / EVALUATION, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if fault is not None:
        raise UsageError(f"{fault}; the results without the test are in {out}") from fault
    return summary


def paired_test(ours: Path, other: Path) -> dict[str, Any]:
    """Paired test of two systems that transcribed the same utterances; in memory are a few numbers of each.

    Args:
        ours, other: ``hypotheses.jsonl`` of each, or the folder that holds it.

    Raises:
        UsageError: no such file, or other utterances or references than ours.
    """
    theirs = {row["id"]: (row["word_errors"], row["character_errors"], hash(row["reference"])) for row in _rows(other)}
    units, missing, changed = Units(6), 0, 0
    for row in _rows(ours):
        words, characters, reference = theirs.pop(row["id"], (0, 0, None))
        missing += reference is None
        changed += reference is not None and reference != hash(row["reference"])
        units.add(row["speaker"], *(row[name] for name in COUNTS), words, characters)
    if missing or changed or theirs:
        raise UsageError(
            f"{other} is not of the same utterances: {missing} of ours are not there, {len(theirs)} of its own are not "
            f"here, {changed} have another reference; evaluate both on the same split"
        )
    kind, counts = units.choose()
    if not counts[:, 1].sum():
        raise UsageError(f"no words to compare in {ours}; choose a split with transcripts")
    differences = {
        "wer": paired_difference(counts[:, 0], counts[:, 4], counts[:, 1]),
        "cer": paired_difference(counts[:, 2], counts[:, 5], counts[:, 3]),
    }
    return {"other": str(other), "over": kind, "units": len(counts), **{k: vars(v) for k, v in differences.items()}}


def hypotheses_file(path: Path) -> Path:
    """``hypotheses.jsonl`` of an evaluation folder, or itself.

    Raises:
        UsageError: there is none.
    """
    file = path / HYPOTHESES if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no {file}: expected an evaluation folder, or the {HYPOTHESES} in it, of 'w2v2 evaluate'")
    return file


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    file = hypotheses_file(path)
    types: dict[str, Any] = {"id": str, "speaker": str | None, "reference": str, **dict.fromkeys(COUNTS, int)}
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            row: dict[str, Any] = checked(parse_json(line, where), dict[str, Any], where)
            if missing := types.keys() - row:
                raise UsageError(f"{where}, lacks {', '.join(sorted(missing))}; evaluate again")
            yield row | {name: checked(row[name], kind, f"{where}: {name}") for name, kind in types.items()}
