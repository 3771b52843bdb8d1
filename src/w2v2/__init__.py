"""wav2vec 2.0 on PyTorch Lightning: from raw audio to a trusted transcript."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2v2.model.wav2vec2 import SSLOutput, Wav2Vec2, Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForPretraining

__all__ = ["SSLOutput", "Wav2Vec2", "Wav2Vec2Config", "Wav2Vec2ForCTC", "Wav2Vec2ForPretraining"]


def __getattr__(name: str) -> Any:
    # Late, so that `w2v2 --help` and the processes that only synthesise or decode audio do not wait for torch.
    if name in __all__:
        from w2v2.model import wav2vec2

        return getattr(wav2vec2, name)
    raise AttributeError(f"module 'w2v2' has no attribute {name!r}")
