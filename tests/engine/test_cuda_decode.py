"""Decode steps on a GPU, from CUDA graphs and without: `TRITON_INTERPRET=0 pytest -m gpu`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu
PAGE_SIZE, NUM_PAGES = 16, 40


def engine(path: Path, dtype: str, quantization: Quantization) -> ModelRunner:
    runner = load_engine(
        path,
        dtype=dtype,
        quantization=quantization,
        device="cuda",
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        max_model_len=400,
    )
    runner.kv_cache.pool.zero_()
    return runner


def rows(starts: list[int], step: int) -> tuple[BatchRow, ...]:
    return tuple(
        BatchRow(
            request_id=str(index),
            token_ids=[(7 * index + step) % 190],
            start=start,
            page_table=range(index, NUM_PAGES - 1, 3)[: start // PAGE_SIZE + 1],
            sampling=SamplingParams(),
        )
        for index, start in enumerate(starts)
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "quantization"),
    [
        ("llama", "float16", Quantization.NONE),
        ("qwen3 moe", "float16", Quantization.NONE),
        ("llama", "float16", Quantization.INT8),
        ("llama", "float16", Quantization.W4A16),
        ("llama", "float16", Quantization.FP8),  # by Triton
        ("llama", "bfloat16", Quantization.FP8),  # by cuBLAS
    ],
)
def test_graphs_give_the_logits_of_steps_without(
    kind: str,
    dtype: str,
    quantization: Quantization,
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    make_model(kind)
    recorded, plain = (engine(tmp_path, dtype, quantization) for _ in range(2))
    recorded.warm_up(3)
    # What samples nothing is no row of a recorded step.
    extra = BatchRow(
        request_id="extra", token_ids=[1], start=0, page_table=[NUM_PAGES - 1], sampling=None
    )
    for step in range(40):
        starts = [[step], [14 + step, 3 + step], [2 * step, step, 30 + step]][step % 3]
        batch = rows(starts, step)
        expected = plain.forward(Batch(rows=(*batch, extra)))
        logits = recorded.forward(Batch(rows=batch))
        # What lies at the border of two steps of 8 bits may be rounded to either.
        tolerance = 1e-2 if quantization is Quantization.NONE else 5e-2
        assert (logits - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=30),
        SamplingParams(max_tokens=30, temperature=1.0, top_k=40, top_p=0.9, seed=3),
        SamplingParams(max_tokens=30, temperature=1.0, frequency_penalty=0.7, seed=4),
    ],
    ids=["greedy", "drawn", "penalised"],
)
def test_steps_that_overlap_give_the_same_tokens(
    sampling: SamplingParams, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama")
    runner = engine(tmp_path, "float16", Quantization.NONE)
    runner.warm_up(3)
    prompts = [(5, 9, 23), (7,), tuple(range(40, 60))]
    expected = generate(runner, prompts, sampling)
    assert generate(runner, prompts, sampling, overlapped=True) == expected
