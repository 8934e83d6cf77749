"""Recorded decode steps of the Triton operations, with rows of padding among those of requests.

On a CPU the step itself runs in place of its graph, on the same fixed tensors.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paged_case import PagedCase, Shape
from tiny_models import make_model
from torch import Tensor

from gpu_stages.eager_recording import capture
from pagewire.engine import forward_steps
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.tensor_parallel import NoFollowers
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.kernels.gpu.graph_recorder import BUCKETS, GraphRecorder
from pagewire.kernels.ops import NotRecordableError, Recording
from pagewire.kernels.triton_ops import TritonOps, find_gpu

PAGE_SIZE, NUM_PAGES = 16, 6


class Captures:
    """Counts the recordings that are made."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, step: Callable[[], Tensor]) -> Recording:
        self.count += 1
        return capture(step)


def load(
    directory: Path,
    dtype: str,
    captures: Captures | None,
    quantization: Quantization = Quantization.NONE,
) -> ModelRunner:
    plain = load_engine(
        directory,
        dtype=dtype,
        quantization=quantization,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        kernels="triton",
        max_model_len=64,
    )
    plain.kv_cache.pool.zero_()
    plain.model.ops = TritonOps(find_gpu("cpu"), captures)
    return ModelRunner(
        plain.model,
        plain.kv_cache,
        layout=plain.layout,
        followers=NoFollowers(),
        max_model_len=plain.max_model_len,
        digest=plain.digest,
    )


def decode(*starts: int) -> Batch:
    """One token for each row, whose pages lie apart."""
    return Batch(
        rows=tuple(
            BatchRow(
                request_id=str(index),
                token_ids=[(11 * index + start) % 190],
                start=start,
                page_table=range(index, NUM_PAGES, 3)[: start // PAGE_SIZE + 1],
                sampling=SamplingParams(),
            )
            for index, start in enumerate(starts)
        )
    )


# The interpreter's maximum over a row of padding that is NaN, which a scale is made of.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("float32", Quantization.NONE),
        ("float16", Quantization.NONE),
        ("float32", Quantization.INT8),
    ],
)
def test_padding_changes_nothing(dtype: str, quantization: Quantization, tmp_path: Path) -> None:
    make_model("llama", tmp_path, num_hidden_layers=1)
    captures = Captures()
    recorded, plain = (load(tmp_path, dtype, each, quantization) for each in (captures, None))
    recorded.kv_cache.pool[0].fill_(255)  # NaN in what padding reads
    plain.kv_cache.pool[0].fill_(255)
    # Full buckets and others, in turns; a context that crosses a page.
    for step, starts in enumerate([(0, 0, 0), (1,), (2, 1), (3, 2, 1), (16, 3)]):
        logits, expected = recorded.forward(decode(*starts)), plain.forward(decode(*starts))
        assert logits.shape == expected.shape
        # How many programs share a context depends on the width of the page table.
        tolerance = 1e-5 if dtype == "float32" else 4e-3
        torch.testing.assert_close(
            logits, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"step {step}"
        )
        torch.testing.assert_close(
            recorded.kv_cache.pages.values,
            plain.kv_cache.pages.values,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
        )
    assert captures.count == 3  # 1, 2 and 4 rows


def test_steps_are_recorded_before_there_are_any(tmp_path: Path) -> None:
    make_model("llama", tmp_path, num_hidden_layers=1)
    captures = Captures()
    runner = load(tmp_path, "float32", captures)
    before = runner.kv_cache.pool.clone()
    runner.warm_up(3)
    assert captures.count == 6  # the model and the choice of tokens, for 4, 2 and 1 rows
    assert torch.equal(runner.kv_cache.pool, before)
    runner.execute(decode(0, 0, 0))
    runner.execute(decode(1))
    assert captures.count == 6


def test_recorded_sampling_takes_the_parameters_of_every_batch(tmp_path: Path) -> None:
    make_model("llama", tmp_path, num_hidden_layers=1)
    captures = Captures()
    recorded, plain = load(tmp_path, "float32", captures), load(tmp_path, "float32", None)
    assert isinstance(recorded.model.ops.recorder, GraphRecorder)
    recorded.model.ops.recorder.buckets = (4,)
    recorded.warm_up(4)
    drawn = SamplingParams(temperature=2.0, seed=7)
    few = SamplingParams(temperature=1.0, top_k=9, top_p=0.9, min_p=0.01, seed=8)
    penalized = SamplingParams(repetition_penalty=1.5, logit_bias=((4, 3.0),), num_logprobs=2)
    greedy = SamplingParams()
    for step, params in enumerate([(drawn, few, greedy), (greedy,), (penalized, drawn)]):
        rows = tuple(
            replace(
                row,
                sampling=sampling,
                output_position=step,
                history=TokenHistory.for_params(sampling, [3, 5], [5]),
            )
            for row, sampling in zip(decode(*(step,) * len(params)).rows, params, strict=True)
        )
        result, expected = recorded.execute(Batch(rows=rows)), plain.execute(Batch(rows=rows))
        assert result.tokens == expected.tokens
        assert list(result.logprobs) == list(expected.logprobs)
    assert captures.count == 2


def test_a_step_that_is_recorded_makes_no_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path, num_hidden_layers=1)
    runner = load(tmp_path, "float32", Captures())
    runner.warm_up(2)
    monkeypatch.setattr(forward_steps, "padding", None)
    runner.forward(decode(0, 0))


def test_more_rows_than_any_recording_has_run_without(tmp_path: Path) -> None:
    make_model("llama", tmp_path, num_hidden_layers=1)
    captures = Captures()
    runner, plain = load(tmp_path, "float32", captures), load(tmp_path, "float32", None)
    assert isinstance(runner.model.ops.recorder, GraphRecorder)
    runner.model.ops.recorder.buckets = (1, 2)
    batch = decode(0, 0, 0)
    torch.testing.assert_close(runner.forward(batch), plain.forward(batch))
    assert captures.count == 0


def test_a_step_that_waits_for_the_device_runs_without(tmp_path: Path) -> None:
    make_model("llama", tmp_path, num_hidden_layers=1)

    class Refuses(Captures):
        def __call__(self, step: Callable[[], Tensor]) -> Recording:
            self.count += 1
            raise NotRecordableError("a step that waits for the GPU")

    captures = Refuses()
    runner, plain = load(tmp_path, "float32", captures), load(tmp_path, "float32", None)
    runner.warm_up(8)
    batch = decode(0)
    torch.testing.assert_close(runner.forward(batch), plain.forward(batch))
    assert captures.count == 1


def test_an_attention_plan_takes_fewer_rows_where_its_memory_is() -> None:
    ops = TritonOps(find_gpu("cpu"), capture)
    assert ops.recorder is not None
    case = PagedCase(Shape(rows=((1, 20), (1, 9), (1, 3))), torch.float32)
    plan = ops.recorder.plan_attention(case.batch, scale=1.0, window=None)
    addresses = [plan.batch.context_lens.data_ptr(), plan.batch.page_table.data_ptr()]
    other = PagedCase(Shape(rows=((1, 7), (1, 4))), torch.float32).batch
    plan.renew(other)
    assert plan.batch.context_lens.tolist() == [7, 4, 1]
    assert torch.equal(plan.batch.page_table[:2, : other.page_table.shape[1]], other.page_table)
    assert addresses == [plan.batch.context_lens.data_ptr(), plan.batch.page_table.data_ptr()]


def test_buckets_ascend() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
