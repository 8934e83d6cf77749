"""Rotary position embedding: the frequencies of a model and the angles of a step."""

import math

import torch
from torch import Tensor

from pagewire.engine.config import LinearRope, Llama3Rope, ModelConfig


def inverse_frequencies(config: ModelConfig, factors: Tensor | None = None) -> Tensor:
    """Radians per position of each pair of a head, float32 [head_dim / 2].

    `factors`: divisors that a model file brings instead of a named rope scaling.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    match config.rope_scaling:
        case LinearRope(factor=factor):
            frequencies = frequencies / factor
        case Llama3Rope() as scaling:
            frequencies = _llama3(frequencies, scaling)
    return frequencies if factors is None else frequencies / factors


def cosine_and_sine(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [num_tokens, head_dim / 2] each; positions: [num_tokens]."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _llama3(frequencies: Tensor, scaling: Llama3Rope) -> Tensor:
    """Blend between stretched (long waves) and kept (short waves) by waves per context."""
    waves = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((waves - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor
