"""A run or a demo as one HTML page to look at: styles and figures inside, nothing fetched."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jiwer
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from w2v2.errors import UsageError

INK, PALE, GREY = "#1f2328", "#d9dde1", "#7d858e"
BLUE, ORANGE, GREEN = "#2563a8", "#c2571a", "#2f7d5b"
COLOURS = {INK: "ink", PALE: "pale", GREY: "grey", BLUE: "blue", ORANGE: "orange", GREEN: "green"}
"""Colours of the figures, each a variable of the style sheet: they follow the reader's light or dark mode."""
CSS = """
:root{--ink:#1f2328;--pale:#d9dde1;--paper:#fdfdfc;--grey:#6b737c;--blue:#2563a8;--orange:#c2571a;--green:#2f7d5b;
--wrong:#fbe3d3;--more:#dcefe5;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#dfe3e7;--pale:#343a41;--paper:#15181b;--grey:#98a1aa;--blue:#74aee6;
--orange:#ee9a5f;--green:#72c3a0;--wrong:#55331d;--more:#1d4434}}
body{box-sizing:border-box;margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:980px;background:var(--paper);
color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:0}p{max-width:70ch;margin:.6rem 0 1rem}
h2{font-size:1.2rem;margin:2.6rem 0 .8rem;padding-top:1rem;border-top:1px solid var(--pale)}
.lead{font-size:1.25rem;line-height:1.45;max-width:62ch}
.note{max-width:85ch}.note,small,summary,thead th{color:var(--grey);font-size:.875rem}
table{border-collapse:collapse;width:100%;font-size:.925rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.45rem 1rem .45rem 0;border-bottom:1px solid var(--pale)}
th{font-weight:500}tbody th{width:24%}td b{white-space:nowrap}.wide{overflow-x:auto}
.words td,.words tbody th{font-weight:400;line-height:1.7;width:33%}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));gap:1.8rem 2rem}
figure{margin:0}figcaption{font-weight:550;font-size:.95rem;margin-bottom:.4rem}figcaption .note{font-weight:400}
figcaption .note,small{display:block}svg{display:block;width:100%;height:auto}svg text{font-family:inherit!important}
mark,ins{color:inherit;background:var(--wrong);border-radius:3px;padding:0 .2em;text-decoration:none}
ins{background:var(--more)}del{color:var(--grey)}details{margin:.9rem 0}summary{cursor:pointer}
pre{overflow-x:auto;font-size:.825rem;line-height:1.45;padding:.8rem 1rem;border:1px solid var(--pale)}
"""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": GREY, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.formatter.limits": (-3, 6),
    "grid.color": PALE, "grid.linewidth": 0.6, "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "legend.frameon": False, "legend.handlelength": 1.8, "legend.columnspacing": 1.4,
    "legend.borderpad": 0.0,
}  # fmt: skip
STYLES: dict[str, Any] = {
    "train": {"linewidth": 1.0, "alpha": 0.6},
    "valid": {"linewidth": 1.5, "marker": "o", "markersize": 3},
}
KINDS = {"train": "training", "valid": "validation"}
PANELS = {
    "contrastive": ("Contrastive loss", "nats per masked frame"),
    "accuracy": ("Accuracy", "% of masked frames"),
    "accuracy_all_masked": ("Accuracy, every frame masked", "% of masked frames"),
    "code_perplexity": ("Code perplexity", "entries, as if equally used"),
    "prob_perplexity": ("Probability perplexity", "entries, as if equally used"),
    "learning_rate": ("Learning rate", "learning rate"),
    "cer": ("Character error rate (CER)", "% of characters"),
    "wer": ("Word error rate (WER)", "% of words"),
    "blank_share": ("Blank frames", "% of frames"),
    "loss_per_label": ("Loss per label", "nats"),
    "length_ratio": ("Length of what is said", "labels of greedy decoding per label of the reference"),
}
"""Title and unit of a figure; whatever else a run logs gets its name for a title."""
COMPANIONS = {
    "accuracy": ("accuracy_all_masked", "every frame masked", GREY),
    "code_perplexity": ("prob_perplexity", "of probabilities", GREEN),
}
"""Drawn into the panel of another: column, label, colour."""
PRETRAINING = ("contrastive", "accuracy", "code_perplexity", "learning_rate")
ARMS = {"finetuned": ("pretrained", BLUE), "scratch": ("from scratch", ORANGE)}
STAGES = {"pretrain": "Pretraining", **{arm: f"Fine-tuning, {label}" for arm, (label, _) in ARMS.items()}}
"""Run folders of a demo, and what they are called."""
KEYS = (
    "recipe", "data.train.hours", "data.train.utterances", "data.valid.hours", "model.n_layer", "model.n_embd",
    "model.mask_prob", "model.mask_length", "loss_weights.diversity", "data.batch_seconds", "train.accumulate",
    "train.devices", "optim.schedule.peak", "optim.schedule.total_steps", "train.precision", "train.seed", "python",
    "packages.w2v2", "packages.torch", "git_revision", "device",
)  # fmt: skip
"""Settings shown without unfolding; a configuration of the user's own may lack some."""
READING = (
    ("Accuracy", "accuracy", "{:.1%}", "Masked frames whose own code the model scores above {distractors} distractors "
     "from the same utterance. Only what exceeds the next row was learnt from context."),
    ("Accuracy, every frame masked", "accuracy_all_masked", "{:.1%}", "The same with nothing left to hear: what "
     "guessing the usual codes earns. Without this baseline an accuracy says little."),
    ("Distinct codes per utterance", "codes_per_utterance", "{:.1f}", "Distractors equal to the target do not count, "
     "so with few codes chance is nearer 1/{codes:.0f} = {chance:.1%} than 1/{options} = {naive:.1%}."),
    ("Contrastive loss, nats", "loss", "{:.3f}", "ln {options} = {blind:.3f} is a blind choice. Lower is better, but a "
     "collapsed codebook brings it to 0 as well."),
    ("Code perplexity", "code_perplexity", "{:.1f}", "Entries in use, as if used equally, summed over {groups} "
     "codebooks: at most {most}; {groups} is collapse."),
    ("Probability perplexity", "prob_perplexity", "{:.1f}", "The same for the probabilities that codes are drawn from, "
     "which the diversity loss spreads out."),
)  # fmt: skip
"""Figures of pretraining: name, key in the summary, format, how to read it."""
MAX_POINTS, CLEAR = 600, 0.02
"""Points of a curve at most, means of neighbours beyond; relative difference of error rates below which none counts."""

