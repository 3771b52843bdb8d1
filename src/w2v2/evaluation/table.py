"""An evaluation as lines to read."""

from __future__ import annotations

from typing import Any


def evaluation_table(evaluation: dict[str, Any]) -> list[str]:
    """Lines to read, from what ``evaluation.json`` holds."""
    lines = [f"{'':12}{'rate':>9}  {'95 % interval':>18}{'errors':>9}{'reference':>11}{'sub':>8}{'del':>8}{'ins':>8}"]
    for name in ("words", "characters"):
        row = evaluation[name]
        interval = "" if row["interval"] is None else "{:.2%} to {:.2%}".format(*row["interval"])
        lines.append(
            f"{name:12}{row['rate']:>9.2%}  {interval:>18}{row['errors']:>9,}{row['reference']:>11,}"
            f"{row['substitutions']:>8,}{row['deletions']:>8,}{row['insertions']:>8,}"
        )
    lines += ["", *_remarks(evaluation), *_comparison(evaluation["against"])]
    worst = sorted(evaluation["by_speaker"], key=lambda row: -row["wer"])
    for title, rows in (
        ("seconds", [(_span(row), row) for row in evaluation["by_length"]]),
        ("speaker, worst first", [(row["speaker"] or "unknown", row) for row in worst[:10]]),
    ):
        lines += ["", f"{title:24}{'utterances':>12}{'words':>9}{'WER':>9}{'CER':>9}"]
        lines += [
            f"{name:24}{row['utterances']:>12,}{row['words']:>9,}{row['wer']:>9.2%}{row['cer']:>9.2%}"
            for name, row in rows
        ]
    for name, rows in evaluation["frequent"].items():
        lines += ["", f"most frequent {name}"] if rows else []
        lines += [f"{row['count']:>6}  {' -> '.join(row['words'])}" for row in rows[:10]]
    return lines


def probe_table(probe: dict[str, Any]) -> list[str]:
    """Lines to read, from what ``probe`` returns."""
    about = "{scored:,} frames of {voices} voices, {classes} phones; trained on {train:,} of {others}".format(
        classes=len(probe["classes"]),
        voices=probe["speakers"]["scored"],
        others=probe["speakers"]["train"],
        **probe["frames"],
    )
    columns = {"phones_one": "1 frame", "phones_five": "5 frames", "speakers": "speaker"}
    if "abx_within" in probe["rows"][0]:
        columns |= {"abx_within": "ABX within", "abx_across": "across"}
    lines = [f"{'accuracy':20}" + "".join(f"{title:>11}" for title in columns.values())]
    for row in probe["rows"]:
        name = row["features"] if row["layer"] is None else f"{row['features']}, layer {row['layer']}"
        cells = (row[key] for key in columns)
        lines.append(f"{name:20}" + "".join(f"{'-' if cell is None else format(cell, '.3f'):>11}" for cell in cells))
    if probe["codes"] is not None:
        lines.append("codes: purity {purity:.3f}, {information:.3f} of the phones' entropy".format(**probe["codes"]))
    return [about, "", *lines]


def _span(row: dict[str, Any]) -> str:
    return f"{row['from']:g} and more" if row["to"] is None else f"{row['from']:g} to {row['to']:g}"


def _comparison(tested: dict[str, Any] | None) -> list[str]:
    if tested is None:
        return []
    lines = ["", f"less the rate of {tested['other']}, over {tested['units']} {tested['over']}"]
    for name in ("wer", "cer"):
        row = tested[name]
        interval = "no interval" if row["interval"] is None else "{:+.2%} to {:+.2%}".format(*row["interval"])
        lines.append(f"{name.upper():12}{row['difference']:>+9.2%}  {interval:>18}   p = {row['p']:.4f}")
    return lines


def _remarks(evaluation: dict[str, Any]) -> list[str]:
    over, units = evaluation["intervals"]["over"], evaluation["intervals"]["units"]
    lines = [
        "{utterances:,} utterances, {hours:.2f} h; {sentence_error_rate:.1%} of them with an error; "
        "real-time factor {real_time_factor:.3f}".format(**evaluation, hours=evaluation["seconds"] / 3600)
    ]
    if evaluation["words"]["interval"] is None:
        lines.append(f"no interval: too few {over} ({units}), or too few that differ in their rate")
    elif over == "speakers":
        lines.append(f"intervals over {units} speakers")
    else:
        lines.append("intervals over utterances, for want of speakers: they say nothing of how speakers differ")
    for name, what in (
        ("too_short", "too short for a frame: all words deleted"),
        ("empty_references", "with an empty reference: all words inserted"),
        ("without_transcript", "without a transcript: not scored"),
    ):
        lines += [f"{evaluation[name]} utterances {what}"] if evaluation[name] else []
    strange = evaluation["without_label"]
    if strange["utterances"]:
        named = " ".join(strange["characters"])
        lines.append(f"{strange['utterances']} utterances with what the model has no label for, always wrong: {named}")
    return lines + [f"not read and not scored: {name}: {why}" for name, why in evaluation["unreadable"].items()]
