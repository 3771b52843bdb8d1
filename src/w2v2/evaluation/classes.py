"""How often a classifier is right, how sure, and what it takes for what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2v2.data.config import DataConfig
from w2v2.data.corpora import Splits, choose_split
from w2v2.data.loader import whole_utterances
from w2v2.data.utterance import ID
from w2v2.errors import Show, UsageError, public, quiet
from w2v2.evaluation.phones import Labels, check_times, frames_to_last, read_labels
from w2v2.evaluation.significance import Units, ratio_interval
from w2v2.files import whole, write_json
from w2v2.inference.recognizer import Classifier, FrameClassifier, place
from w2v2.model.wav2vec2 import SAMPLE_RATE

if TYPE_CHECKING:
    from w2v2.data.batch import Batch

SCHEMA = 1
"""Of what ``evaluate_classifier`` returns; keys change only with it."""


def evaluate_classifier(
    classifier: Classifier | FrameClassifier,
    splits: Splits,
    split: str,
    out: Path,
    about: dict[str, Any],
    *,
    labels: Path | None = None,
    data: DataConfig | None = None,
    device: str | None = None,
    show: Show = quiet,
) -> dict[str, Any]:
    """Accuracy on a split, and ``evaluation.json`` and ``predictions.jsonl`` in a folder; earlier ones are replaced.

    Args:
        splits: of ``read_corpus``.
        about: what was evaluated, for the record: ``run``, ``data``, ``split``.
        labels: of a classifier of frames, as of ``read_labels``.
        data: how the corpus is read.
        device: as of ``place``.
        show: told how far it is.

    Returns:
        ``accuracy`` and its interval of 95 % over speakers, or over utterances where these are the classes or too few;
        of each class ``utterances`` or ``frames``, ``recall`` and ``precision``; ``confusions``, the most frequent
        first; ``layers``, the share of each state in the mix; what was left out.

    Raises:
        UsageError: no utterance has a class that the model knows; labels of frames that cannot be used.
    """
    scored = choose_split(splits, split, about["data"])
    phones = None
    if isinstance(classifier, FrameClassifier):
        assert labels is not None
        phones, scored = read_labels(labels), scored.labelled(ID)
        check_times(phones, {utterance.id: utterance.seconds for utterance in scored.utterances()})
    else:
        scored = scored.labelled(classifier.classes.label)
    place(classifier.model, device)
    pairs: Counter[tuple[str, str]] = Counter()
    units = Units(2)
    left_out: Counter[str] = Counter()
    out.mkdir(parents=True, exist_ok=True)
    heard = 0.0
    with whole(out / "predictions.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        for batch in whole_utterances(split, scored, data or DataConfig()):
            for row, of_row in _predictions(classifier, phones, batch, left_out):
                file.write(public(json.dumps(row, ensure_ascii=False)) + "\n")
                pairs.update(of_row)
                speaker = None if classifier.classes.label == "speaker" else row["speaker"]
                units.add(speaker, sum(a == b for a, b in of_row), len(of_row))
            heard += batch.lengths.sum().item() / SAMPLE_RATE
            show("evaluate", min(1.0, heard / scored.seconds))
    if not any(reference in classifier.classes.labels for reference, _ in pairs):
        raise UsageError(f"no {classifier.classes.label} in {split} that the model knows: {dict(left_out)}")
    results = {"schema": SCHEMA, **about, **_summary(classifier, pairs, units), "left_out": dict(left_out)}
    write_json(out / "evaluation.json", results)
    return results


def _summary(classifier: Classifier | FrameClassifier, pairs: Counter[tuple[str, str]], units: Units) -> dict[str, Any]:
    kind, counts = units.choose()
    ends = ratio_interval(counts[:, 0], counts[:, 1])
    return {
        "label": classifier.classes.label,
        _counted(classifier): pairs.total(),
        "accuracy": sum(count for (a, b), count in pairs.items() if a == b) / pairs.total(),
        "interval": ends and (max(ends[0], 0.0), min(ends[1], 1.0)),
        "over": kind,
        "classes": _by_class(pairs, _counted(classifier)),
        "confusions": [{"reference": a, "prediction": b, "count": n} for (a, b), n in pairs.most_common() if a != b],
        "layers": classifier.model.classifier.layer_weights.softmax(0).tolist(),
    }


def _predictions(
    classifier: Classifier | FrameClassifier, labels: Labels | None, batch: Batch, left_out: Counter[str]
) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """Of each utterance that can be scored a row, and its pairs; the others are counted by what is wrong with them."""
    lengths, config, names = batch.lengths.tolist(), classifier.model.config, classifier.classes
    left_out.update({"unreadable": len(batch.bad)} if batch.bad else {})
    usable: list[int] = []
    for i, (text, frames) in enumerate(zip(batch.texts, config.frames(lengths), strict=True)):
        if not frames or not ((text or "").strip() if labels is None else labels.get(text or "")):
            left_out["shorter than a frame" if not frames else "without a class"] += 1
        else:
            usable.append(i)
    if not usable:
        return
    audio = [batch.audio[i, : lengths[i]] for i in usable]
    rows = classifier.log_probs(audio) if isinstance(classifier, Classifier) else classifier.emissions(audio)
    for i, row in zip(usable, rows, strict=True):
        text, best = (batch.texts[i] or "").strip(), row.argmax(-1)
        about = {"id": batch.ids[i], "speaker": batch.speakers[i]}
        if labels is None:
            pair = text, names.labels[int(best)]
            about |= {"reference": pair[0], "prediction": pair[1], "probability": round(row.max().exp().item(), 6)}
            yield about, [pair]
            continue
        if unknown := sum(phone.label not in names.ids for phone in labels[text]):
            left_out["phones that the model does not know"] += unknown
        truth = frames_to_last(labels[text], config, names.ids)
        pairs = [(names.labels[a], names.labels[b]) for a, b in zip(truth, best.tolist(), strict=False) if a >= 0]
        yield about | {"frames": len(pairs), "right": sum(a == b for a, b in pairs)}, pairs


def _counted(classifier: Classifier | FrameClassifier) -> str:
    return "frames" if isinstance(classifier, FrameClassifier) else "utterances"


def _by_class(pairs: Counter[tuple[str, str]], counted: str) -> list[dict[str, Any]]:
    rows = []
    for name in sorted({a for a, _ in pairs}):
        total, predicted = (sum(n for pair, n in pairs.items() if pair[i] == name) for i in range(2))
        right = pairs[name, name]
        rows.append(
            {
                "class": name,
                counted: total,
                "recall": right / total,
                "precision": right / predicted if predicted else None,
            }
        )
    return rows


def classes_table(results: dict[str, Any]) -> list[str]:
    """Lines to read, from what ``evaluate_classifier`` returns."""
    counted = "frames" if "frames" in results else "utterances"
    interval = "no interval" if results["interval"] is None else "{:.2%} to {:.2%}".format(*results["interval"])
    lines = [f"accuracy {results['accuracy']:.2%} ({interval}, over {results['over']}), {results[counted]:,} "]
    lines[0] += f"{counted}, {len(results['classes'])} classes of {results['label']}"
    lines += ["", f"{'class, worst first':24}{counted:>12}{'recall':>9}{'precision':>11}"]
    for row in sorted(results["classes"], key=lambda row: row["recall"])[:20]:
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        lines.append(f"{row['class']:24}{row[counted]:>12,}{row['recall']:>9.1%}{precision:>11}")
    lines += ["", "most frequent confusions"] if results["confusions"] else []
    lines += [f"{row['count']:>6}  {row['reference']} -> {row['prediction']}" for row in results["confusions"][:10]]
    shares = "  ".join(f"{i}: {share:.2f}" for i, share in enumerate(results["layers"]))
    lines += ["", f"share of each layer: {shares}"]
    return [*lines, *(f"{count} left out, {why}" for why, count in results["left_out"].items())]
