"""The default dtype follows what the device can do."""

import pytest

from pagewire.engine import precision
from pagewire.engine.precision import default_dtype
from pagewire.kernels.instruction_sets import INSTRUCTION_SETS, InstructionSet

SLOW = frozenset({"avx2", "avx512f"})


@pytest.fixture
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    sets: tuple[InstructionSet, ...] = request.param
    monkeypatch.setattr(precision, "built_sets", lambda: sets)


without_kernels = pytest.mark.parametrize("built", [()], indirect=True)
with_kernels = pytest.mark.parametrize("built", [INSTRUCTION_SETS[:1]], indirect=True)


@without_kernels
@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_with_bfloat16_instructions_uses_them(flag: str) -> None:
    assert default_dtype("cpu", flags=frozenset({"sse2", flag})) == "bfloat16"


@with_kernels
@pytest.mark.usefixtures("built")
def test_our_kernels_need_no_instructions() -> None:
    assert default_dtype("cpu", flags=SLOW) == "bfloat16"
    assert default_dtype("cpu", "torch", flags=SLOW) == "float32"


@without_kernels
@pytest.mark.usefixtures("built")
def test_a_cpu_without_either_uses_float32() -> None:
    assert default_dtype("cpu", flags=SLOW) == "float32"


def test_an_accelerator_uses_bfloat16() -> None:
    assert default_dtype("cuda", flags=frozenset()) == "bfloat16"
