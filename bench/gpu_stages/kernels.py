"""Stage 1: whether the kernels compute what they should, and compile to what they did."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context

import torch

from gpu_stages import casts
from gpu_stages.cases.catalog import CHECKED
from gpu_stages.cases.kernel_case import NamedCase, Setting, error, tolerance
from gpu_stages.items import InapplicableError, Item
from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale
from pagewire.kernels.select import Kernels, select_ops
from pagewire.kernels.triton_ops import find_gpu

COMPILED_LIMIT_S = 100.0


def items(scale: Scale) -> Iterator[Item]:
    ops = select_ops(Kernels.TRITON, scale.device).ops
    setting = Setting(scale=scale, sizes=scale.checked, ops=ops)
    for case in CHECKED:
        yield Item(name=case.name, measure=partial(_check, case, setting))
    yield Item(name="casts", measure=partial(casts.measure, scale))
    yield Item(name="machine code", measure=partial(_compiled, scale), limit_s=COMPILED_LIMIT_S)


def require_fp8(scale: Scale) -> None:
    """Raise InapplicableError where numbers in fp8 are not those of a GPU."""
    if scale.device == "cpu":
        raise InapplicableError("Triton's interpreter narrows to fp8 otherwise than a GPU")
    if not find_gpu(scale.device).has_fp8:
        raise InapplicableError("a GPU before Ada has no fp8")


def _check(case: NamedCase, setting: Setting) -> Iterator[Measurement]:
    if case.needs_fp8:
        require_fp8(setting.scale)
    torch.manual_seed(0)
    made = case.make(setting)
    expected = made.expected()  # before the run, which may overwrite its inputs
    with _poisoned_memory():
        value = made.result()
    yield Measurement(
        name=f"{case.name}, {'error' if expected.is_floating_point() else 'wrong numbers'}",
        value=error(value, expected),
        unit="",
        limit=tolerance(value, expected),
    )


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _compiled(scale: Scale) -> Iterator[Measurement]:
    """Registers, spills and shared memory of every variant against those that are kept."""
    if scale.device == "cpu":
        raise InapplicableError("this process interprets kernels; `make kernels` compiles them")
    import compiled_kernels  # sets Triton to compile, which an interpreted process cannot

    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    if capability != compiled_kernels.HOPPER:
        raise InapplicableError(
            f"results are kept for sm_{compiled_kernels.HOPPER}; this GPU is sm_{capability}"
        )
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        table, problems = compiled_kernels.compile_all(quick=False, map_variants=processes.map)
    yield Measurement(
        name="variants that spill or lack instructions",
        value=float(len(problems)),
        unit="",
        limit=0.0,
    )
    kept = json.loads(compiled_kernels.KEPT.read_text())
    if not compiled_kernels.is_comparable(kept):
        raise InapplicableError(f"results are kept of Triton {kept['triton']}")
    changed = compiled_kernels.differences(table, kept, quick=False)
    print("\n".join((*problems, *changed)))
    yield Measurement(
        name="variants compiled otherwise than kept", value=float(len(changed)), unit="", limit=0.0
    )