Series = dict[int, float]
"""Values by optimiser step."""
Line = tuple[str, Series, str, str]
"""Label, values, colour, and ``train`` or ``valid``."""


class Markup(str):
    """HTML; any other string is text, and gets escaped."""


def write_run_report(run: Path) -> Path:
    """Write ``RUN/report.html``: what ran, final figures, curves.

    Raises:
        UsageError: no metrics.csv, or nothing in it.
    """
    metrics, config = _metrics(run), _json(run / "config.json", {})
    names = list(dict.fromkeys(column.rpartition("/")[2] for column in metrics))
    final = [(_title(name), *(_final(name, metrics.get(f"{kind}/{name}")) for kind in KINDS)) for name in names]
    drawn = {*names} - {column for column, *_ in COMPANIONS.values()}
    panels = [_panel(name, metrics, config) for name in dict.fromkeys((*PANELS, *names)) if name in drawn]
    return _write(
        run,
        f"Run {run.resolve().name}",
        _tag("p", f"Recipe {config.get('recipe') or 'unknown'}, {_end(metrics):,} optimiser updates.", class_="lead"),
        _section("What ran", *_settings({"This run": run})),
        _section("Final figures, not the best", _table(("Figure", "Training", "Validation"), final)),
        _section("Curves", _tag("div", *panels, class_="figures")),
    )


