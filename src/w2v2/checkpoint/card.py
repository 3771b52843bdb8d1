"""The page of an exported model, made from what its run folder says, and the model's way to the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import w2v2
from w2v2.checkpoint.native import is_foreign
from w2v2.errors import JobError, UsageError
from w2v2.export import CHECK
from w2v2.inference.recognizer import Recognizer
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from w2v2.text.vocabulary import SPACE, PhonemeVocabulary, PieceVocabulary, Vocabulary
from w2v2.training.config import run_config

CARD = "README.md"


def write_card(source: Path, folder: Path, *, name: str, license_id: str | None = None) -> None:
    """Write ``README.md``: front matter for the hub, how to use, what it heard and how well it did, limits, versions.

    Args:
        source: run folder, or folder of weights; of those only the shape is known.
        folder: an export, with its ``export.json``.
        name: heading.
        license_id: of the hub's; None: the card says that none was given.
    """
    config = None if is_foreign(source) else run_config(source)
    loaded = w2v2.load(source)
    check = json.loads((folder / CHECK).read_text())
    sources = () if config is None or isinstance(config, Wav2Vec2Config) else config.data.sources
    validation = last_validation(source / "metrics.csv")
    sections = [
        _front_matter(isinstance(loaded, Recognizer), check["format"], sources, license_id),
        f"# {name}\n\n{_summary(loaded, config)}",
        f"## How to use\n\n{_usage(loaded, check['format'])}",
        _data(_json(source / "environment.json"), sources, validation),
        _figures("Validation", "The last one of the run, in its own units.", validation),
        *_evaluations(source),
        _export_section(check),
        f"## Limits\n\n{_limits(loaded, license_id)}",
        f"## Versions\n\n{_versions(_json(source / 'environment.json'), check)}",
    ]
    (folder / CARD).write_text("\n\n".join(section for section in sections if section) + "\n")


def last_validation(path: Path) -> dict[str, float]:
    """Figures of the last row of a ``metrics.csv`` that has any, ``step`` and hours heard by then; {} without."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, float] = {}
    heard = None
    for row in rows:
        heard = row.get("train/hours_heard") or heard
        values = {name[6:]: float(value) for name, value in row.items() if name.startswith("valid/") and value}
        if values:
            found = {"step": float(row["step"]), **({"hours_heard": float(heard)} if heard else {}), **values}
    return found


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def _front_matter(ctc: bool, format_name: str, sources: Sequence[str], license_id: str | None) -> str:
    """YAML, of which JSON is a part. Of a path, which may say much about a machine, only the last name."""
    fields = {
        "library_name": "w2v2",
        "pipeline_tag": "automatic-speech-recognition" if ctc else "feature-extraction",
        "license": license_id,
        "tags": ["wav2vec2", "speech", "audio", format_name, *(["ctc"] if ctc else [])],
        "datasets": [_last_name(source) for source in sources],
        "metrics": ["wer", "cer"] if ctc else [],
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"])


def _last_name(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2] or source


def _summary(loaded: Recognizer | Wav2Vec2, config: Any) -> str:
    model = loaded.model if isinstance(loaded, Recognizer) else loaded
    shape = model.config
    encoder = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(_HEADS))
    what = (
        f"A wav2vec 2.0 speech recognizer (CTC, {len(loaded.vocabulary.labels)} labels)"
        if isinstance(loaded, Recognizer)
        else "A wav2vec 2.0 encoder, pretrained without labels"
    )
    recipe = getattr(config, "recipe", "")
    return (
        f"{what}, trained with `w2v2`{f', recipe `{_last_name(recipe)}`' if recipe else ''}. "
        f"{shape.n_layer} transformer blocks of width {shape.n_embd}, {encoder:,} parameters without heads; one vector "
        "every 20 ms of 16 kHz audio."
    )


_HEADS = ("quantizer.", "project_q.", "out_linear.", "lm_head.")


def _data(environment: dict[str, Any], sources: Sequence[str], validation: dict[str, float]) -> str:
    """Splits, and what was heard of them."""
    if not environment:
        return ""
    rows = [
        f"| {name} | {of['hours']:.2f} | {of['utterances']:,} | {of['speakers']:,} | {of['transcribed']:,} |"
        for name, of in environment["data"].items()
    ]
    named = ", ".join(_last_name(source) for source in sources)
    heard = f" Heard in training: {validation['hours_heard']:.2f} h." if "hours_heard" in validation else ""
    table = ["| split | hours | utterances | speakers | transcribed |", "|---|---|---|---|---|", *rows]
    return f"## Data\n\n{named}.{heard}\n\n" + "\n".join(table)


def _figures(title: str, text: str, figures: Mapping[str, float | str]) -> str:
    rows = [f"| {name} | {value if isinstance(value, str) else f'{value:.6g}'} |" for name, value in figures.items()]
    table = "\n".join(["| figure | value |", "|---|---|", *rows])
    return f"## {title}\n\n{text}\n\n{table}" if rows else ""


def _evaluations(source: Path) -> list[str]:
    """What ``w2v2 evaluate`` left in the run, a section for each split; docs/evaluation.md has the keys."""
    sections = []
    for path in sorted(source.glob("evaluation/*/evaluation.json")):
        found = _json(path)
        figures: dict[str, float | str] = {}
        for name, of in (("wer", "words"), ("cer", "characters")):
            figures[name] = found[name]
            interval = found[of].get("interval")
            if interval:
                figures[f"{name}, {found['intervals']['level']:.0%} interval"] = " to ".join(
                    f"{x:.6g}" for x in interval
                )
        figures |= {name: found[name] for name in ("sentence_error_rate", "utterances", "seconds")}
        decoder = "with a language model or lexicon" if found["decoder"] else "greedily"
        text = f"Shares of `{_last_name(found['data'])}`, decoded {decoder}."
        sections.append(_figures(f"Evaluation: {found['split']}", text, figures))
    return sections


