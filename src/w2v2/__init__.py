"""wav2vec 2.0 on PyTorch Lightning: from raw audio to a trusted transcript."""

from w2v2.model.wav2vec2 import SSLOutput, Wav2Vec2, Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForPretraining

__all__ = ["SSLOutput", "Wav2Vec2", "Wav2Vec2Config", "Wav2Vec2ForCTC", "Wav2Vec2ForPretraining"]
