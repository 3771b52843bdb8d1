"""The page of an exported model, made from its run folder. Needs huggingface_hub (extra ``hf``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import w2v2
from w2v2.checkpoint.native import is_foreign
from w2v2.export import CHECK
from w2v2.inference.recognizer import Recognizer
from w2v2.model.wav2vec2 import Wav2Vec2Config
from w2v2.text.vocabulary import SPACE, PhonemeVocabulary, PieceVocabulary, Vocabulary
from w2v2.training.config import run_config

CARD = "README.md"


def write_card(source: Path, folder: Path, *, name: str, license_id: str | None = None) -> None:
    """Write ``README.md``: front matter for the hub, how to use the model, its error rates, its limits.

    Args:
        source: run folder, or folder of weights; of those only the shape is known.
        folder: an export, with its ``export.json``.
        name: heading.
        license_id: of the hub's; None: the card says that none was given.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = None if is_foreign(source) else run_config(source)
    sources = () if config is None or isinstance(config, Wav2Vec2Config) else config.data.sources
    loaded = w2v2.load(source)
    vocabulary = loaded.vocabulary if isinstance(loaded, Recognizer) else None
    shape = (loaded.model if isinstance(loaded, Recognizer) else loaded).config
    check = json.loads((folder / CHECK).read_text())
    data = ModelCardData(
        library_name="w2v2",
        license=license_id,
        pipeline_tag="feature-extraction" if vocabulary is None else "automatic-speech-recognition",
        tags=["wav2vec2", "speech", check["format"]],
        datasets=[_last_name(path) for path in sources] or None,
        metrics=None if vocabulary is None else ["wer", "cer"],
    )
    kind = (
        "wav2vec 2.0 encoder, pretrained without labels: it gives vectors, not text, until it is fine-tuned"
        if vocabulary is None
        else f"wav2vec 2.0 speech recognizer (CTC) that writes nothing but these labels: `{' '.join(vocabulary.ids)}`"
    )
    text = f"""---
{data.to_yaml()}
---

# {name}

A {kind}. {shape.n_layer} transformer blocks of width {shape.n_embd}, trained with `w2v2`{_training(source, sources)}.

## How to use
```python
{_usage(vocabulary, check["format"])}```

## Error rates
{_evaluations(source) or "None were measured."}

The export was compared with the model in PyTorch: it differs by {check["largest_difference"]:.1e} at most (`{CHECK}`).

## Limits
* Audio must have one channel at 16 kHz; other rates give nonsense without an error.
* Rows of a batch must have one length; run utterances of unequal lengths one by one, unpadded.
* Nothing was measured but the figures here: other languages, rooms and microphones may do far worse.
"""
    if license_id is None:
        text += "* No licence was given: ask the owner before any use.\n"
    ModelCard(text).save(folder / CARD)


def _last_name(path: str) -> str:
    """Of a path, which may say much about a machine, only this is told."""
    return path.rstrip("/").rpartition("/")[2] or path


def _training(source: Path, sources: tuple[str, ...]) -> str:
    """What a run was trained on; empty for a folder of weights."""
    path = source / "environment.json"
    if not path.exists():
        return ""
    train = json.loads(path.read_text())["data"]["train"]
    named = ", ".join(f"`{_last_name(name)}`" for name in sources)
    return f" on {train['hours']:.2f} hours of {named}, {train['speakers']:,} speakers"


def _evaluations(source: Path) -> str:
    """A table of what ``w2v2 evaluate`` left in the run; docs/evaluation.md has the keys."""
    rows = []
    for path in sorted(source.glob("evaluation/*/evaluation.json")):
        of: dict[str, Any] = json.loads(path.read_text())
        rates = [
            _rate(of[rate], of[units].get("interval")) for rate, units in (("wer", "words"), ("cer", "characters"))
        ]
        decoder = "beam search" if of["decoder"] else "greedy"
        cells = [f"`{_last_name(of['data'])}`", of["split"], decoder, f"{of['utterances']:,}", *rates]
        rows.append(f"| {' | '.join(cells)} |")
    head = [
        "| data | split | decoder | utterances | WER % (interval) | CER % (interval) |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) if rows else ""


def _rate(rate: float, interval: list[float] | None) -> str:
    return f"{100 * rate:.2f}" + (f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})" if interval else "")


def _usage(vocabulary: Vocabulary | None, format_name: str) -> str:
    """Code that runs in the folder, given ``speech.wav``."""
    if vocabulary is None:
        return f"{_RUN[format_name]}print(outputs.shape)  # (frames, width)\n"
    if isinstance(vocabulary, PhonemeVocabulary):
        text = '" ".join(labels)'
    elif isinstance(vocabulary, PieceVocabulary):
        text = f'" ".join("".join(labels).replace("{SPACE}", " ").split())'
    elif vocabulary.boundary is None:
        text = '"".join(labels)'
    else:
        text = '" ".join("".join(labels).replace(vocabulary["labels"][vocabulary["boundary"]], " ").split())'
    return f"import json\n\n{_RUN[format_name]}{_GREEDY}print({text})\n"


_READ = """\
audio, rate = soundfile.read("speech.wav", dtype="float32")
assert rate == 16_000 and audio.ndim == 1
"""
_RUN = {
    "onnx": f"import onnxruntime\nimport soundfile\n\n{_READ}"
    'session = onnxruntime.InferenceSession("model.onnx")\noutputs = session.run(None, {"audio": audio[None]})[0][0]\n',
    "torch.export": f"import soundfile\nimport torch\n\n{_READ}"
    'model = torch.export.load("model.pt2").module()\noutputs = model(torch.from_numpy(audio)[None])[0].detach()\n',
}
_GREEDY = """\
best = outputs.argmax(-1).tolist()  # of log-probabilities (frames, labels)
vocabulary = json.load(open("vocab.json"))
silent = {vocabulary["blank"], *vocabulary["silent"]}
labels = [vocabulary["labels"][i] for i, before in zip(best, [-1, *best]) if i != before and i not in silent]
"""
