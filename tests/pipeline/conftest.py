"""Tiny models on disk, once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    saved: dict[str, Path] = {}

    def path(family: str) -> Path:
        if family not in saved:
            saved[family] = save_tiny_model(family, tmp_path_factory.mktemp(family))
        return saved[family]

    return path
