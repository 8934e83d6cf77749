"""Every implementation of the operations that this machine can run, one after another."""

import pytest
from implementations import IMPLEMENTATIONS, load_implementation

from pagewire.kernels.ops import Ops


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_implementation(request.param)
