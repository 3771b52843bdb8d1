"""Writes ``docs/results.md`` from recorded figures: ``python docs/results.py``.

Prose stands in ``results.md.jinja``; every figure comes from ``docs/results/*.json``. ``demo-seed*.json`` are the
``summary.json`` of ``w2v2 demo --seed *``, ``probe-seed*.json`` its ``probe.json``; a table of several seeds grows with
the files. The other files hold rows of one table each, with the commands that gave them. A rate is a number, or
[value, low, high] with its 95 % interval. ``tests/test_results.py`` holds the page to the files.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).parent
RECORDS = HERE / "results"
RATES = {
    "finetuned": ("cer", "wer", "wer_trigram", "cer_trigram"),
    "warm_start_only": ("cer", "wer"),
    "scratch": ("cer", "wer", "wer_trigram", "cer_trigram"),
}
"""What is recorded of each arm of a demo."""


def load(path: Path) -> Any:
    """What a file of figures holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def percent(value: Any, form: str = "{:.1f}") -> str:
    """A rate in percent, with its interval where it has one; nothing for None, text as it is."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        middle, *ends = (form.format(100 * x) for x in value[:3])
        p = f", p = {value[3]:.4f}".replace("0.", ".") if len(value) > 3 else ""
        return f"{middle} ({' to '.join(ends)}){p}"
    return form.format(100 * value)


def table(rows: list[dict[str, Any]], titles: dict[str, str], signed: tuple[str, ...] = ()) -> str:
    """Rows as a table in Markdown.

    Args:
        titles: of the columns, by the key of a row; the first is the row's name.
        signed: columns of differences.
    """
    form = {key: "{:+.1f}" if key in signed else "{:.1f}" for key in titles}
    cells = [[percent(row.get(key), form[key]) for key in titles] for row in rows]
    lines = [list(titles.values()), ["---"] * len(titles), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def seeds(kind: str) -> dict[int, Any]:
    """What is recorded of a kind, ``demo`` or ``probe``, by seed."""
    files = {
        int(m[1]): path for path in RECORDS.iterdir() if (m := re.fullmatch(rf"{kind}-seed(\d+)\.json", path.name))
    }
    return {seed: load(files[seed]) for seed in sorted(files)}


def arm(summary: dict[str, Any], name: str) -> list[float]:
    """Character error rate of an arm of a demo, with its interval where there is one."""
    rates = summary[name]
    return [rates["cer"], *rates["cer_interval"]] if rates.get("cer_interval") else rates["cer"]


def demo_rows(demos: dict[int, Any]) -> list[dict[str, Any]]:
    """A row for each seed, and the means of their rates, without intervals."""
    rows = {f"seed {seed}": demo for seed, demo in demos.items()}
    if len(demos) > 1:
        rows["mean"] = {
            name: {key: statistics.fmean(demo[name][key] for demo in demos.values()) for key in rates}
            for name, rates in RATES.items()
        }
    return [{"name": name, **_rates(demo)} for name, demo in rows.items()]


def _rates(demo: dict[str, Any]) -> dict[str, Any]:
    finetuned, warm, scratch = (demo[name] for name in RATES)
    return {
        **{name: arm(demo, name) for name in RATES},
        "ratio": f"{finetuned['cer'] / scratch['cer']:.2f}",
        "to_warm": f"{finetuned['cer'] / warm['cer']:.2f}",
        "wer": f"{percent(finetuned['wer'])} / {percent(scratch['wer'])}",
        **{
            name: " / ".join(percent(rates[name]) for rates in (finetuned, scratch) if name in rates)
            for name in ("wer_trigram", "cer_trigram")
        },
    }


def probe_rows(probes: dict[int, Any], key: str) -> list[dict[str, Any]]:
    """Layers by seed and features: ``key`` of each row of a probe."""
    rows = []
    for features, name in (("log-mel", "log-mel"), ("random", "random weights"), ("model", "pretrained")):
        for seed, probe in probes.items():
            values = {row["layer"] or 0: row[key] for row in probe["rows"] if row["features"] == features}
            rows.append({"name": f"{name}, seed {seed}", **{str(layer): value for layer, value in values.items()}})
    return rows


def ablation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of each change to ``tiny``; mean, least and most of what is more than ``tiny`` of its seed."""
    runs = {(row["name"], row["seed"]): row for row in rows}
    out = []
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = [runs[key] for key in runs if key[0] == name]
        pairs = [(row, runs["tiny", row["seed"]]) for row in of_name if ("tiny", row["seed"]) in runs]
        out.append({"name": name, "seeds": ", ".join(f"{row['seed']}" for row in of_name)})
        for count in ("one", "five"):
            out[-1][count] = statistics.fmean(row[count] for row in of_name)
            if name == "tiny":
                continue
            more = [row[count] - tiny[count] for row, tiny in pairs]
            out[-1][f"{count}_more"] = [statistics.fmean(more), min(more), max(more)] if len(more) > 1 else more[0]
    return out


