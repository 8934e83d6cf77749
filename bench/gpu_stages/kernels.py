"""Stage 1: whether the kernels compute what they should, and compile to what they did."""

import json
from collections.abc import Iterator

import torch

from gpu_stages import casts
from gpu_stages.kernel_cases import kernel_cases
from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale
from pagewire.kernels.select import Kernels, select_ops

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}  # of ‖value - expected‖ / ‖expected‖


def measure(scale: Scale) -> Iterator[Measurement]:
    torch.manual_seed(0)
    ops = select_ops(Kernels.TRITON, scale.device).ops
    for case in kernel_cases(scale, scale.checked, ops):
        expected = case.expected()  # before the run, which may overwrite its inputs
        value = case.run()
        assert isinstance(value, torch.Tensor), "nothing was asked to be quantised"
        error = (value.cpu().double() - expected.double()).norm() / expected.double().norm()
        yield Measurement(
            name=f"{case.name}, error",
            value=float(error),
            unit="",
            limit=TOLERANCE[scale.torch_dtype] if expected.is_floating_point() else 0.0,
        )
    yield from casts.measure(scale)
    if scale.device == "cuda":
        yield from _compiled()


def _compiled() -> Iterator[Measurement]:
    """Registers, spills and shared memory of every variant against those that are kept."""
    import compiled_kernels  # sets Triton to compile, which an interpreted process cannot

    table, problems = compiled_kernels.compile_all(quick=False)
    yield Measurement(
        name="variants that spill or lack instructions",
        value=float(len(problems)),
        unit="",
        limit=0.0,
    )
    kept = json.loads(compiled_kernels.KEPT.read_text())
    changed = compiled_kernels.differences(table, kept, quick=False)
    yield Measurement(
        name="variants compiled otherwise than kept", value=float(len(changed)), unit=""
    )
