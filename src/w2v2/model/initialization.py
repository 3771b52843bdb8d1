"""What weights are before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from w2v2.model.feature_encoder import FeatureEncoder
from w2v2.model.quantizer import GumbelVectorQuantizer
from w2v2.model.transformer import TransformerBlock


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Initialise whatever parts of a model are given.

    | part | init | source |
    |---|---|---|
    | convolutions | Kaiming normal, fan in; optionally smoothed | fairseq |
    | linear layers of the transformer | N(0, 0.02), bias 0 | fairseq `init_bert_params` |
    | positional convolution | N(0, sqrt(4 / (kernel D))), bias 0, at its construction | fairseq |
    | mask vector | U(0, 1) | fairseq |
    | quantizer | projector N(0, 1), bias 0; codebook U(0, 1) | fairseq |
    | feature projection, out_linear, project_q, norms | PyTorch's default | fairseq |
    """
    for module in model.modules():
        encoder: Any = getattr(module, "feature_encoder", None)
        if isinstance(encoder, FeatureEncoder):  # a ``Wav2Vec2``
            whole: Any = module
            smoothing = whole.config.conv_init_smoothing
            for i, weight in enumerate(encoder.conv_weights()):
                nn.init.kaiming_normal_(weight)
                if i > 0 and smoothing > 0:
                    # Kernels of nearly equal taps: low-pass on the way down, so that untrained features already move
                    # slowly. The response to a constant stays what it was.
                    weight.copy_((1 - smoothing) * weight + smoothing * weight.mean(-1, keepdim=True))
            nn.init.uniform_(whole.mask_vector)
        elif isinstance(module, TransformerBlock):
            for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        elif isinstance(module, GumbelVectorQuantizer):
            nn.init.normal_(module.projector.weight)
            nn.init.zeros_(module.projector.bias)
            nn.init.uniform_(module.codebook)
