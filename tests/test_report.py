"""The report of a run and of a demo, from made-up figures."""

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from w2v2.errors import UsageError
from w2v2.report import write_demo_report, write_run_report
from w2v2.report.figures import MAX_POINTS

WORDS = ("THE", "OLD", "MAN", "SAW", "A", "SMALL", "BOAT", "NEAR", "RIVER", "AND", "CALLED", "HIS", "BROTHER", "TO")
CER = {"finetuned": [1.0, 0.631, 0.472, 0.3921], "scratch": [1.0, 0.812, 0.6666, 0.5804]}


def write_metrics(run: Path, columns: dict[str, dict[int, float]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        for step in sorted({step for column in columns.values() for step in column}):
            writer.writerow([step, *(repr(column[step]) if step in column else "" for column in columns.values())])


def write_settings(run: Path, config: dict[str, Any], minutes: float) -> None:
    data = {"train": {"hours": minutes / 60, "utterances": 90, "speakers": 40}, "valid": {"hours": 0.1}}
    packages = {"w2v2": "0.1.0", "torch": "2.9.0"}
    environment = {"python": "3.12.1", "packages": packages, "git_revision": "0123abcd", "device": "cpu", "data": data}
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps(environment))


def pretrain_run(run: Path, rng: np.random.Generator, steps: int = 4000) -> None:
    logged, validated = range(50, steps + 1, 50), range(500, steps + 1, 500)

    def curve(start: float, end: float, noise: float, at: range) -> dict[int, float]:
        return {t: end + (start - end) * math.exp(-3 * t / steps) + noise * rng.standard_normal() for t in at}

    write_metrics(
        run,
        {
            "train/loss": curve(30.0, 3.9, 0.02, logged),
            "train/contrastive": curve(4.62, 3.4, 0.03, logged),
            "train/accuracy": curve(0.02, 0.29, 0.006, logged),
            "train/code_perplexity": curve(300.0, 60.0, 4.0, logged),
            "train/prob_perplexity": curve(330.0, 90.0, 4.0, logged),
            "train/learning_rate": {t: 1.2e-3 * min(t / 160, 0.5 + 0.5 * math.cos(t / 1400)) for t in logged},
            "valid/contrastive": curve(4.62, 3.52, 0.01, validated),
            "valid/accuracy": curve(0.02, 0.262, 0.002, validated),
            "valid/accuracy_all_masked": curve(0.02, 0.028, 0.001, validated),
            "valid/code_perplexity": curve(300.0, 65.0, 1.0, validated),
            "valid/prob_perplexity": curve(330.0, 95.0, 1.0, validated),
        },
    )
    model = {"_type": "w2v2.model.wav2vec2:ContrastiveConfig", "n_layer": 3, "n_embd": 192, "num_distractors": 100}
    config = {"recipe": "tiny", "model": model | {"n_groups": 2, "n_entries": 320, "mask_prob": 0.65}}
    schedule = {"_type": "w2v2.training.optim:WarmupCosine", "peak": 1.2e-3, "total_steps": steps}
    write_settings(run, config | {"optim": {"schedule": schedule}, "train": {"precision": "32-true", "seed": 0}}, 120)


def demo_folder(folder: Path) -> Path:
    """Everything `w2v2 demo` leaves behind, from seeded numbers."""
    rng = np.random.default_rng(0)
    pretrain_run(folder / "pretrain", rng)
    for arm, rates in CER.items():
        cer = dict(zip(range(100, 401, 100), rates, strict=True))
        wer = {step: min(1.0, 1.3 * rate) for step, rate in cer.items()}
        write_metrics(folder / arm, {"train/loss": {50: 300.0, 400: 80.0}, "valid/cer": cer, "valid/wer": wer})
        write_settings(folder / arm, {"recipe": "tiny_ctc", "train": {"seed": 0}}, 10.1)
    hypotheses = []
    for number in range(12):
        said = [str(word) for word in rng.choice(WORDS, 9)]
        heard = [word[::-1] if rng.random() < 0.3 else word for word in said]
        hypotheses.append({"id": f"u{number}", "reference": " ".join(said), "finetuned": " ".join(heard)})
        hypotheses[-1]["scratch"] = " ".join(word for word in heard if rng.random() < 0.7) + " IT"
    hypotheses[0] |= {"reference": "A <B> & C", "finetuned": "A <script>alert(1)</script> C", "scratch": ""}
    counts = [[int(3000 / (1 + k) ** 1.3) if k < 250 - 90 * g else 0 for k in range(320)] for g in range(2)]
    summary = {
        "pretrain": {
            "accuracy": 0.26249, "accuracy_all_masked": 0.0284, "loss": 3.51984, "code_perplexity": 65.349,
            "prob_perplexity": 95.16, "codes_per_utterance": 29.4,
        },
        "finetuned": {"wer": 0.7123, "cer": 0.38149}, "scratch": {"wer": 0.8904, "cer": 0.5704},
        "seconds": {"synthesise": 66.2, "prepare": 4.1, "pretrain": 312.0, "finetune": 101.5, "scratch": 99.0,
                    "evaluate": 8.2, "total": 591.0},
        "peak_memory_gib": 1.8349, "test_split": "test", "labelled_minutes": 10.1,
    }  # fmt: skip
    (folder / "hypotheses.json").write_text(json.dumps(hypotheses))
    (folder / "codebook.json").write_text(json.dumps({"counts": counts}))
    (folder / "summary.json").write_text(json.dumps(summary))
    write_example(folder / "example.npz", rng)
    rows = [
        {"features": name, "layer": layer, "phones_one": one, "phones_five": one + 0.1, "speakers": 0.05}
        for name, shares in {"log-mel": [0.381], "model": [0.373, 0.492, 0.507], "random": [0.25, 0.296, 0.298]}.items()
        for layer, one in enumerate(shares)
    ]
    rows[0] |= {"layer": None, "speakers": None}
    frames, speakers = {"train": 41_000, "scored": 29_000}, {"train": 72, "scored": 12}
    probe = {"rows": rows, "classes": ["a", "e"], "frames": frames, "speakers": speakers}
    (folder / "probe.json").write_text(json.dumps(probe | {"codes": {"purity": 0.426, "information": 0.56}}))
    (folder / "listening.json").write_text(json.dumps([listening(number, rng) for number in range(3)]))
    return folder


def listening(number: int, rng: np.random.Generator) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * rng.standard_normal(48_000), 16_000, format="FLAC", subtype="PCM_16")
    words = [("THE", 0.2, 0.4), ("<MAN>", 0.4, 1.1), ("CALLED", 2.0, 2.8)]
    return {
        "id": f"u-{number}", "speaker": f"{number}", "seconds": 3.0, "words": words,
        "flac": base64.b64encode(file.getvalue()).decode(), "reference": "THE <MAN> CALLED",
        "finetuned": "THE <MAN> CALL", "finetuned_trigram": "THE <MAN> CALLED", "scratch": "E", "scratch_trigram": "",
    }  # fmt: skip


