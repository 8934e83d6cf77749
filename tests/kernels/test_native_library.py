"""Which library a CPU gets, and what is said where there is none."""

import _ctypes
import platform
from pathlib import Path

import pytest
from native_kernels import native_library

from pagewire.kernels.errors import KernelsUnavailableError
from pagewire.kernels.instruction_sets import INSTRUCTION_SETS, runnable_sets
from pagewire.kernels.native_library import (
    REBUILD,
    NativeLibraryError,
    find_library,
    load_library,
)
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.select import Kernels, select_ops
from pagewire.kernels.torch_ops import TorchOps

AVX512, AVX2, NEON = INSTRUCTION_SETS


def test_the_fastest_that_a_cpu_can_run_comes_first() -> None:
    assert runnable_sets("x86_64", AVX512.flags | AVX2.flags) == (AVX512, AVX2)
    assert runnable_sets("x86_64", AVX2.flags | {"avx512f"}) == (AVX2,)
    assert runnable_sets("aarch64", NEON.flags) == (NEON,)
    assert runnable_sets("aarch64", AVX2.flags) == ()
    assert runnable_sets("x86_64", frozenset()) == ()


def test_a_library_that_was_not_built_comes_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(NativeLibraryError, match=r"_avx2\.so was not built") as caught:
        load_library(AVX2, tmp_path)
    assert caught.value.remedy == REBUILD


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_avx2.so").write_bytes(b"not a library")
    with pytest.raises(NativeLibraryError, match="cannot be used"):
        load_library(AVX2, tmp_path)


def test_a_library_without_our_functions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_avx2.so").write_bytes(Path(_ctypes.__file__).read_bytes())
    with pytest.raises(NativeLibraryError, match="cannot be used"):
        load_library(AVX2, tmp_path)


def test_a_machine_of_another_kind_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(NativeLibraryError, match="riscv64"):
        find_library()


def test_plain_torch_stands_in_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    selected = select_ops(Kernels.AUTO, "cpu")
    assert isinstance(selected.ops, TorchOps)
    assert selected.explanation.startswith("plain torch: this CPU (riscv64) has none of")
    assert selected.remedy


def test_native_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(NativeLibraryError):
        select_ops(Kernels.NATIVE, "cpu")


def test_a_gpu_does_not_run_them() -> None:
    with pytest.raises(NativeLibraryError, match="not on cuda"):
        select_ops(Kernels.NATIVE, "cuda")


def test_torch_can_be_forced() -> None:
    assert select_ops(Kernels.TORCH, "cpu").explanation == "plain torch: as configured"


def test_deterministic_needs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelsUnavailableError, match="plain torch is not deterministic"):
        select_ops(Kernels.TORCH, "cpu", deterministic=True)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(NativeLibraryError, match="riscv64"):
        select_ops(Kernels.AUTO, "cpu", deterministic=True)


def test_the_library_of_this_machine_is_found() -> None:
    library = native_library()
    selected = select_ops(Kernels.AUTO, "cpu")
    assert isinstance(selected.ops, NativeOps)
    assert selected.explanation == f"C++ for {library.instruction_set.title}"