def _export_section(check: dict[str, Any]) -> str:
    cases = check["checks"]
    lines = [
        f"Compared with the model in PyTorch on {len(cases)} batches of several lengths: largest difference "
        f"{check['largest_difference']:.1e}, at most {check['limit']:g} allowed (`{CHECK}`)."
    ]
    speed = check.get("speed")
    if speed:
        lines += ["", "| file | MB | times as fast as PyTorch |", "|---|---|---|"]
        lines += [
            f"| {name} | {size / 1e6:.1f} | {speed['times_faster'][name]:.2f} |"
            for name, size in check["bytes"].items()
            if name in speed["times_faster"]
        ]
        lines += ["", f"{speed['seconds_of_audio']:g} s of audio on a CPU, {speed['threads']} threads."]
    rates = check.get("error_rates", {})
    measured = {name: value for name, value in rates.items() if isinstance(value, dict)}
    if measured:
        lines += ["", f"| {rates['split']}, {rates['utterances']} utterances | WER | CER |", "|---|---|---|"]
        lines += [f"| {name} | {100 * r['wer']:.2f} % | {100 * r['cer']:.2f} % |" for name, r in measured.items()]
    return "## Export\n\n" + "\n".join(lines)


def _limits(loaded: Recognizer | Wav2Vec2, license_id: str | None) -> str:
    lines = ["Audio must have one channel at 16 kHz; other rates give nonsense without an error."]
    if isinstance(loaded, Recognizer):
        vocabulary = loaded.vocabulary
        lines.append(f"It writes nothing but these labels: `{' '.join(vocabulary.ids)}`.")
    else:
        lines.append("It gives vectors, not text, until it is fine-tuned. Quantizer and projections are left out.")
    lines.append("Rows of a batch must have one length; run utterances of unequal lengths one by one, unpadded.")
    lines.append("Nothing was measured but the figures here: other languages, rooms and microphones may do far worse.")
    if license_id is None:
        lines.append("No licence was given: ask the owner before any use.")
    return "\n".join(f"* {line}" for line in lines)


def _versions(environment: dict[str, Any], check: dict[str, Any]) -> str:
    packages = {**environment.get("packages", {})}
    trained = ", ".join(f"{name} {version}" for name, version in packages.items())
    exported = ", ".join(f"{name} {version}" for name, version in check["packages"].items())
    lines = [f"Trained with Python {environment['python']}, {trained}."] if environment else []
    lines.append(f"Exported with Python {platform.python_version()}, {exported}.")
    lines += [f"Made of `{name}`, SHA-256 `{value}`." for name, value in check["source"].items() if _is_weights(name)]
    return "\n".join(lines)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt"))


def _usage(loaded: Recognizer | Wav2Vec2, format_name: str) -> str:
    """Code that runs in the folder, given ``speech.wav``."""
    if isinstance(loaded, Recognizer):
        graph = f"import json\n\n{_GRAPH[format_name]}log_probs = {_RUN[format_name]}  # (frames, labels)\n"
        code = f"{graph}{_GREEDY}print({_text(loaded.vocabulary)})\n"
    else:
        code = f"{_GRAPH[format_name]}vectors = {_RUN[format_name]}  # (frames, width)\nprint(vectors.shape)\n"
    return f"```python\n{code}```"


def _text(vocabulary: Vocabulary) -> str:
    """What makes a text of the labels ``said``."""
    if isinstance(vocabulary, PhonemeVocabulary):
        return '" ".join(said)'
    if isinstance(vocabulary, PieceVocabulary):
        return f'" ".join("".join(said).replace("{SPACE}", " ").split())'
    return '"".join(said)' if vocabulary.boundary is None else _WORDS


_WORDS = '" ".join("".join(said).replace(vocabulary["labels"][vocabulary["boundary"]], " ").split())'


_READ = """\
audio, rate = soundfile.read("speech.wav", dtype="float32")
assert rate == 16_000 and audio.ndim == 1
"""


_GRAPH = {
    "onnx": f'import onnxruntime\nimport soundfile\n\n{_READ}session = onnxruntime.InferenceSession("model.onnx")\n',
    "torch.export": f'import soundfile\nimport torch\n\n{_READ}model = torch.export.load("model.pt2").module()\n',
}


_RUN = {
    "onnx": 'session.run(None, {"audio": audio[None]})[0][0]',
    "torch.export": "model(torch.from_numpy(audio)[None])[0].detach().numpy()",
}


_GREEDY = """\
best = log_probs.argmax(-1)
vocabulary = json.load(open("vocab.json"))
nothing = {vocabulary["blank"], *vocabulary["silent"]}
kept = [i for i, before in zip(best, [-1, *best]) if i != before and i not in nothing]
said = [vocabulary["labels"][i] for i in kept]
"""


def expect_hub(repository: str) -> None:
    """Refuse, before any work, what cannot be pushed.

    Raises:
        UsageError: no client, no token, or an impossible name.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import validate_repo_id
    except ModuleNotFoundError as error:
        raise UsageError(f"--push-to-hub needs {error.name}: pip install 'w2v2[hf]'") from error
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise UsageError(f"--push-to-hub must be OWNER/NAME, got {repository!r}") from error
    if not huggingface_hub.get_token():
        raise UsageError("--push-to-hub needs a token of the hub: set HF_TOKEN, or run 'hf auth login'")


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the hub, to a private repository if there is none yet; its address.

    Raises:
        JobError: the hub says no, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of whichever client it is built on

    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of w2v2")
    except (OSError, HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"{folder} is written, but not pushed to {repository}: {reason}") from error
    return str(address)
