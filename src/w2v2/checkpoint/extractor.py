"""What transformers' feature extractor does to audio before a model hears it, as its files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2v2.checkpoint import foreign
from w2v2.errors import UsageError, shown
from w2v2.files import write_json
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.serial import checked, read_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def write_extractor(folder: Path, *, normalize: bool, attention_mask: bool) -> None:
    """Write ``preprocessor_config.json``, of transformers' feature extractor.

    Args:
        folder: exists.
        normalize: whether it gives each recording zero mean and unit variance.
        attention_mask: whether it tells the model what is padding.
    """
    settings = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": normalize,
        "return_attention_mask": attention_mask,
    }
    write_json(folder / PREPROCESSOR, settings)


def normalizes(folder: Path, *, layer_norm: bool) -> tuple[bool, list[str]]:
    """Return whether audio is normalised, as the file says, and notes; without it, as fairseq trains with that norm.

    It is a part of the processor's where transformers 5 has written that, which counts more there, too.
    """
    for path, part in ((folder / PROCESSOR, "feature_extractor"), (folder / PREPROCESSOR, None)):
        extractor = read_json(path) if path.is_file() else None
        extractor = extractor.get(part) if extractor and part else extractor
        if extractor is None:
            continue
        settings: dict[str, Any] = checked(extractor, dict[str, Any], f"{path}: {part}" if part else str(path))
        rate = settings.get("sampling_rate", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise UsageError(f"{path} wants audio at {shown(rate)} Hz; models here hear {SAMPLE_RATE} Hz")
        return foreign.setting(settings, "do_normalize", bool, True, path), []
    return layer_norm, [f"no {PREPROCESSOR}: normalize_audio {layer_norm}, as fairseq trains encoders of this norm"]
