"""What holds for tests that run Triton kernels in its interpreter."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# Triton is published for Linux only; elsewhere there is nothing to test.
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="package", autouse=True)
def interpreter() -> Iterator[None]:
    from interpreter_floats import exact_narrow_floats
    from interpreter_memory import checked_memory
    from interpreter_speed import cheap_calls

    with exact_narrow_floats(), checked_memory(), cheap_calls():
        yield


@pytest.fixture(autouse=True)
def poisoned_results() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
