"""Fixtures for the models of `tiny_models`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from native_kernels import native_library
from tiny_models import FAMILIES
from transformers import PreTrainedModel


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each family in turn."""
    return str(request.param)


@pytest.fixture
def native() -> None:
    """Skips a test where the C++ kernels were not built."""
    native_library()


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """make_model(family, **options): saves a tiny model to tmp_path and returns it."""
    return lambda name, **options: tiny_models.make_model(name, tmp_path, **options)