def write_demo_report(folder: Path) -> Path:
    """Write ``FOLDER/report.html``: whether pretraining helped, how much, and what it takes to judge that.

    Args:
        folder: with summary.json and the run folders pretrain, finetuned and scratch; hypotheses.json, codebook.json
            and example.npz each add a section.

    Raises:
        UsageError: no summary.json, one without error rates, or a run without metrics.
    """
    path = _existing(folder, "summary.json", "the results of a demo", "name the folder of a finished w2v2 demo")
    summary = _json(path, {})
    for arm in ARMS:
        if not {"wer", "cer"} <= set(summary.get(arm, {})):
            got = ", ".join(summary.get(arm, {})) or "nothing"
            raise UsageError(f"{path}: expected wer and cer under {arm!r}, got {got}; let w2v2 demo finish")
    runs = {name: folder / name for name in STAGES}
    metrics = {name: _metrics(run) for name, run in runs.items()}
    config = _json(runs["pretrain"] / "config.json", {})
    panels = [_panel(name, metrics["pretrain"], config) for name in PRETRAINING]
    command = summary.get("command", f"w2v2 demo --out {folder.resolve().name}")
    return _write(
        folder,
        "w2v2 demo: does pretraining help?",
        *_headline(summary, runs, metrics),
        _section("Key figures", _key_figures(summary, config.get("model", {}))),
        _section("Pretraining", _tag("div", *panels, class_="figures")),
        _section("Fine-tuning, both arms", *_arms(metrics)),
        _codebook(_json(folder / "codebook.json", {}).get("counts", [])),
        _example(folder / "example.npz"),
        _hypotheses(_json(folder / "hypotheses.json", [])),
        _section("Time and memory", *_times(summary)),
        _section("Settings and environment", *_settings({STAGES[name]: run for name, run in runs.items()})),
        _section("Make this page", _tag("pre", _tag("code", command))),
    )


def _metrics(run: Path) -> dict[str, Series]:
    remedy = "name a folder that w2v2 pretrain or finetune wrote"
    path = _existing(run, "metrics.csv", "the figures of a run", remedy)
    found: dict[str, Series] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                for name, value in row.items():
                    if name != "step" and value:
                        found.setdefault(name, {})[int(row["step"])] = float(value)
            except (KeyError, TypeError, ValueError) as error:
                got = f"{type(error).__name__} {error}"
                raise UsageError(f"{path}: expected a column step and numbers, got {got}; {remedy}") from None
    if not found:
        raise UsageError(f"{path} holds no figures: expected logged steps, got none; wait for the first, or run again")
    return found


def _existing(folder: Path, name: str, what: str, remedy: str) -> Path:
    if not (folder / name).is_file():
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise UsageError(f"no {name} in {folder}: expected {what}, got {inside or 'an empty folder'}; {remedy}")
    return folder / name


def _json(path: Path, absent: Any) -> Any:
    try:
        return json.loads(path.read_text()) if path.is_file() else absent
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: expected JSON, got {error}; have it written again") from None


def _headline(
    summary: dict[str, Any], runs: dict[str, Path], metrics: dict[str, dict[str, Series]]
) -> tuple[Markup, Markup]:
    ours, scratch = (summary[arm]["cer"] for arm in ARMS)
    ratio = ours / scratch if scratch else math.nan
    verdict = "helped" if ratio < 1 - CLEAR else "did not help" if ratio > 1 + CLEAR else "made no clear difference"
    data = {name: _json(run / "environment.json", {}).get("data", {}).get("train", {}) for name, run in runs.items()}
    minutes = summary.get("labelled_minutes", 60 * data["finetuned"].get("hours", 0))
    labels = f"{minutes:.1f} minutes of" if minutes else "the same"
    hours = f" on {data['pretrain']['hours']:.2f} hours of speech" if "hours" in data["pretrain"] else ""
    ends = {name: _end(found) for name, found in metrics.items()}
    lead = (
        f"Pretraining {verdict}: after fine-tuning on {labels} transcribed speech, the pretrained model has a "
        f"character error rate of {ours:.1%}, the same model from random weights {scratch:.1%}, a ratio of {ratio:.2f}."
    )
    fine_print = (
        f"Measured on the {summary.get('test_split', 'test')} split. Pretrained for {ends['pretrain']:,} updates"
        f"{hours} without transcripts, fine-tuned for {ends['finetuned']:,} updates, from scratch {ends['scratch']:,}. "
        "One run of each: a small difference says little, and another seed may turn it."
    )
    if data["finetuned"] != data["scratch"] or ends["finetuned"] != ends["scratch"]:
        fine_print += " The arms differ in data or updates, so this is not a fair comparison."
    return _tag("p", lead, class_="lead"), _tag("p", fine_print, class_="note")


