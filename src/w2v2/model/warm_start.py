"""The spectral warm start: before any contrast the conv stack learns to show the log-mel spectrum of its own audio.

Not in the paper. A short contrastive run has targets that tell little, since the stack which makes them is random;
what it learns in its first thousands of updates a regression of the spectrum teaches in hundreds. No labels, raw audio
stays the input, and the readout is thrown away. Figures: LOG.md, "A start that hears".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2v2.errors import Width
from w2v2.model.losses import feature_penalty
from w2v2.model.masking import Draws, StepKey, Utterances
from w2v2.model.objective import SSLOutput
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2, Wav2Vec2Config

_WINDOW, _FFT = 400, 512
"""Samples: 25 ms, and the length of the transform."""
_LOW, _HIGH = 40.0, 7_800.0
"""Hz, the edges of the lowest and the highest band."""


def mel_filters(bands: int) -> Tensor:
    """(frequencies, bands): triangles of height 1, evenly spaced in mel (2595 log10(1 + f / 700))."""
    low, high = (2595 * torch.log10(torch.tensor(1 + f / 700, dtype=torch.float64)) for f in (_LOW, _HIGH))
    edges = 700 * (10 ** (torch.linspace(float(low), float(high), bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1, dtype=torch.float64)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(audio: Tensor, config: Wav2Vec2Config, filters: Tensor) -> Tensor:
    """Log-mel power where the frames of a configuration are, each band with mean 0 and deviation 1 over the utterance.

    Args:
        audio: (B, S) float32 without padding; outside of it is silence.
        filters: of ``mel_filters``, on the audio's device.

    Returns:
        (B, T, bands) float32 of Hann windows of 25 ms, centred at ``config.frame_seconds``.
    """
    center, following = (config.frame_seconds(i) * SAMPLE_RATE for i in (0, 1))
    start = round(center - (_WINDOW - 1) / 2)
    frames = config.frames([audio.shape[1]])[0]
    with torch.autocast(audio.device.type, enabled=False):
        windows = F.pad(audio.float(), (-start, _WINDOW)).unfold(1, _WINDOW, round(following - center))[:, :frames]
        window = torch.hann_window(_WINDOW, periodic=False, dtype=torch.float32, device=audio.device)
        power = torch.fft.rfft(windows * window, _FFT).abs().square()  # (B, T, frequencies)
        spectrum = torch.log(power @ filters.float() + 1e-7)
        deviation, mean = torch.std_mean(spectrum, dim=1, correction=0, keepdim=True)
        return (spectrum - mean) / (deviation + 1e-3)


class SpectralWarmStart(Wav2Vec2):
    """The conv stack, its normalisation, and a linear readout of the spectrum; nothing else learns."""

    config: SpectralConfig

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__(config)
        self.readout = nn.Linear(config.conv_channels[-1], config.bands)
        self.register_buffer("filters", mel_filters(config.bands), persistent=False)
        self.requires_grad_(False)
        for part in (self.feature_encoder, self.feature_projection.norm, self.readout):
            part.requires_grad_(True)

    def draw(self, batch: Utterances, step_key: StepKey | None = None) -> Draws:
        """Nothing: nothing here is random."""
        return Draws()

    def baseline(self, draws: Draws) -> None:
        """None: the mean of each band, which every figure is already compared with."""

    def forward(  # type: ignore[override]
        self, audio: Tensor, draws: Draws, lengths: Sequence[int] | None = None, *, step: int = 0
    ) -> SSLOutput:
        """Squared error of the spectrum, mean over bands, summed over frames; arguments as of every objective."""
        frames, packed = self.frame_lengths(audio, lengths)
        features = self.feature_encoder(audio, lengths if packed else None)  # (B, T, C), or packed (1, sum of T, C)
        normalised, _ = self.feature_projection(features, packed)
        rows = [audio] if packed is None else [row[None, :n] for row, n in zip(audio, lengths or (), strict=True)]
        filters: Tensor = self.filters  # type: ignore[assignment]
        target = torch.cat([log_mel(row, self.config, filters).flatten(0, 1) for row in rows])  # (all frames, bands)
        error = (self.readout(normalised).flatten(0, 1).float() - target).square().mean(1).sum()
        return SSLOutput(
            losses={"spectrum": error, "feature_penalty": feature_penalty(features, frames, frames)},
            metrics={"error": error.detach().double(), "variance": target.square().mean(1).sum().double()},
            num_targets=sum(frames),
        )

    def summarize(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """``r2``: share of the bands' variance within utterances that the readout explains; 0: no more than means."""
        return {"r2": 1 - (sums["error"] / sums["variance"]).item()}


@dataclass(kw_only=True)
class SpectralConfig(Wav2Vec2Config):
    """The encoder whose conv stack is warmed up."""

    bands: Width = 40
    """Bands of the spectrum, between 40 and 7,800 Hz."""

    def build(self) -> SpectralWarmStart:
        """The objective, freshly initialised from torch's global generator."""
        return SpectralWarmStart(self)
