"""The default dtype follows what the device can do."""

import pytest

from pagewire.engine.precision import default_dtype


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_with_bfloat16_instructions_uses_them(flag: str) -> None:
    assert default_dtype("cpu", frozenset({"sse2", flag})) == "bfloat16"


def test_a_cpu_without_them_uses_float32() -> None:
    assert default_dtype("cpu", frozenset({"avx2", "avx512f"})) == "float32"


def test_an_accelerator_uses_bfloat16() -> None:
    assert default_dtype("cuda", frozenset()) == "bfloat16"
