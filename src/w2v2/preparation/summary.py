"""What is told of a prepared corpus."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class _Audit(TypedDict):
    ok: int
    warned: int
    rejected: int
    reasons: dict[str, int]
    unlisted: NotRequired[int]
    passed_over: NotRequired[dict[str, int]]


class _Split(TypedDict):
    hours: float
    utterances: int
    speakers: int
    transcribed: int


class Corpus(TypedDict):
    """What ``corpus.json`` holds, of what is looked at again."""

    schema: int
    options: dict[str, Any]
    audit: _Audit
    splits: NotRequired[dict[str, _Split]]


def summary_table(summary: dict[str, Any]) -> list[str]:
    """Lines that tell a person what came out."""
    counts = summary["audit"]
    lines = [f"{counts['ok']} ok, {counts['warned']} with a warning, {counts['rejected']} rejected"]
    if unlisted := counts.get("unlisted"):
        lines.append(f"{unlisted} of these are in no split: the list of splits does not name them")
    if passed_over := counts.get("passed_over"):
        lines.append("passed over: " + ", ".join(f"{count} {what}" for what, count in passed_over.items()))
    lines += [f"  {reason:20} {count:8}" for reason, count in counts["reasons"].items() if count]
    for name, split in summary.get("splits", {}).items():
        lines.append(
            f"{name:10} {split['hours']:9.2f} h {split['utterances']:9} utterances {split['speakers']:6} speakers "
            f"{split['transcribed']:9} with a transcript"
        )
    return lines
