"""A step on a GPU never makes the host wait: it reads nothing but the tokens, once, at the end."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from unread_device import DEVICE, UnreadDevice, unread_device

from gpu_stages.eager_recording import capture
from gpu_stages.random_model import random_model, runner_of
from gpu_stages.scale import TINY
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.host_copies import HostCopy, to_device
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.kernels.experts import route
from pagewire.kernels.gpu.grouped_experts import group_experts
from pagewire.kernels.triton_ops import TritonOps, find_gpu


def runner(*, recorded: bool) -> ModelRunner:
    scale = replace(TINY, device=DEVICE)
    model = random_model(scale)
    model.ops = TritonOps(find_gpu("cpu"), capture if recorded else None)
    return runner_of(model, scale, num_pages=8)


def rows(count: int, *, follows: bool = False, **fields: Any) -> tuple[BatchRow, ...]:
    sampling = SamplingParams(**fields)
    return tuple(
        BatchRow(
            request_id=str(index),
            token_ids=[index],
            start=20,
            page_table=[index, index + 3],
            sampling=replace(sampling, seed=index),
            output_position=4,
            history=TokenHistory.for_params(sampling, [1, 2, 3], [3]),
            follows=index if follows else None,
        )
        for index in range(count)
    )


@pytest.mark.parametrize(
    ("fields", "num_reads"),
    [
        ({}, 1),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, 1),
        ({"repetition_penalty": 1.2, "frequency_penalty": 0.3, "temperature": 1.0}, 1),
        ({"logit_bias": ((3, 1.0),), "min_tokens": 9, "stop_token_ids": frozenset({7})}, 1),
        ({"num_logprobs": 3}, 4),  # and the three columns of log probabilities
    ],
    ids=str,
)
@pytest.mark.parametrize("recorded", [False, True])
def test_decode_steps_read_what_was_sampled_and_nothing_else(
    recorded: bool, fields: dict[str, Any], num_reads: int
) -> None:
    count = 1 if recorded else 3  # of this double all recordings have the same address
    model = runner(recorded=recorded)
    with unread_device() as device:
        if recorded:
            model.warm_up(1)
        first = model.launch(Batch(rows=rows(count, **fields)))
        for _ in range(2):  # with new parameters, and with those of the step before
            before = device.num_reads
            following = rows(count, follows=True, **{**fields, "max_tokens": 90})
            model.launch(Batch(rows=following), previous=first)
            assert device.num_reads - before == num_reads


def test_a_prompt_is_run_without_waiting() -> None:
    model = runner(recorded=False)
    (row,) = rows(1)
    row = replace(row, token_ids=list(range(20)), start=0, siblings=(SamplingParams(seed=1),))
    with unread_device() as device:
        model.launch(Batch(rows=(row, replace(row, sampling=None, siblings=()))))
        assert device.num_reads == 1


@pytest.mark.parametrize("invariant", [False, True])
def test_a_mixture_of_experts_runs_without_waiting(invariant: bool) -> None:
    matrices = [torch.empty(32, 16, dtype=torch.float16, device=DEVICE) for _ in range(4)]
    down = [torch.empty(16, 16, dtype=torch.float16, device=DEVICE) for _ in range(4)]
    experts = group_experts(matrices, down, invariant=invariant)
    with unread_device() as device:
        routing = route(torch.empty(5, 4, device=DEVICE), 2, renormalize=True)
        out = experts(torch.empty(5, 16, dtype=torch.float16, device=DEVICE), routing)
        assert out.shape == (5, 16)
        assert device.num_reads == 0


@pytest.mark.parametrize(
    "work",
    [
        lambda values: values.tolist(),
        lambda values: values[0].item(),
        lambda values: values.nonzero(),
        lambda values: values[values > 0],
        lambda values: bool((values > 0).any()),
        lambda values: values.cpu(),
        lambda values: torch.tensor([1, 2], device=values.device),
        lambda values: values.copy_(torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_what_waits_is_seen(work: Callable[[Tensor], object]) -> None:
    """That the double is one."""
    with unread_device(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        work(torch.empty(2, dtype=torch.int64, device=DEVICE))


def test_copies_that_nobody_waits_for_are_counted() -> None:
    device: UnreadDevice
    with unread_device() as device:
        values = to_device(np.arange(3), torch.device(DEVICE))
        assert HostCopy(values).wait().tolist() == [0, 0, 0]
        assert device.num_reads == 1
