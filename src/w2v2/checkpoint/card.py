"""The page of an exported model. Needs huggingface_hub (extra ``hf``)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from w2v2.checkpoint.native import CONFIG, VOCABULARY
from w2v2.errors import public
from w2v2.serial import files_of, read_json
from w2v2.text.vocabulary import SPACE, PhonemeVocabulary, PieceVocabulary, Vocabulary, load_vocabulary

CARD, CHECK = "README.md", "export.json"


def write_card(source: Path, folder: Path, *, name: str, license_id: str | None = None) -> None:
    """Write ``README.md``: front matter for the hub, how to use the model, its error rates, its limits.

    Args:
        source: what was exported; a run folder tells what it was trained on and what ``w2v2 evaluate`` found.
        folder: an export, with its ``export.json``.
        name: heading.
        license_id: of the hub's; None: the card says that none was given.
    """
    from huggingface_hub import ModelCard, ModelCardData

    check = read_json(folder / CHECK)
    vocabulary = load_vocabulary(folder / VOCABULARY) if (folder / VOCABULARY).is_file() else None
    with files_of(source, "w2v2 evaluate"):
        run, environment = (_optional(source / file) for file in (CONFIG, "environment.json"))
        datasets = [_last_name(path) for path in run.get("data", {}).get("sources", ())]
        data = ModelCardData(
            library_name="w2v2",
            license=license_id,
            pipeline_tag="feature-extraction" if vocabulary is None else "automatic-speech-recognition",
            tags=["wav2vec2", "speech", check["format"]],
            datasets=datasets or None,
            metrics=None if vocabulary is None else ["wer", "cer"],
        )
        text = (resources.files(__package__) / "card.md.jinja").read_text(encoding="utf-8")
        template = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        ).from_string(text)
        page = template.render(
            front_matter=data.to_yaml(),
            name=name,
            license_id=license_id,
            vocabulary=vocabulary,
            spelling="" if vocabulary is None else _spelling(vocabulary),
            shape=read_json(folder / CONFIG),
            train=environment.get("data", {}).get("train"),
            datasets=datasets,
            evaluations=[_evaluation(path) for path in sorted(source.glob("evaluation/*/evaluation.json"))],
            check=check,
            check_name=CHECK,
        )
    ModelCard(page).save(folder / CARD)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _last_name(path: str) -> str:
    """Return all that is told of a path, which may say much about a machine."""
    return public(path).rstrip("/").rpartition("/")[2] or public(path)


def _evaluation(path: Path) -> list[str]:
    """Return the cells of what ``w2v2 evaluate`` wrote; docs/evaluation.md has the keys."""
    of = read_json(path)
    decoder = "beam search" if of["decoder"] else "greedy"
    cells = [f"`{_last_name(of['data'])}`", of["split"], decoder, f"{of['utterances']:,}"]
    for rate, units in (("wer", "words"), ("cer", "characters")):
        interval = of[units].get("interval")
        bounds = " ({:.2f} to {:.2f})".format(*(100 * bound for bound in interval)) if interval else ""
        cells.append(f"{100 * of[rate]:.2f}{bounds}")
    return cells


def _spelling(vocabulary: Vocabulary) -> str:
    """Return code for the text of ``labels``."""
    if isinstance(vocabulary, PhonemeVocabulary):
        return '" ".join(labels)'
    if isinstance(vocabulary, PieceVocabulary):
        return f'" ".join("".join(labels).replace("{SPACE}", " ").split())'
    if vocabulary.boundary is None:
        return '"".join(labels)'
    return '" ".join("".join(labels).replace(vocabulary["labels"][vocabulary["boundary"]], " ").split())'
