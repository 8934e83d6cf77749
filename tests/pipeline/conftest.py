"""Tiny models on disk, once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import SavedModel, make_model


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SavedModel]:
    """saved_model(family): made at the first call."""
    saved: dict[str, SavedModel] = {}

    def get(family: str) -> SavedModel:
        if family not in saved:
            path = tmp_path_factory.mktemp("model")
            saved[family] = SavedModel(path=path, reference=make_model(family, path))
        return saved[family]

    return get


@pytest.fixture(scope="session")
def llama(saved_model: Callable[[str], SavedModel]) -> Path:
    return saved_model("llama").path