def write_example(path: Path, rng: np.random.Generator) -> None:
    time = np.arange(64_000) / 16_000
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time)) / 16_000
    tone = sum(np.sin(k * pitch) * math.exp(-(((k - 6) / 5) ** 2)) for k in range(1, 40))
    audio = tone * (0.05 + np.clip(np.sin(2 * np.pi * 3 * time), 0, 1)) + 0.02 * rng.standard_normal(len(time))
    mask = np.zeros(200, bool)
    for start in (5, 20, 60, 63, 110, 150, 195):
        mask[start : start + 5] = True
    np.savez_compressed(path, audio=(0.1 * audio).astype(np.float32), mask=mask, hop=320, id="s7-u<3>")


class Page(HTMLParser):
    """Checks nesting, and collects what the tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_folder(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_demo_report(folder))


def test_sections_come_in_order(page: Page) -> None:
    assert page.headings == [
        "w2v2 demo: does pretraining help?", "Listen", "What the layers know", "Key figures", "Pretraining",
        "Fine-tuning", "Codebook use", "What the model gets to hear", "Transcripts", "Time and memory",
        "Settings and environment", "Make this page",
    ]  # fmt: skip


def test_page_fetches_nothing_and_repeats_no_id(page: Page) -> None:
    assert "://" not in page.source
    assert not page.all("script") and not page.all("link")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert (
                value.startswith(("data:image/png;base64,", "data:audio/flac;base64,"))
                or value == "#"
                or value[1:] in ids
            )
    assert len(page.source) < 1.5e6


def test_every_figure_has_an_alternative_text_and_page_colours(page: Page) -> None:
    figures = page.all("svg")
    assert len(figures) == len(page.all("figure")) == 3 + 2 + 4 + 2 + 2 + 1
    assert all(f["role"] == "img" and len(f["aria-label"] or "") > 40 for f in figures)
    assert "var(--ink)" in page.source and "#1f2328" not in page.source.split("</style>")[1]


def test_tables_name_rows_and_columns(page: Page) -> None:
    assert {attributes.get("scope") for attributes in page.all("th")} == {"col", "row"}


def test_figures_of_the_summary_are_rounded(page: Page) -> None:
    for text in ("26.2%", "2.8%", "29.4", "3.520", "65.3", "95.2", "38.1% / 57.0%", "71.2% / 89.0%", "1.83 GiB"):
        assert text in page.text
    for text in ("1/29 = 3.4%", "1/101 = 1.0%", "ln 101 = 4.615", "at most 640", "312.0"):
        assert text in page.text


def test_intervals_are_shown_where_the_summary_has_them(page: Page, folder: Path, tmp_path: Path) -> None:
    assert "interval" not in page.text
    summary = json.loads((folder / "summary.json").read_text())
    summary["finetuned"]["cer_interval"], summary["scratch"]["cer_interval"] = [0.3512, 0.4188], [0.5412, 0.6]
    copy_runs(folder, tmp_path, summary)
    assert "35.1% to 41.9% / 54.1% to 60.0%" in Page(write_demo_report(tmp_path)).text


def test_both_arms_are_drawn_in_full(page: Page) -> None:
    for label in ("pretrained", "random-weights"):
        for rate in ("character-error-rate-cer", "word-error-rate-wer"):
            path = re.search(rf'<g id="{rate}-{label}">\s*<path d="([^"]*)"', page.source)
            assert path is not None
            assert len(re.findall("[ML]", path[1])) == 4
    for rates in CER.values():
        assert all(f">{rate:.1%}</td>" in page.source for rate in rates)
    assert "lower CER than random weights at 3 of 4" in page.text


@pytest.mark.parametrize(
    ("ours", "verdict", "ratio"), [(0.4, "helped", "0.80"), (0.51, "did not help", "1.02"), (0.495, "no clear", "0.99")]
)
def test_headline_tells_what_happened(folder: Path, ours: float, verdict: str, ratio: str, tmp_path: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    other = 0.5 if ours != 0.51 else 0.499
    copy_runs(folder, tmp_path, summary | {"finetuned": {"wer": 1, "cer": ours}, "scratch": {"wer": 1, "cer": other}})
    lead = Page(write_demo_report(tmp_path)).source.split('class="lead">')[1].split("</p>")[0]
    assert verdict in lead and f"a ratio of {ratio}" in lead
    assert f"{ours:.1%}" in lead and f"{other:.1%}" in lead


def copy_runs(folder: Path, to: Path, summary: dict[str, Any]) -> None:
    for name in ("pretrain", *CER):
        (to / name).symlink_to(folder / name)
    (to / "summary.json").write_text(json.dumps(summary))


def test_figures_of_nothing_learnt_are_shown_too(folder: Path, tmp_path: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary["pretrain"]["codes_per_utterance"], summary["scratch"]["cer"] = 0.0, 0.0
    copy_runs(folder, tmp_path, summary | {"test_split": "<b>"})
    text = Page(write_demo_report(tmp_path)).text
    assert "a ratio of nan" in text and "1/nan = nan%" in text and "Measured on the <b> split" in text


def test_unequal_arms_are_called_unfair(folder: Path, tmp_path: Path) -> None:
    copy_runs(folder, tmp_path, json.loads((folder / "summary.json").read_text()))
    (tmp_path / "scratch").unlink()
    write_metrics(tmp_path / "scratch", {"valid/cer": {800: 0.3}})
    assert "not a fair comparison" in Page(write_demo_report(tmp_path)).text


def test_optional_inputs_only_cost_their_section(folder: Path, tmp_path: Path, page: Page) -> None:
    copy_runs(folder, tmp_path, json.loads((folder / "summary.json").read_text()))
    left_out = {"Listen", "What the layers know", "Codebook use", "What the model gets to hear", "Transcripts"}
    assert Page(write_demo_report(tmp_path)).headings == [title for title in page.headings if title not in left_out]
    assert "not a fair comparison" not in page.text


def test_transcripts_are_escaped_and_differences_marked(page: Page) -> None:
    assert "A &lt;B&gt; &amp; C" in page.source
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in page.source
    assert "s7-u&lt;3&gt;" in page.source
    assert "<del>A</del> <del>&lt;B&gt;</del> <del>&amp;</del> <del>C</del>" in page.source
    assert page.source.count('class="words"') == 1
    assert len(re.findall(r"errors in \d+ words", page.source)) == 2 * 10


def test_utterances_can_be_heard_and_read(page: Page) -> None:
    audio = page.all("audio")
    assert len(audio) == 3 and all("controls" in item and "3.0 seconds" in (item["aria-label"] or "") for item in audio)
    sound = base64.b64decode((audio[0]["src"] or "").partition("base64,")[2])
    assert soundfile.info(io.BytesIO(sound)).duration == 3.0
    first = page.source.split("<article>")[1]
    assert "&lt;MAN&gt; from 0.40 to 1.10" in first and ">&lt;MAN&gt;</text>" in first
    assert re.search(r"pretrained</th><td>THE &lt;MAN&gt; <mark>CALL</mark>\s*</td><td>1 of 3<", first)
    assert re.search(r"pretrained \+ trigram</th><td>THE &lt;MAN&gt; CALLED\s*</td><td>0 of 3<", first)
    assert "random weights + trigram" in first and "<caption>" in first


def test_what_the_layers_know_is_told_beside_its_baselines(page: Page) -> None:
    for text in ("tells 50.7%", "38.1% by a log-mel", "29.8% by the same model", "56.0% of the phones' entropy"):
        assert text in page.text.replace("\n", " ")
    assert "pretrained, layer 2" in page.text and "29,000 frames of 12 voices" in page.text


def test_masked_share_and_dead_entries(page: Page) -> None:
    assert "Utterance s7-u<3>: 16% of 200 frames masked, in 6 spans" in page.text
    assert "Codebook 1: 250 of 320 entries used, 70 dead" in page.text


def test_report_of_a_run(tmp_path: Path) -> None:
    pretrain_run(tmp_path / "mine", np.random.default_rng(1))
    page = Page(write_run_report(tmp_path / "mine"))
    assert page.headings == ["Run mine", "What ran", "Final figures, not the best", "Curves"]
    assert len(page.all("svg")) == 5  # loss, contrastive, accuracy, perplexities, learning rate
    assert "4,000 optimiser updates" in page.text and "tiny" in page.text
    accuracy = float(re.search(r"Accuracy</th><td>([\d.]+)%</td>", page.source)[1])
    assert 25 < accuracy < 31


def test_a_configuration_of_another_kind_is_one_line(tmp_path: Path) -> None:
    pretrain_run(tmp_path, np.random.default_rng(0), steps=100)
    (tmp_path / "config.json").write_text('{"model": {"num_distractors": [100]}}')
    with pytest.raises(UsageError, match=r"config\.json: expected int, got array"):
        write_run_report(tmp_path)


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    pretrain_run(tmp_path, np.random.default_rng(0), steps=100)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match=r"model\.safetensors is damaged"):
        write_run_report(tmp_path)


def test_long_run_is_thinned_and_undefined_values_pass(tmp_path: Path) -> None:
    steps = {step: 2.0 + math.sin(step) for step in range(1, 5001)}
    diverged = {10: math.nan, 20: math.inf, 30: 1.0}
    write_metrics(
        tmp_path,
        {
            "train/my_<own>$": steps,
            "epoch": {10: 1.0, 20: 2.0},
            "valid/wer": {10: math.nan},
            "train/contrastive": diverged,
        },
    )
    page = Page(write_run_report(tmp_path))
    path = re.search(r'<g id="my-own-training">\s*<path d="([^"]*)"', page.source)
    assert path is not None and len(re.findall("[ML]", path[1])) <= MAX_POINTS
    assert "My <own>$" in page.text and "Epoch" in page.text


def test_same_input_same_page(folder: Path, page: Page) -> None:
    assert write_demo_report(folder).read_text() == page.source


@pytest.mark.parametrize("case", ["nothing", "run", "empty", "rates", "broken"])
def test_what_is_missing_is_said_in_one_line(case: str, folder: Path, tmp_path: Path) -> None:
    expected = {
        "nothing": r"no summary.json in .*: expected the results of a demo, got an empty folder; name the folder",
        "run": r"no metrics.csv in .*finetuned: expected the figures of a run, got no such folder; name a folder",
        "empty": r"metrics.csv holds no figures: expected logged steps, got none; wait",
        "rates": r"summary.json: object missing required field cer - at \$.scratch",
        "broken": r"summary.json is not JSON \(.*\); get it again",
    }
    if case != "nothing":
        copy_runs(folder, tmp_path, json.loads((folder / "summary.json").read_text()))
    if case in ("run", "empty"):
        (tmp_path / "finetuned").unlink()
    if case == "empty":
        write_metrics(tmp_path / "finetuned", {"train/loss": {}})
    if case == "rates":
        (tmp_path / "summary.json").write_text('{"finetuned": {"wer": 1, "cer": 1}, "scratch": {"wer": 1}}')
    if case == "broken":
        (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UsageError, match=expected[case]) as error:
        write_demo_report(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["epoch,loss\n1,2\n", "step,loss\n1,2e-\n", "step,loss\n1,2,3\n"])
def test_metrics_of_another_kind(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UsageError, match=r"expected a column step and numbers, got \w+Error .*; have the run write it"):
        write_run_report(tmp_path)


def test_run_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no metrics.csv in .*: expected the figures of a run, got no such folder"):
        write_run_report(tmp_path / "nowhere")
