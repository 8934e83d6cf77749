"""What Triton compiles is known at the start: no step of another length meets a kernel anew."""

from dataclasses import replace

import pytest
import torch
from unread_device import DEVICE, unread_device

from gpu_stages.random_model import random_model, runner_of
from gpu_stages.scale import TINY
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.launched_step import LaunchedStep
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.triton_ops import TritonOps, find_gpu

DRAWN = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)


def runner(numbers: torch.dtype | None = None, *, deterministic: bool = False) -> ModelRunner:
    """`numbers`: of matrices; None: floats."""
    scale = replace(TINY, device=DEVICE, model=replace(TINY.model, max_model_len=200))
    model = random_model(scale, numbers, deterministic=deterministic)
    # No recordings: every step launches its kernels.
    model.ops = TritonOps(find_gpu("cpu"), deterministic=deterministic)
    return runner_of(model, scale, num_pages=20)


def rows(*contexts: int, num_tokens: int = 1) -> tuple[BatchRow, ...]:
    return tuple(
        BatchRow(
            request_id=str(index),
            token_ids=[1] * num_tokens,
            start=context - num_tokens,
            page_table=range(4),
            sampling=DRAWN,
        )
        for index, context in enumerate(contexts)
    )


@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_decode_steps_of_all_lengths_run_the_same_kernels(num_rows: int) -> None:
    model = runner()
    with unread_device() as device:
        model.launch(Batch(rows=rows(*(1,) * num_rows)))
        compiled = set(device.specialisations)
        assert any("_decode_kernel" in key for key in compiled)
        for context in (2, 15, 16, 17, 33, 48, 64):
            model.launch(Batch(rows=rows(*(context,) * num_rows)))
        assert device.specialisations == compiled


@pytest.mark.parametrize("numbers", [None, torch.int8], ids=["floats", "int8"])
def test_prompts_of_all_lengths_run_what_the_warm_up_has_compiled(
    numbers: torch.dtype | None,
) -> None:
    model = runner(numbers)
    with unread_device() as device:
        model.warm_up_prompts(150)
        compiled = set(device.specialisations)
        assert any("_prefill_kernel" in key for key in compiled)
        for num_tokens in (3, 15, 16, 17, 33, 50):
            for contexts in ((60,), (58, 58, 64)):
                model.launch(Batch(rows=rows(*contexts, num_tokens=num_tokens)))
        assert device.specialisations == compiled


def test_deterministic_steps_run_the_same_kernels_in_decode_and_prefill() -> None:
    """Another kernel, or another specialisation of one, could sum in another order."""
    model = runner(deterministic=True)
    with unread_device() as device:
        model.launch(Batch(rows=rows(20)))
        compiled = set(device.specialisations)
        assert any("_invariant_matmul_kernel" in key for key in compiled)
        for contexts, num_tokens in (((60,), 50), ((58, 16, 64), 1), ((33,) * 16, 16), ((1,), 1)):
            model.launch(Batch(rows=rows(*contexts, num_tokens=num_tokens)))
        assert device.specialisations == compiled


@pytest.mark.parametrize(
    ("max_tokens", "lengths"),
    [
        (1, [1]),
        (2, [2]),
        (3, [2, 3]),
        (64, [2, 4, 8, 16, 32, 64]),
        (900, [2, 4, 8, 16, 32, 64, 80]),
    ],
)
def test_the_warm_up_runs_no_more_than_a_step_may(
    max_tokens: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner()
    monkeypatch.setattr(model, "max_model_len", 80)
    launch, launched = model.launch, list[int]()

    def hear(batch: Batch) -> LaunchedStep:
        launched.append(batch.num_tokens)
        return launch(batch)

    monkeypatch.setattr(model, "launch", hear)
    with unread_device():
        model.warm_up_prompts(max_tokens)
    assert launched == lengths
