"""A run or a demo as one HTML page to look at: styles and figures inside, nothing fetched."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jinja2
import jiwer
from markupsafe import Markup

from w2v2.errors import NotNegative, UsageError, Whole
from w2v2.files import read_bytes, write_text
from w2v2.report import figures
from w2v2.report.figures import PANELS, Series
from w2v2.serial import checked, files_of, parse_json, read_figures

PRETRAINING = ("contrastive", "accuracy", "code_perplexity", "learning_rate")
ARMS = {
    "finetuned": ("pretrained", figures.BLUE), "warm_start_only": ("warm start alone", figures.GREEN),
    "scratch": ("random weights", figures.ORANGE),
}  # fmt: skip
COMPARED = ("finetuned", "scratch")
STAGES = {"pretrain": "Pretraining", **{arm: f"Fine-tuning, {label}" for arm, (label, _) in ARMS.items()}}
"""Run folders of a demo, and what they are called; those that are compared must be there."""
CLEAR = 0.02
"""Relative difference of error rates below which none counts."""


class _Rates(TypedDict):
    wer: NotNegative
    cer: NotNegative
    cer_interval: NotRequired[tuple[float, float] | None]


class _Pretrained(TypedDict, total=False):
    loss: float
    accuracy: float
    accuracy_all_masked: float
    codes_per_utterance: float
    code_perplexity: float
    prob_perplexity: float


class _Summary(TypedDict):
    finetuned: _Rates
    scratch: _Rates
    pretrain: NotRequired[_Pretrained]
    labelled_minutes: NotRequired[float]
    test_split: NotRequired[str]
    seconds: NotRequired[dict[str, float]]
    peak_memory_gib: NotRequired[float]
    command: NotRequired[str]


class _Size(TypedDict, total=False):
    hours: float


class _Data(TypedDict, total=False):
    train: _Size


class _Environment(TypedDict, total=False):
    data: _Data


class _Model(TypedDict, total=False):
    num_distractors: Whole


class _Config(TypedDict, total=False):
    recipe: str
    model: _Model


class _Codebook(TypedDict, total=False):
    counts: list[list[NotNegative]]


class _Hypothesis(TypedDict):
    reference: str
    finetuned: str
    scratch: str


def write_run_report(run: Path) -> Path:
    """Write ``RUN/report.html``: what ran, final figures, curves.

    Raises:
        UsageError: no metrics.csv, or nothing in it.
    """
    metrics, config = _metrics(run), _json(run / "config.json", {}, _Config)
    names = list(dict.fromkeys(column.rpartition("/")[2] for column in metrics))
    drawn = {*names} - {column for column, *_ in figures.COMPANIONS.values()}
    return _write(
        run,
        title=f"Run {run.resolve().name}",
        recipe=config.get("recipe") or "unknown",
        updates=_end(metrics),
        settings=_settings({"This run": run}),
        final=[
            (figures.title_of(name), *(_final(name, metrics.get(f"{kind}/{name}")) for kind in figures.KINDS))
            for name in names
            if any(f"{kind}/{name}" in metrics for kind in figures.KINDS)
        ],
        curves=[figures.panel(name, metrics, config) for name in dict.fromkeys((*PANELS, *names)) if name in drawn],
        layers=_layers(run / "model.safetensors"),
    )


def write_demo_report(folder: Path) -> Path:
    """Write ``FOLDER/report.html``: whether pretraining helped, how much, and what it takes to judge that.

    Args:
        folder: with summary.json and the run folders pretrain, finetuned and scratch; warm_start_only, listening.json,
            probe.json, hypotheses.json, codebook.json and example.npz each add something.

    Raises:
        UsageError: no summary.json, one without error rates, or a run without metrics.
    """
    path = _existing(folder, "summary.json", "the results of a demo", "name the folder of a finished w2v2 demo")
    summary = _json(path, {}, _Summary)
    runs = {name: folder / name for name in STAGES if name != "warm_start_only" or (folder / name).is_dir()}
    metrics = {name: _metrics(run) for name, run in runs.items()}
    config = _json(runs["pretrain"] / "config.json", {}, _Config)
    about = {name: _json(run / "environment.json", {}, _Environment) for name, run in runs.items()}
    data = {name: environment.get("data", {}).get("train", {}) for name, environment in about.items()}
    seconds = dict(summary.get("seconds", {}))
    total = seconds.pop("total", None) or sum(seconds.values()) or 1
    probe = _json(folder / "probe.json", {})
    with files_of(folder, "w2v2 demo"):
        return _write(
            folder,
            title="w2v2 demo: does pretraining help?",
            summary=summary,
            clear=CLEAR,
            data=data,
            updates={name: _end(columns) for name, columns in metrics.items()},
            model=config.get("model", {}),
            listening=[_heard(item) for item in _json(folder / "listening.json", [], list[dict[str, Any]])],
            probe=probe,
            layers=figures.layers(probe["rows"]) if probe else [],
            curves=[figures.panel(name, metrics["pretrain"], config) for name in PRETRAINING],
            arms=_arms(metrics),
            codebooks=figures.codebooks(_json(folder / "codebook.json", {}, _Codebook).get("counts", [])),
            example=figures.example(folder / "example.npz"),
            transcripts=_transcripts(_json(folder / "hypotheses.json", [], list[_Hypothesis])),
            total_seconds=total,
            stages=[
                (figures.title_of(name), f"{spent:,.1f}", f"{spent / total:.0%}") for name, spent in seconds.items()
            ],
            settings=_settings({STAGES[name]: run for name, run in runs.items()}),
            command=summary.get("command", f"w2v2 demo --out {folder.resolve().name}"),
        )


def _heard(item: dict[str, Any]) -> dict[str, Any]:
    """One of listening.json as the page shows it."""
    written = {
        f"{ARMS[arm][0]}{how}": _differences(item["reference"], item[arm + key])
        for arm in COMPARED
        for key, how in (("", ""), ("_trigram", " + trigram"))
        if arm + key in item
    }
    from w2v2.report.listening import samples_of  # late: the page of a pretraining run needs no inference

    return item | {"figure": figures.utterance(item["id"], samples_of(item["flac"]), item["words"]), "written": written}


def _metrics(run: Path) -> dict[str, Series]:
    remedy = "name a folder that w2v2 pretrain or finetune wrote"
    path = _existing(run, "metrics.csv", "the figures of a run", remedy)
    columns: dict[str, Series] = {}
    for step, row in read_figures(path):
        for name, value in row.items():
            columns.setdefault(name, {})[step] = value
    if not columns:
        raise UsageError(f"{path} holds no figures: expected logged steps, got none; wait for the first, or run again")
    return columns


def _existing(folder: Path, name: str, what: str, remedy: str) -> Path:
    if not (folder / name).is_file():
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise UsageError(f"no {name} in {folder}: expected {what}, got {inside or 'an empty folder'}; {remedy}")
    return folder / name


def _json(path: Path, absent: Any, kind: Any = dict[str, Any]) -> Any:
    """What a file holds, checked, with whatever else is in it."""
    if not path.is_file():
        return absent
    value = parse_json(read_bytes(path), path)
    checked(value, kind, str(path))
    return value


def _arms(metrics: dict[str, dict[str, Series]]) -> dict[str, Any]:
    names = [arm for arm in ARMS if arm in metrics]
    series = {(rate, arm): metrics[arm].get(f"valid/{rate}", {}) for rate in ("cer", "wer") for arm in names}
    finetuned, scratch = (series["cer", arm] for arm in COMPARED)
    both = finetuned.keys() & scratch.keys()
    steps = sorted({step for column in series.values() for step in column})
    return {
        "both": len(both),
        "lower": sum(finetuned[step] < scratch[step] for step in both),
        "curves": [
            figures.curves(*PANELS[rate], [(ARMS[arm][0], series[rate, arm], ARMS[arm][1], "valid") for arm in names])
            for rate in ("cer", "wer")
        ],
        "header": ("Updates", *(f"{rate.upper()}, {ARMS[arm][0]}" for rate, arm in series)),
        "rows": [(f"{at:,}", *(f"{s[at]:.1%}" if at in s else "" for s in series.values())) for at in steps],
    }


def _transcripts(items: list[dict[str, str]]) -> list[tuple[str, list[Any]]]:
    chosen = [items[i * len(items) // 10] for i in range(10)] if len(items) > 10 else items
    return [(item["reference"], [_differences(item["reference"], item[arm]) for arm in COMPARED]) for item in chosen]


def _differences(reference: str, hypothesis: str) -> tuple[list[tuple[str, str]], int, int]:
    """Words with their HTML tags (none for right ones), number of errors, number of reference words."""
    references, hypotheses = reference.split(), hypothesis.split()
    result = jiwer.process_words(" ".join(references), " ".join(hypotheses))
    words: list[tuple[str, str]] = []
    for part in result.alignments[0]:
        if part.type == "delete":
            words += [("del", word) for word in references[part.ref_start_idx : part.ref_end_idx]]
        else:
            tag, sign = {"equal": ("", ""), "insert": ("ins", "+ "), "substitute": ("mark", "")}[part.type]
            words += [(tag, sign + word) for word in hypotheses[part.hyp_start_idx : part.hyp_end_idx]]
    return words, result.substitutions + result.deletions + result.insertions, len(references)


def _layers(weights: Path) -> list[tuple[str, str]]:
    """The share of each state in the mix of a finished classifier, from the first block's input on."""
    if not weights.is_file():
        return []
    from w2v2.checkpoint.native import read_safetensors  # late: it needs torch

    mix = read_safetensors(weights).get("classifier.layer_weights")
    if mix is None:
        return []
    names = ("input of the blocks", *(f"block {i}" for i in range(1, len(mix))))
    return [(name, f"{share:.1%}") for name, share in zip(names, mix.softmax(0).tolist(), strict=True)]


def _settings(runs: dict[str, Path]) -> dict[str, Any]:
    files = ("config.json", "environment.json")
    columns = [{k: v for file in files for k, v in _flat(_json(run / file, {})).items()} for run in runs.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: (name, *(column.get(name, "") for column in columns)) for name in names}
    return {"header": ("Setting", *runs), "rows": rows}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None and name != "_type":
            flat[prefix + name] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return flat


def _final(name: str, series: Series | None) -> str:
    percent = name in PANELS and PANELS[name][1].startswith("%")
    return format(series[max(series)], ".2%" if percent else ".4g") if series else ""


def _end(metrics: dict[str, Series]) -> int:
    return max(step for series in metrics.values() for step in series)


def _write(folder: Path, **values: Any) -> Path:
    package = resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": "{:.1%}".format, "ln": math.log}
    template = environment.from_string((package / "page.html.jinja").read_text(encoding="utf-8"))
    css = Markup((package / "page.css").read_text(encoding="utf-8"))
    path = folder / "report.html"
    write_text(path, template.render(css=css, nan=math.nan, **values) + "\n")
    return path
