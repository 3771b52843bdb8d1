"""Figures of a report, as SVG to stand in the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from w2v2.errors import UsageError

INK, PALE, GREY = "#1f2328", "#d9dde1", "#7d858e"
BLUE, ORANGE, GREEN = "#2563a8", "#c2571a", "#2f7d5b"
COLOURS = {INK: "ink", PALE: "pale", GREY: "grey", BLUE: "blue", ORANGE: "orange", GREEN: "green"}
"""Colours of the figures, each a variable of page.css: they follow the reader's light or dark mode."""
STYLES: dict[str, dict[str, Any]] = {
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
    "phones_one": ("Phones told from one frame", "% of frames"),
    "purity": ("Purity of the codes", "% of frames with their code's phone"),
    "information": ("What codes tell of phones", "% of the phones' entropy"),
    "length_ratio": ("Length of what is said", "labels of greedy decoding per label of the reference"),
}
"""Title and unit of a figure; whatever else a run logs gets its name for a title."""
COMPANIONS = {
    "accuracy": ("accuracy_all_masked", "every frame masked", GREY),
    "code_perplexity": ("prob_perplexity", "of probabilities", GREEN),
}
"""Drawn into the panel of another: column, label, colour."""
MAX_POINTS = 600
"""Points of a curve at most, means of neighbours beyond."""

Series = dict[int, float]
"""Values by optimiser step."""
Line = tuple[str, Series, str, str]
"""Label, values, colour, and ``train`` or ``valid``."""


class Drawing(NamedTuple):
    """A figure of the page: what stands around it (a title may be empty), and its inside as SVG."""

    title: str
    note: str
    alt: str
    box: str
    inside: Markup


def panel(name: str, metrics: dict[str, Series], config: dict[str, Any]) -> Drawing:
    """Draw training and validation of one figure of a run.

    Args:
        name: of the figure, without ``train/`` or ``valid/``.
        metrics: columns of metrics.csv.
        config: of the run, for what a blind choice costs.
    """
    other, suffix, colour = COMPANIONS.get(name, ("", "", ""))
    lines: list[Line] = []
    for column, series in metrics.items():
        kind, _, figure = column.rpartition("/")
        if kind.startswith("probe/") and figure == name:
            lines.append((kind[6:].replace("_", " "), series, BLUE if "layer" in kind else GREY, kind))
        elif figure == name:
            lines.append((KINDS.get(kind, kind or figure), series, BLUE, kind))
        elif figure == other:
            lines.append((f"{KINDS.get(kind, kind)}, {suffix}", series, colour, kind))
    distractors = config.get("model", {}).get("num_distractors")
    blind = name == "contrastive" and distractors is not None
    level = (math.log(1 + distractors), f"ln {1 + distractors}, blind choice") if blind else None
    return curves(*PANELS.get(name, (title_of(name), "")), lines, level)


def curves(title: str, unit: str, lines: list[Line], level: tuple[float, str] | None = None) -> Drawing:
    """Draw lines over optimiser updates, and a dotted level with its label."""
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
                gid=re.sub(r"\W+", "-", f"{title} {label}").lower(), **_style(kind, lines),
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

    ends = [f"{label} ends at {scale * series[max(series)]:.4g}" for label, series, *_ in lines]
    return _figure(title, f"{title}, {unit or 'value'}, over optimiser updates; {', '.join(ends)}.", draw)


def _style(kind: str, lines: list[Line]) -> dict[str, Any]:
    """Of a kind of line; probes of layers are darker the deeper they are."""
    styles: dict[str, dict[str, Any]] = STYLES
    layers = [other for *_, other in lines if other.startswith("probe/layer")]
    if kind not in layers:
        return styles.get(kind, {})
    return styles["valid"] | {"alpha": 0.3 + 0.7 * layers.index(kind) / max(len(layers) - 1, 1)}


def _figure(
    title: str, alt: str, draw: Callable[[Figure], None], size: tuple[float, float] = (4.7, 2.9), note: str = ""
) -> Drawing:
    """A figure as inline SVG that takes text and colours from the page."""
    file = io.StringIO()
    with resources.as_file(resources.files(__package__) / "figures.mplstyle") as style:
        context = matplotlib.rc_context({"svg.hashsalt": alt}, fname=style)
    with context:
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        FigureCanvasSVG(figure).print_svg(file)  # Figure.savefig draws everything once more before
    drawing = re.sub(r"^.*?<svg|<metadata>.*?</metadata>| id=\"[\w.]+_\d+\"", "", file.getvalue(), flags=re.DOTALL)
    attributes, _, inside = drawing.partition(">")
    for colour, name in COLOURS.items():
        inside = inside.replace(colour, f"var(--{name})")
    box = attributes.partition('viewBox="')[2].partition('"')[0]
    return Drawing(title, note, alt, box, Markup(inside))


def codebooks(counts: list[list[float]]) -> list[Drawing]:
    """Draw the use of entries in each codebook, from their counts."""

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
    return figures


