"""What a pretraining step takes in floating-point operations, what devices can do of them, and the share reached."""

from __future__ import annotations

from w2v2.model.feature_encoder import output_lengths
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2Config

# Dense bf16 (V100: fp16) FLOP/s of the tensor cores, from the vendor's data sheets; by a part of the device's name.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12, "L4": 121e12, "RTX 4090": 165e12}


def forward_flops(config: ContrastiveConfig, seconds: float) -> dict[str, float]:
    """FLOPs (two per multiply and add) of one pretraining forward pass, per second of audio, in crops of ``seconds``.

    ``convolutions``, ``linears`` of the blocks, ``attention`` (both products), ``positional``, and ``rest``: the
    feature projection and, for the frames that are masked, quantizer, projections and cosines. Norms and activations
    are not counted, and every block is, with all its frames, LayerDrop or not.
    """
    samples = round(seconds * SAMPLE_RATE)
    convolutions, fan_in = 0.0, 1
    for i, (width, kernel) in enumerate(zip(config.conv_channels, config.conv_kernel_sizes, strict=True)):
        shape = (config.conv_kernel_sizes, config.conv_strides, config.conv_paddings)
        length = output_lengths([samples], *(part[: i + 1] for part in shape))[0]
        convolutions += 2 * fan_in * width * kernel * length
        fan_in = width
    frames, d = config.frames([samples])[0], config.n_embd
    masked = frames * expected_coverage(config.mask_prob, config.mask_length)
    heads = _objective_weights(config, masked)
    total = {
        "convolutions": convolutions,
        "linears": config.n_layer * 2 * (4 * d * d + 2 * d * config.ffn_dim) * frames,
        "attention": config.n_layer * 4 * frames * frames * d,
        "positional": 2 * config.pos_conv_kernel * (d // config.pos_conv_groups) * d * frames,
        "rest": 2 * (fan_in * d + _neighbourhood_weights(config)) * frames + 2 * heads * masked,
    }
    return {name: value / seconds for name, value in total.items()}


def _objective_weights(config: ContrastiveConfig, masked: float) -> float:
    """Multiplications for each masked frame: quantizer, projections, cosines."""
    codes = config.n_groups * config.codebook_dim
    space = config.similarity_dim or codes
    target = config.n_embd if config.target_features == "projected" else config.conv_channels[-1]
    projection = codes * space if config.similarity_dim is not None else 0
    return target * config.n_groups * config.n_entries + config.n_embd * space + masked * space + projection


def _neighbourhood_weights(config: ContrastiveConfig) -> int:
    """Multiplications for each frame: targets and head."""
    width = config.n_embd + config.neighbourhood * config.conv_channels[-1]
    return config.neighbourhood_dim * width if config.neighbourhood else 0


def training_flops(config: Wav2Vec2Config, seconds: float) -> float | None:
    """FLOPs of pretraining per second of audio, in crops of ``seconds``: three times those of the forward pass.

    None for a subclass, which may build a quantizer or an objective that is not counted here.
    """
    return 3 * sum(forward_flops(config, seconds).values()) if type(config) is ContrastiveConfig else None


def peak_flops(device: str) -> float | None:
    """Peak dense FLOP/s in bf16 of a GPU (``torch.cuda.get_device_name``), fp16 on a V100; None: not known."""
    words = device.replace("-", " ").split()
    return next((peak for name, peak in _PEAKS.items() if name in device and (" " in name or name in words)), None)


def expected_coverage(prob: float, span: int) -> float:
    """Share of frames masked in a long utterance: a start at each frame with ``prob / span``, spans may overlap."""
    return 1.0 - max(1.0 - prob / span, 0.0) ** span


def utilisation(flops: float, audio_per_second: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation: the share of the devices' peak that the model's own arithmetic takes.

    Activations that are computed again (``activation_checkpointing``) are not counted a second time.

    Args:
        flops: of training, per second of audio (:func:`training_flops`).
        audio_per_second: seconds of audio that all devices together take in a second.
        devices: how many there are.
        peak: FLOP/s of one.
    """
    return flops * audio_per_second / (devices * peak)