def _key_figures(summary: dict[str, Any], model: dict[str, Any]) -> Markup:
    figures, distractors = summary.get("pretrain", {}), model.get("num_distractors", 100)
    options, groups, codes = 1 + distractors, model.get("n_groups", 2), figures.get("codes_per_utterance") or math.nan
    words = {
        "distractors": distractors, "options": options, "naive": 1 / options, "blind": math.log(options),
        "codes": codes, "chance": 1 / codes, "groups": groups, "most": groups * model.get("n_entries", 320),
    }  # fmt: skip
    rows = [
        (f"{name}, pretrained / from scratch", " / ".join(f"{summary[arm][key]:.1%}" for arm in ARMS), remark)
        for name, key, remark in (
            ("CER", "cer", "Wrong, missing and extra characters per reference character. Lower is better."),
            ("WER", "wer", "The same in words. One wrong letter spoils a word, so it falls later than the CER."),
        )
    ]
    intervals = [summary[arm].get("cer_interval") for arm in ARMS]
    if all(intervals):
        said = " / ".join("{:.1%} to {:.1%}".format(*interval) for interval in intervals)
        rows.insert(1, ("95 % interval of the CER", said, "Were others to speak, of the same kind, in the same rooms."))
    rows += [
        (name, form.format(figures[key]), remark.format(**words))
        for name, key, form, remark in READING
        if figures.get(key) is not None
    ]
    cells = [(name, _tag("b", value), remark) for name, value, remark in rows]
    return _table(("Figure", "Value", "How to read it"), cells)


def _panel(name: str, metrics: dict[str, Series], config: dict[str, Any]) -> Markup:
    other, suffix, colour = COMPANIONS.get(name, ("", "", ""))
    lines: list[Line] = []
    for column, series in metrics.items():
        kind, _, figure = column.rpartition("/")
        if figure == name:
            lines.append((KINDS.get(kind, kind or figure), series, BLUE, kind))
        elif figure == other:
            lines.append((f"{KINDS.get(kind, kind)}, {suffix}", series, colour, kind))
    options = 1 + config.get("model", {}).get("num_distractors", 100)
    level = (math.log(options), f"ln {options}, blind choice") if name == "contrastive" else None
    return _curves(*PANELS.get(name, (_title(name), "")), lines, level)


def _curves(title: str, unit: str, lines: list[Line], level: tuple[float, str] | None = None) -> Markup:
    scale = 100 if unit.startswith("%") else 1
    lines = [line for line in lines if line[1]]
    values = [value for _, series, *_ in lines for value in series.values()]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="optimiser updates", ylabel=unit)
        for label, series, colour, kind in lines:
            steps, heights = (
                [part.mean() for part in np.array_split(np.array(list(column)), min(len(series), MAX_POINTS))]
                for column in (series, series.values())
            )
            axes.plot(
                steps, scale * np.array(heights), label=label, color=colour, linestyle="--" if colour == GREY else "-",
                gid=re.sub(r"\W+", "-", f"{title} {label}").lower(), **STYLES.get(kind, {}),
            )  # fmt: skip
        if level:
            axes.axhline(level[0], color=GREY, linestyle=":", linewidth=1.2, label=level[1])
        if scale == 100:
            axes.set_ylim(bottom=0)
        elif title != "Learning rate" and 0 < 50 * min(values, default=0) < max(values, default=0):
            axes.set_yscale("log")
        axes.set_xlim(left=0)
        if len(lines) > 1 or level:
            figure.legend(loc="outside upper left", ncols=2 if len(lines) > 3 else 3)

    ends = [f"{label} ends at {scale * _last(series):.4g}" for label, series, *_ in lines]
    return _figure(title, f"{title}, {unit or 'value'}, over optimiser updates; {', '.join(ends)}.", draw)


def _figure(
    title: str, alt: str, draw: Callable[[Figure], None], size: tuple[float, float] = (4.7, 2.9), note: str = ""
) -> Markup:
    """A figure as inline SVG that takes text and colours from the page."""
    file = io.StringIO()
    style: Any = {**STYLE, "svg.hashsalt": alt}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", transparent=True)
    drawing = re.sub(r"^.*?<svg|<metadata>.*?</metadata>| id=\"[\w.]+_\d+\"", "", file.getvalue(), flags=re.DOTALL)
    attributes, _, inside = drawing.partition(">")
    box = attributes.partition('viewBox="')[2].partition('"')[0]
    for colour, name in COLOURS.items():
        inside = inside.replace(colour, f"var(--{name})")
    svg = Markup(f'<svg viewBox="{box}" role="img" aria-label="{html.escape(alt)}">{inside}')
    return _tag("figure", _tag("figcaption", title, _tag("span", note, class_="note")), svg)