def example(path: Path) -> Drawing | None:
    """Draw the spectrogram and the masked spans of example.npz, where there is one."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as data:
            audio, mask, hop, name = data["audio"], data["mask"], int(data["hop"]), str(data["id"])
        if audio.ndim != 1 or mask.ndim != 1 or audio.dtype.kind != "f" or not 400 < len(audio) < 1 << 22 or hop < 1:
            raise ValueError(f"audio of {audio.shape} {audio.dtype}, a mask of {mask.shape}")
    except Exception as error:  # numpy's reader fails in any way that the bytes please
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path}: expected audio, mask, hop and id, got {reason}; remove it") from None
    spans = (np.flatnonzero(np.diff(np.pad(mask.astype(int), 1))) * hop / 16_000).reshape(-1, 2)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="seconds", ylabel="kHz")
        image = _spectrogram(axes, audio)
        for start, end in spans:
            axes.axvspan(start, end, color=GREY, alpha=0.78, linewidth=0)
        figure.colorbar(image, label="dB, loudest 0", pad=0.01)

    title = f"Utterance {name}: {mask.mean():.0%} of {len(mask)} frames masked, in {len(spans)} spans"
    alt = f"{title}. Spectrogram of {len(audio) / 16_000:.1f} seconds, 0 to 8 kHz, masked spans veiled."
    note = "Veiled spans are masked: the model has to tell their codes from what is left."
    return _figure(title, alt, draw, (9.6, 3.1), note)


def utterance(name: str, audio: NDArray[np.float32], words: Sequence[tuple[str, float, float]]) -> Drawing:
    """Draw the spectrogram of an utterance, its words above at their times: text, start and end in seconds."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(yticks=[0, 8], yticklabels=["0", "8 kHz"])
        _spectrogram(axes, audio)
        ends = [0.0, 0.0]  # of what is written in either row, so that no word covers another
        for text, start, end in words:
            for time in (start, end):
                axes.axvline(time, color="white", alpha=0.55, linewidth=0.7)
            middle, half = (start + end) / 2, len(text) * 0.006 * len(audio) / 16_000
            row = 0 if middle - half >= ends[0] else 1
            ends[row] = middle + half
            axes.text(
                middle, 1.03 + 0.14 * row, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                fontsize=8,
            )  # fmt: skip
        axes.xaxis.set_major_formatter("{x:g} s")

    spoken = "; ".join(f"{text} from {start:.2f} to {end:.2f}" for text, start, end in words) or "not known"
    alt = f"Spectrogram of {name}, 0 to 8 kHz. Words and their times in seconds: {spoken}."
    return _figure("", alt, draw, (9.6, 1.55))


def _spectrogram(axes: Axes, audio: NDArray[np.float32]) -> AxesImage:
    seconds, step = len(audio) / 16_000, max(160, len(audio) // 600)
    # differences lift the high frequencies, which in speech are far weaker
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(np.diff(audio), 200), 400)[::step] * np.hanning(400)
    level = 20 * np.log10(np.abs(np.fft.rfft(windows)).T + 1e-6)
    axes.grid(False)
    return axes.imshow(
        np.round((level - level.max()) / 2) * 2, cmap="magma", vmin=-80, vmax=0, extent=(0, seconds, 0, 8),
        origin="lower", aspect="auto", interpolation="none",
    )  # fmt: skip


def layers(rows: list[dict[str, Any]]) -> list[Drawing]:
    """Draw what a linear probe tells of phones by layer, from one frame and from five.

    Args:
        rows: as of ``evaluation.probe.probe``.
    """

    def draw(figure: Figure, key: str) -> None:
        axes = figure.add_subplot(xlabel="output of block (0: convolutions)", ylabel="% of frames")
        for kind, label, colour in (("model", "pretrained", BLUE), ("random", "random weights", ORANGE)):
            points = {row["layer"]: 100 * row[key] for row in rows if row["features"] == kind}
            axes.plot(list(points), list(points.values()), label=label, color=colour, **STYLES["valid"])
        level = 100 * next(row[key] for row in rows if row["features"] == "log-mel")
        axes.axhline(level, color=GREY, linestyle=":", linewidth=1.2, label="log-mel spectrum")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper left", ncols=3)

    figures = []
    names = [f"{row['features']} " + ("" if row["layer"] is None else f"layer {row['layer']} ") for row in rows]
    for key, frames in (("phones_one", "one frame"), ("phones_five", "five frames")):
        shares = "; ".join(f"{name}{row[key]:.1%}" for name, row in zip(names, rows, strict=True))
        title = f"Phones told from {frames}"
        figures.append(_figure(title, f"{title}, % of frames by layer: {shares}.", partial(draw, key=key), (4.7, 2.4)))
    return figures


def title_of(name: str) -> str:
    """A heading for what a run calls ``name``."""
    return PANELS[name][0] if name in PANELS else name.replace("_", " ").capitalize()
