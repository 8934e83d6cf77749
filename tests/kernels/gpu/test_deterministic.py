"""`deterministic` in Triton: logits are the same to the bit, however a sequence is cut."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model
from torch import Tensor

from gpu_stages.eager_recording import capture
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.errors import KernelError
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.load import load_engine, select_kernels
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.tensor_parallel import NoFollowers
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.triton_ops import TritonOps, find_gpu

PAGE_SIZE = 16
PAGES_PER_ROW = 3
NUM_ROWS = 3
LENGTH = 20


def load(directory: Path, dtype: str, kv_cache_dtype: KVCacheDtype) -> ModelRunner:
    return load_engine(
        directory,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        page_size=PAGE_SIZE,
        num_pages=NUM_ROWS * PAGES_PER_ROW,
        kernels="triton",
        num_threads=1,
        deterministic=True,
    )


@pytest.fixture(
    scope="module",
    params=[
        ("mistral window", "float16", "auto"),
        pytest.param(("qwen3", "float32", "auto"), marks=pytest.mark.slow),
        pytest.param(("qwen2 moe", "float16", "auto"), marks=pytest.mark.slow),
        pytest.param(("llama tied", "float16", "int8"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    family, dtype, kv_cache_dtype = request.param
    path = tmp_path_factory.mktemp("model")
    options = {"sliding_window": 9} if family == "mistral window" else {}
    make_model(family, path, num_hidden_layers=1, **options)
    return load(path, dtype, KVCacheDtype(kv_cache_dtype))


def prompt(index: int, length: int) -> list[int]:
    return [(index * 31 + i * i * 7 + i) % VOCAB_SIZE for i in range(length)]


def row(tokens: Sequence[int], start: int, place: int = 0, num_drafts: int = 0) -> BatchRow:
    return BatchRow(
        request_id="r",
        token_ids=tokens,
        start=start,
        page_table=range(place * PAGES_PER_ROW, (place + 1) * PAGES_PER_ROW),
        sampling=SamplingParams(),
        num_drafts=num_drafts,
    )


def forward(runner: ModelRunner, *rows: BatchRow) -> Tensor:
    return runner.forward(Batch(rows=rows)).clone()  # the next step may use its memory


def in_chunks(runner: ModelRunner, tokens: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """The logits of the last token, prefilled in chunks that end at `cuts` and at the end."""
    logits, start = torch.empty(0), 0
    for end in (*sorted(set(cuts)), len(tokens)):
        logits = forward(runner, row(tokens[start:end], start))[0]
        start = end
    return logits


def test_chunks_change_nothing(runner: ModelRunner) -> None:
    # A prefix hit is a chunk that was computed earlier, a token of decode a chunk of one.
    tokens = prompt(0, LENGTH)
    whole = in_chunks(runner, tokens, [])
    for cuts in ([7], [1, 16, 17, 19]):
        assert torch.equal(in_chunks(runner, tokens, cuts), whole)


def test_a_step_is_the_same_in_a_batch_and_alone(runner: ModelRunner) -> None:
    prompts = [prompt(place, 5 + 6 * place) for place in range(NUM_ROWS)]
    whole = [row(each, 0, place) for place, each in enumerate(prompts)]
    alone = torch.cat([forward(runner, each) for each in whole])
    assert torch.equal(forward(runner, *whole), alone)
    last = [row(each[-1:], len(each) - 1, place) for place, each in enumerate(prompts)]
    assert torch.equal(forward(runner, *last), alone)
    assert torch.equal(forward(runner, last[1], whole[2]), alone[1:])


def test_rows_with_drafts_are_as_single_tokens(runner: ModelRunner) -> None:
    tokens = prompt(2, 18)
    forward(runner, row(tokens[:15], 0))
    drafted = forward(runner, row(tokens[15:], 15, num_drafts=2))
    for index, token in enumerate(tokens[15:]):
        assert torch.equal(forward(runner, row([token], 15 + index))[0], drafted[index])


def test_sampled_tokens_are_the_same_in_every_batch(runner: ModelRunner) -> None:
    rows = [
        replace(
            row(prompt(place, 4 + place), 0, place),
            sampling=SamplingParams(temperature=0.9, top_p=0.95, seed=place),
        )
        for place in range(NUM_ROWS)
    ]
    together = runner.execute(Batch(rows=tuple(rows))).tokens
    assert list(together) == [runner.execute(Batch(rows=(each,))).tokens[0] for each in rows]


def test_recorded_steps_are_as_others(tmp_path: Path) -> None:
    """With rows of padding, which a recording for more rows has."""
    make_model("llama", tmp_path, num_hidden_layers=1)
    runner = load(tmp_path, "float16", KVCacheDtype.AUTO)
    tokens = [prompt(place, 18) for place in range(NUM_ROWS)]
    whole = [forward(runner, row(each, 0, place))[0] for place, each in enumerate(tokens)]
    runner.model.ops = TritonOps(find_gpu("cpu"), capture, deterministic=True)
    recorded = ModelRunner(
        runner.model,
        runner.kv_cache,
        layout=runner.layout,
        followers=NoFollowers(),
        max_model_len=PAGES_PER_ROW * PAGE_SIZE,
        digest=b"",
    )
    last = [row(each[-1:], 17, place) for place, each in enumerate(tokens)]
    together = forward(recorded, *last)  # in a recording of four
    for place in range(NUM_ROWS):
        assert torch.equal(together[place], whole[place])
    assert torch.equal(forward(recorded, last[0])[0], whole[0])


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_a_gpu_gets_triton_for_it(kernels: str) -> None:
    selected = select_kernels(kernels, "cuda", deterministic=True)
    assert isinstance(selected.ops, TritonOps)
    assert selected.deterministic


def test_an_embedding_that_is_the_lm_head_is_stored_once(tmp_path: Path) -> None:
    make_model("llama tied", tmp_path, num_hidden_layers=1)
    reference = load_engine(tmp_path, dtype="float16", num_pages=1, kernels="torch")
    model = load(tmp_path, "float16", KVCacheDtype.AUTO).model
    assert model.weight_bytes == reference.model.weight_bytes


def test_matrices_in_fewer_bits_are_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path, num_hidden_layers=1)
    with pytest.raises(KernelError, match="in floating point; quantization is int8: choose none"):
        load_engine(
            tmp_path,
            dtype="float32",
            quantization=Quantization.INT8,
            kernels="triton",
            num_pages=1,
            deterministic=True,
        )