def long_arms(demo: dict[str, Any]) -> list[dict[str, Any]]:
    """The arms of a demo, to stand beside a longer pretraining."""
    names = {
        "finetuned": "the demo's pretraining, 10 h",
        "warm_start_only": "its warm start",
        "scratch": "random weights",
    }
    return [
        {
            "name": name,
            "cer": arm(demo, key),
            "wer": demo[key]["wer"],
            "wer_trigram": demo[key].get("wer_trigram"),
            "cer_trigram": demo[key].get("cer_trigram"),
        }
        for key, name in names.items()
    ]


def label_rows(demos: dict[int, Any], labels: dict[str, Any]) -> list[dict[str, Any]]:
    """The arms of a seed's demo, on its ten minutes of labels and on more."""
    runs: dict[tuple[int, int], dict[str, Any]] = {}
    for run in labels.values():
        runs.setdefault((run["seed"], round(run["minutes"])), {})[run["arm"]] = run
    rows = []
    for seed in dict.fromkeys(seed for seed, _ in runs):
        rows.append({"name": f"10 minutes, seed {seed}", "updates": "1,600", **_rates(demos[seed])})
        for (of, minutes), arms in runs.items():
            if of == seed and arms.keys() == RATES.keys():
                rows.append(
                    {"name": f"{minutes} minutes", "updates": f"{arms['scratch']['updates']:,}", **_rates(arms)}
                )
    return rows


def left(demos: dict[int, Any], rate: str) -> str:
    """What pretraining leaves of an error rate of random weights; the mean over seeds."""
    return f"{statistics.fmean(demo['finetuned'][rate] / demo['scratch'][rate] for demo in demos.values()):.2f}"


def spread(rows: list[dict[str, Any]], count: str) -> str:
    """How far the seeds of ``tiny`` lie apart."""
    values = [row[count] for row in rows if row["name"] == "tiny"]
    return percent(max(values) - min(values))


def apart(demos: dict[int, Any]) -> int:
    """Seeds whose intervals of pretrained and of random weights do not touch."""
    ends = [(s["finetuned"]["cer_interval"], s["scratch"]["cer_interval"]) for s in demos.values()]
    return sum(bool(ours and others) and ours[1] < others[0] for ours, others in ends)


def page() -> str:
    """The page as it should be."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["percent"] = percent
    functions = (table, demo_rows, probe_rows, ablation_rows, long_arms, label_rows, left, spread, apart)
    environment.globals |= {function.__name__: function for function in functions}
    records = {path.stem: load(path) for path in sorted(RECORDS.glob("*.json")) if "-seed" not in path.name}
    template = environment.from_string((HERE / "results.md.jinja").read_text(encoding="utf-8"))
    return template.render(demos=seeds("demo"), probes=seeds("probe"), **records)


if __name__ == "__main__":
    (HERE / "results.md").write_text(page(), encoding="utf-8")
