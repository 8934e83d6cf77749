"""A tiny model that says nearly what another says: what a draft model is to its target."""

from pathlib import Path

import torch
from transformers import PreTrainedModel


def save_noisy(model: PreTrainedModel, directory: Path, *, noise: float = 0.03) -> Path:
    """Save `model` with some noise on its weights to `directory`. Leaves `model` as it was."""
    generator = torch.Generator().manual_seed(1)
    state = {
        name: value + noise * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(directory, state_dict=state)
    return directory
