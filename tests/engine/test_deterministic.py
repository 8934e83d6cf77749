"""`deterministic`: logits are the same to the bit, however a sequence is cut into steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_kernels import native_library
from tiny_models import VOCAB_SIZE, make_model
from torch import Tensor

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.errors import KernelError
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.native_attention import PART_LEN

PAGE_SIZE = 16
PAGES_PER_ROW = 12
NUM_ROWS = 32

# Layers as large as the default model's, few of them and with a small vocabulary.
REAL_SHAPES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "initializer_range": 0.05,
}


@pytest.fixture(scope="module", params=["tiny", "tiny with a window", "real shapes"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    native_library()
    path = tmp_path_factory.mktemp("model")
    if request.param == "real shapes":
        make_model("llama", path, **REAL_SHAPES)
    elif request.param == "tiny":
        make_model("qwen3", path)
    else:
        make_model("mistral", path, sliding_window=21)
    return load_engine(
        path,
        dtype="float32",
        page_size=PAGE_SIZE,
        num_pages=NUM_ROWS * PAGES_PER_ROW,
        deterministic=True,
    )


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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
    return runner.forward(Batch(rows=rows)).clone()  # the next step uses its memory


def in_chunks(runner: ModelRunner, tokens: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """The logits of the last token, prefilled in chunks that end at `cuts` and at the end."""
    logits, start = torch.empty(0), 0
    for end in (*sorted(set(cuts)), len(tokens)):
        logits = forward(runner, row(tokens[start:end], start))[0]
        start = end
    return logits


LENGTH = 70


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=6))
def test_chunks_change_nothing(runner: ModelRunner, cuts: list[int]) -> None:
    # A prefix hit is a chunk that was computed earlier.
    tokens = prompt(0, LENGTH)
    assert torch.equal(in_chunks(runner, tokens, cuts), in_chunks(runner, tokens, []))


def test_a_decoded_token_of_a_long_context_is_as_in_its_prompt(runner: ModelRunner) -> None:
    # Longer than a part of the context as decode cuts it otherwise.
    tokens, pages = prompt(3, PART_LEN + 90), range(NUM_ROWS * PAGES_PER_ROW)
    whole = forward(runner, replace(row(tokens, 0), page_table=pages))
    forward(runner, replace(row(tokens[:-1], 0), page_table=pages))
    last = replace(row(tokens[-1:], len(tokens) - 1), page_table=pages)
    assert torch.equal(forward(runner, last), whole)


def test_every_token_by_itself_is_as_in_one_chunk(runner: ModelRunner) -> None:
    tokens = prompt(1, 40)
    alone = in_chunks(runner, tokens, range(1, 40))
    assert torch.equal(alone, in_chunks(runner, tokens, []))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=8))
def test_prompts_are_the_same_together_and_alone(runner: ModelRunner, lengths: list[int]) -> None:
    rows = [row(prompt(place, length), 0, place) for place, length in enumerate(lengths)]
    together = forward(runner, *rows)
    for each, logits in zip(rows, together, strict=True):
        assert torch.equal(forward(runner, each)[0], logits)


def test_decode_is_the_same_among_32_rows_and_alone(runner: ModelRunner) -> None:
    lengths = [3 + 5 * place for place in range(NUM_ROWS)]
    for place, length in enumerate(lengths):
        forward(runner, row(prompt(place, length), 0, place))
    rows = [row([place + 1], length, place) for place, length in enumerate(lengths)]
    together = forward(runner, *rows)
    for place in (0, 1, 13, NUM_ROWS - 1):
        assert torch.equal(forward(runner, rows[place])[0], together[place])


def test_sampled_tokens_are_the_same_in_every_batch(runner: ModelRunner) -> None:
    rows = [
        replace(
            row(prompt(place, 5 + place), 0, place),
            sampling=SamplingParams(temperature=0.9, top_p=0.95, seed=place),
        )
        for place in range(NUM_ROWS)
    ]
    together = runner.execute(Batch(rows=tuple(rows))).tokens
    alone = [runner.execute(Batch(rows=(each,))).tokens[0] for each in rows]
    assert list(together) == alone


def test_rows_with_drafts_are_as_single_tokens(runner: ModelRunner) -> None:
    tokens = prompt(2, 50)
    forward(runner, row(tokens[:40], 0))
    drafted = forward(runner, row(tokens[40:], 40, num_drafts=9))
    for index, token in enumerate(tokens[40:]):
        assert torch.equal(forward(runner, row([token], 40 + index))[0], drafted[index])


@pytest.mark.usefixtures("two_threads")
def test_threads_change_nothing(runner: ModelRunner) -> None:
    rows = [row(prompt(place, 40 + place), 0, place) for place in range(4)]
    by_two = forward(runner, *rows)
    torch.set_num_threads(1)
    assert torch.equal(forward(runner, *rows), by_two)


MakeModel = Callable[..., object]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "bfloat16"}, "float32 on a CPU; dtype is bfloat16: choose float32"),
        ({"quantization": Quantization.INT8}, "quantization is int8: choose none"),
        ({"kernels": "torch"}, r"needs the kernels in C\+\+ or Triton, and kernels is torch"),
    ],
)
def test_what_cannot_be_deterministic_is_refused(
    options: dict[str, object], reason: str, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model("llama")
    everything = {"dtype": "float32", "num_pages": 1, "deterministic": True, **options}
    with pytest.raises(KernelError, match=reason):
        load_engine(tmp_path, **everything)  # type: ignore[arg-type]
