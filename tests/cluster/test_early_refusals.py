"""What no worker could run is refused at the command line, by the rules of the workers."""

import subprocess
import sys

import pytest

from pagewire.cluster.config import ServeConfig
from pagewire.cluster.early_refusals import require_runnable
from pagewire.cluster.errors import StartError
from pagewire.engine import emulation
from pagewire.kernels import triton_device
from pagewire.kernels.instruction_sets import INSTRUCTION_SETS


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with C++ kernels, which compiles those in Triton."""
    monkeypatch.setattr(emulation, "built_sets", lambda: INSTRUCTION_SETS[:1])
    monkeypatch.setattr(triton_device, "is_interpreted", lambda: False)


def config(**values: str) -> ServeConfig:
    return ServeConfig.model_validate(values)


@pytest.mark.parametrize("kernels", ["auto", "native"])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("quantization", "fp8"),
        ("quantization", "w4a16"),
        ("draft_quantization", "w4a16"),
        ("kv_cache_dtype", "fp8"),
        ("decode_kv_cache_dtype", "fp8"),
    ],
)
def test_what_a_cpu_only_emulates_must_be_asked_for(name: str, form: str, kernels: str) -> None:
    with pytest.raises(StartError, match=f"^{name} {form} .* choose int8, or kernels torch"):
        require_runnable(config(**{name: form, "kernels": kernels}), "cpu")
    require_runnable(config(**{name: form, "kernels": "torch"}), "cpu")
    require_runnable(config(**{name: form}), "cuda")


def test_without_a_compiler_torch_is_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "built_sets", lambda: ())
    require_runnable(config(quantization="w4a16"), "cpu")


def test_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match=r"kernels is triton.*choose kernels auto"):
        require_runnable(config(kernels="triton"), "cpu")
    require_runnable(config(kernels="triton"), "cuda")
    monkeypatch.setattr(triton_device, "is_interpreted", lambda: True)
    require_runnable(config(kernels="triton"), "cpu")


def test_nccl_needs_gpus() -> None:
    with pytest.raises(StartError, match=r"transport nccl .* use shm, ucx or tcp"):
        require_runnable(config(transport="nccl", insecure_kv="true"), "cpu")
    require_runnable(config(transport="nccl", insecure_kv="true"), "cuda")


@pytest.mark.parametrize("values", [{}, {"quantization": "int8"}, {"quantization": "int4"}])
def test_what_runs_is_not_refused(values: dict[str, str]) -> None:
    require_runnable(config(**values), "cpu")


def test_the_rules_load_no_torch() -> None:
    program = "import sys, pagewire.cluster.early_refusals; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