def _arms(metrics: dict[str, dict[str, Series]]) -> list[Markup]:
    curves = {(rate, arm): metrics[arm].get(f"valid/{rate}", {}) for rate in ("cer", "wer") for arm in ARMS}
    figures = [
        _curves(*PANELS[rate], [(*ARMS[arm][:1], curves[rate, arm], ARMS[arm][1], "valid") for arm in ARMS])
        for rate in ("cer", "wer")
    ]
    ours, scratch = (curves["cer", arm] for arm in ARMS)
    both = ours.keys() & scratch.keys()
    lower = sum(ours[step] < scratch[step] for step in both)
    text = f"Both arms at every validation. The pretrained one has the lower CER at {lower} of {len(both)}."
    steps = sorted({step for series in curves.values() for step in series})
    rows = [(f"{at:,}", *(f"{s[at]:.1%}" if at in s else "" for s in curves.values())) for at in steps]
    header = ("Updates", *(f"{rate.upper()}, {ARMS[arm][0]}" for rate, arm in curves))
    table = _tag("details", _tag("summary", "The numbers"), _table(header, rows))
    return [_tag("p", text), _tag("div", *figures, class_="figures"), table]


def _codebook(counts: list[list[float]]) -> Markup:
    def draw(figure: Figure, share: NDArray[np.float64]) -> None:
        axes = figure.add_subplot(
            xlabel="entries, most used first", ylabel="% of masked frames, log", xlim=(0, len(share))
        )
        floor = 100 * min(share[share > 0], default=1)
        axes.stairs(100 * share, fill=True, color=BLUE, baseline=floor / 2)
        axes.set(yscale="log", ylim=(floor / 2, None))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axhline(100 / len(share), color=GREY, linestyle=":", linewidth=1.2, label="all used equally")
        figure.legend(loc="outside upper left")

    figures = []
    for number, group in enumerate(counts, 1):
        share = np.sort(np.asarray(group, float))[::-1] / max(sum(group), 1)
        used = share[share > 0]
        title = f"Codebook {number}: {len(used)} of {len(share)} entries used, {len(share) - len(used)} dead"
        note = f"Perplexity {math.exp(-(used * np.log(used)).sum()):.1f}; the most used entry takes {share[0]:.1%}."
        alt = f"{title}. Bars: share of masked frames of each entry, most used first. {note}"
        figures.append(_figure(title, alt, partial(draw, share=share), (4.7, 2.4), note))
    return _section("Codebook use", _tag("div", *figures, class_="figures")) if figures else Markup()


def _example(path: Path) -> Markup:
    if not path.is_file():
        return Markup()
    with np.load(path) as data:
        audio, mask, hop, name = data["audio"], data["mask"], int(data["hop"]), str(data["id"])
    seconds, step = len(audio) / 16_000, max(160, len(audio) // 600)
    # differences lift the high frequencies, which in speech are far weaker
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(np.diff(audio), 200), 400)[::step] * np.hanning(400)
    level = 20 * np.log10(np.abs(np.fft.rfft(windows)).T + 1e-6)
    level -= level.max()
    spans = (np.flatnonzero(np.diff(np.pad(mask.astype(int), 1))) * hop / 16_000).reshape(-1, 2)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="seconds", ylabel="kHz")
        axes.grid(False)
        image = axes.imshow(
            level, cmap="magma", vmin=-80, vmax=0, extent=(0, seconds, 0, 8), origin="lower", aspect="auto",
            interpolation="none",
        )  # fmt: skip
        for start, end in spans:
            axes.axvspan(start, end, color=GREY, alpha=0.78, linewidth=0)
        axes.set_xlim(0, seconds)
        figure.colorbar(image, label="dB, loudest 0", pad=0.01)

    title = f"Utterance {name}: {mask.mean():.0%} of {len(mask)} frames masked, in {len(spans)} spans"
    alt = f"{title}. Spectrogram of {seconds:.1f} seconds, 0 to 8 kHz, masked spans veiled."
    note = "Veiled spans are masked: the model has to tell their codes from what is left."
    return _section("What the model gets to hear", _figure(title, alt, draw, (9.6, 3.1), note))


