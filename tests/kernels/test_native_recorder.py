"""Recorded C++ calls: a replay does what the step does, on new inputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pagewire.kernels.instruction_sets import built_sets
from pagewire.kernels.native_library import NativeLibrary, load_library
from pagewire.kernels.native_linear import native_linear
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import GroupedActivation, NotRecordableError


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    built = built_sets()
    if not built:
        pytest.skip("the C++ kernels were not built")
    return load_library(built[0])


@pytest.fixture(scope="module")
def block(library: NativeLibrary) -> Callable[[Tensor, Tensor], Tensor]:
    """Some operations behind one another; overwrites the residual."""
    torch.manual_seed(0)
    ops = NativeOps(library)
    weight = torch.randn(64)
    up = native_linear(torch.randn(96, 64), None, out_dtype=torch.float32, library=library)
    down = native_linear(torch.randn(64, 48), None, out_dtype=torch.float32, library=library)

    def run(x: Tensor, residual: Tensor) -> Tensor:
        for _ in range(3):
            normed, residual = ops.add_rms_norm(x, residual, weight, 1e-5)
            assert isinstance(normed, Tensor)
            gated = ops.silu_mul(up(normed))
            assert isinstance(gated, Tensor)
            x = down(gated)
        return ops.quantize(x).groups

    return run


def test_a_replay_computes_on_what_the_inputs_hold(
    library: NativeLibrary, block: Callable[[Tensor, Tensor], Tensor]
) -> None:
    x, residual = torch.randn(2, 5, 64)
    recording = NativeOps(library).recorder.record(lambda: block(x, residual))
    for _ in range(3):
        new_x, new_residual = torch.randn(2, 5, 64)
        x.copy_(new_x)
        residual.copy_(new_residual)
        assert torch.equal(recording.replay(), block(new_x, new_residual))


def test_memory_is_used_again_within_a_recording_and_never_by_others(
    library: NativeLibrary, block: Callable[[Tensor, Tensor], Tensor]
) -> None:
    recorder = NativeOps(library).recorder
    x, residual = torch.randn(2, 5, 64)
    inputs = x.clone(), residual.clone()
    recording = recorder.record(lambda: block(x, residual))
    expected = recording.output.clone()
    others = [torch.full((5, 96), float(i)) for i in range(20)]  # would land in freed memory
    x.copy_(inputs[0])
    residual.copy_(inputs[1])
    assert torch.equal(recording.replay(), expected)
    assert all(bool((other == i).all()) for i, other in enumerate(others))
    outputs = {call.words[7] for call in recording.calls if call.words[8] == 96}  # of `up`
    assert len(outputs) <= 2  # of three


def test_recordings_share_their_memory(
    library: NativeLibrary, block: Callable[[Tensor, Tensor], Tensor]
) -> None:
    recorder = NativeOps(library).recorder
    inputs = [torch.randn(2, count, 64) for count in (64, *range(1, 64))]
    recordings = []
    for x in inputs:
        recordings.append(recorder.record(lambda x=x: block(*x)))  # type: ignore[misc]
        if len(recordings) == 1:
            of_one = recorder.num_arena_bytes
    assert recorder.num_arena_bytes <= 2 * of_one
    for x, recording in zip(inputs, recordings, strict=True):
        new = torch.randn_like(x)
        x.copy_(new)
        assert torch.equal(recording.replay(), block(*new))


@pytest.mark.parametrize(
    "step",
    [
        lambda ops, x: x + 1,
        lambda ops, x: x.exp(),
        lambda ops, x: x[torch.tensor([0])],
        lambda ops, x: torch.tensor([float(x[0, 0])]),
        lambda ops, x: ops.logprobs(x, torch.tensor([0]), torch.tensor([1]), 2).top,
    ],
)
def test_what_a_replay_would_leave_out_is_not_recorded(
    library: NativeLibrary, step: Callable[[NativeOps, Tensor], Tensor]
) -> None:
    ops = NativeOps(library)
    with pytest.raises(NotRecordableError, match="cannot be recorded"):
        ops.recorder.record(lambda: step(ops, torch.randn(4, 64)))
    assert isinstance(ops.quantize(torch.randn(1, 32)), GroupedActivation)  # as before


def test_a_plan_is_renewed_after_its_first_run(library: NativeLibrary) -> None:
    from paged_case import PagedCase, Shape

    case = PagedCase(Shape(rows=((1, 5),)), torch.float32)
    plan = NativeOps(library).recorder.plan_attention(case.batch, scale=0.1, window=None)
    with pytest.raises(RuntimeError, match="run it once"):
        plan.renew(case.batch)
