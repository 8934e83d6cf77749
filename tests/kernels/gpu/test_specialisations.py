"""What Triton compiles is known at the start: no step of another length meets a kernel anew."""

from dataclasses import replace

import pytest
from unread_device import DEVICE, unread_device

from gpu_stages.random_model import random_model, runner_of
from gpu_stages.scale import TINY
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.triton_ops import TritonOps, find_gpu

DRAWN = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)


def runner() -> ModelRunner:
    scale = replace(TINY, device=DEVICE)
    model = random_model(scale)
    model.ops = TritonOps(find_gpu("cpu"))  # no recordings: every step launches its kernels
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


def test_prompts_of_all_lengths_run_what_the_warm_up_has_compiled() -> None:
    model = runner()
    with unread_device() as device:
        model.warm_up_prompts()
        compiled = set(device.specialisations)
        assert any("_prefill_kernel" in key for key in compiled)
        for num_tokens in (2, 3, 15, 16, 17, 32, 33):
            for contexts in ((40,), (33, 64), (48, 48, 48)):
                model.launch(Batch(rows=rows(*contexts, num_tokens=num_tokens)))
        assert device.specialisations == compiled