def _hypotheses(items: list[dict[str, str]]) -> Markup:
    chosen = [items[i * len(items) // 10] for i in range(10)] if len(items) > 10 else items
    rows = [(item["reference"], *(_differences(item["reference"], item[arm]) for arm in ARMS)) for item in chosen]
    legend = _tag(
        "p", f"{len(rows)} utterances, spread evenly over the list, not chosen: ", _tag("mark", "wrong word"), " ",
        _tag("ins", "+ extra word"), " ", _tag("del", "missing word"), class_="note",
    )  # fmt: skip
    table = _table(("Reference", *(label.capitalize() for label, _ in ARMS.values())), rows)
    return _section("Transcripts", legend, _tag("div", table, class_="words")) if rows else Markup()


def _differences(reference: str, hypothesis: str) -> Markup:
    said, heard = reference.split(), hypothesis.split()
    result = jiwer.process_words(" ".join(said), " ".join(heard))
    words: list[str] = []
    for part in result.alignments[0]:
        new = heard[part.hyp_start_idx : part.hyp_end_idx]
        if part.type == "equal":
            words += new
        elif part.type == "delete":
            words += [_tag("del", word) for word in said[part.ref_start_idx : part.ref_end_idx]]
        else:
            words += [_tag("ins", f"+ {word}") if part.type == "insert" else _tag("mark", word) for word in new]
    wrong = result.substitutions + result.deletions + result.insertions
    return Markup(" ".join(map(_html, words)) + _tag("small", f"{wrong} errors in {len(said)} words"))


def _times(summary: dict[str, Any]) -> list[Markup]:
    seconds = dict(summary.get("seconds", {}))
    total = seconds.pop("total", None) or sum(seconds.values()) or 1
    rows = [(_title(name), f"{spent:,.1f}", f"{spent / total:.0%}") for name, spent in seconds.items()]
    peak = summary.get("peak_memory_gib")
    text = f"{total / 60:.1f} minutes in all" + (f", {peak:.2f} GiB of memory at most." if peak else ".")
    return [_tag("p", text), _table(("Stage", "Seconds", "Share"), rows)]


def _settings(runs: dict[str, Path]) -> list[Markup]:
    files = ("config.json", "environment.json")
    columns = [{k: v for file in files for k, v in _flat(_json(run / file, {})).items()} for run in runs.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: (name, *(column.get(name, "") for column in columns)) for name in names}
    header = ("Setting", *runs)
    everything = _tag("details", _tag("summary", "All settings and versions"), _table(header, list(rows.values())))
    return [_table(header, [rows[name] for name in KEYS if name in rows]), everything]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None and name != "_type":
            found[prefix + name] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return found


def _title(name: str) -> str:
    return PANELS[name][0] if name in PANELS else name.replace("_", " ").capitalize()


def _last(series: Series) -> float:
    return series[max(series)]


def _final(name: str, series: Series | None) -> str:
    percent = name in PANELS and PANELS[name][1].startswith("%")
    return format(_last(series), ".2%" if percent else ".4g") if series else ""


def _end(metrics: dict[str, Series]) -> int:
    return max(step for series in metrics.values() for step in series)


def _html(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(text)


def _tag(name: str, *parts: str, **attributes: str) -> Markup:
    opening = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{opening}>{''.join(map(_html, parts))}</{name}>")


def _section(title: str, *parts: Markup) -> Markup:
    return _tag("section", _tag("h2", title), *parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    head = _tag("thead", _tag("tr", *(_tag("th", title, scope="col") for title in header)))
    body = [_tag("tr", _tag("th", first, scope="row"), *(_tag("td", cell) for cell in rest)) for first, *rest in rows]
    return _tag("div", _tag("table", head, _tag("tbody", *body)), class_="wide")


def _write(folder: Path, title: str, *parts: Markup) -> Path:
    meta = Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width">')
    head = _tag("head", meta, _tag("title", title), _tag("style", Markup(CSS)))
    page = _tag("html", head, _tag("body", _tag("main", _tag("h1", title), *parts)), lang="en")
    path = folder / "report.html"
    path.write_text(f"<!doctype html>\n{page}\n", encoding="utf-8")
    return path
