"""A draft model makes steps longer and changes no token, whatever it proposes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from noisy_models import save_noisy
from transformers import PreTrainedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow, DraftWork, PageCopy
from pagewire.engine.draft_model import DraftModel
from pagewire.engine.errors import ModelError
from pagewire.engine.load import load_engine
from pagewire.engine.load_draft import draft_page_bytes, load_draft_model
from pagewire.engine.measure_drafts import measure_costs
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams

MakeModel = Callable[..., PreTrainedModel]

PROMPT = (1, 2, 3)
NUM_REQUESTS = 2000
TOP_K = 5


def load_pair(target: Path, draft: Path, num_pages: int) -> tuple[ModelRunner, DraftModel]:
    runner = load_engine(
        target, dtype="float32", page_size=16, num_pages=num_pages, max_model_len=200
    )
    return runner, load_draft_model(draft, runner, dtype="float32")


def step_row(tokens: Sequence[int], page: int, sampling: SamplingParams, work: int) -> BatchRow:
    """The next step of a sequence that the draft model has seen up to its newest token."""
    newest = len(tokens) - 1
    return BatchRow(
        request_id="r",
        token_ids=tokens[-1:],
        start=newest,
        page_table=(page,),
        sampling=sampling,
        output_position=len(tokens) - len(PROMPT),
        draft_work=DraftWork(token_ids=tokens[-1:], start=newest, num_drafts=work),
    )


def read_prompts(
    runner: ModelRunner, draft_model: DraftModel, sampling: Sequence[SamplingParams]
) -> list[int]:
    """Both models read a prompt for each row, on the page of its number; returns tokens 0."""
    row = BatchRow(
        request_id="r",
        token_ids=PROMPT,
        start=0,
        page_table=(),
        sampling=None,
        draft_work=DraftWork(token_ids=PROMPT, start=0, num_drafts=0),
    )
    rows = tuple(
        replace(row, page_table=(page,), sampling=each) for page, each in enumerate(sampling)
    )
    batch = draft_model.add_drafts(Batch(rows=rows))
    assert batch.rows == rows  # nothing was to be drafted
    return [tokens[0] for tokens in runner.execute(batch).tokens]


def speculate(
    runner: ModelRunner,
    draft_model: DraftModel,
    sampling: Sequence[SamplingParams],
    num_drafts: int,
) -> tuple[list[list[int]], int]:
    """The outputs, all requests in one batch, and how many steps they took."""
    outputs = [[token] for token in read_prompts(runner, draft_model, sampling)]
    num_steps = 0
    while pending := [i for i, output in enumerate(outputs) if len(output) < 6]:
        rows = []
        for index in pending:
            room = 6 - len(outputs[index]) - 1
            tokens = [*PROMPT, *outputs[index]]
            row = step_row(tokens, index, sampling[index], min(num_drafts, room))
            # The KV of the last right draft may be missing, so the one before the newest is read
            # again.
            assert row.draft_work is not None
            work = replace(row.draft_work, token_ids=tokens[-2:], start=len(tokens) - 2)
            rows.append(replace(row, draft_work=work))
        result = runner.execute(draft_model.add_drafts(Batch(rows=tuple(rows))))
        for index, found in zip(pending, result.tokens, strict=True):
            outputs[index] += found
        num_steps += 1
    return outputs, num_steps


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("num_drafts", [1, 4])
def test_tokens_are_those_without_drafts(
    temperature: float, num_drafts: int, make_model: MakeModel, tmp_path: Path
) -> None:
    draft = save_noisy(make_model("llama"), tmp_path / "draft")
    runner, draft_model = load_pair(tmp_path, draft, num_pages=8)
    sampling = [
        SamplingParams(max_tokens=6, temperature=temperature, top_p=0.9, seed=seed)
        for seed in range(8)
    ]
    outputs, num_steps = speculate(runner, draft_model, sampling, num_drafts)
    assert num_steps <= 5
    assert outputs == [generate(runner, [PROMPT], params)[0] for params in sampling]


def test_the_model_itself_is_always_right_at_any_temperature(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """The drafts have the random numbers of the tokens in whose places they are."""
    make_model("llama")
    runner, draft_model = load_pair(tmp_path, tmp_path, num_pages=4)
    sampling = [
        SamplingParams(max_tokens=6, temperature=0.8, top_k=50, seed=seed, num_logprobs=0)
        for seed in range(4)
    ]
    _, num_steps = speculate(runner, draft_model, sampling, 4)
    assert num_steps == 1  # 4 drafts and a token behind them


def test_drafted_tokens_follow_the_distribution_of_the_model(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Pairs of tokens of many requests; drafts were right for some and wrong for others."""
    draft = save_noisy(make_model("llama"), tmp_path / "draft", noise=0.1)
    runner, draft_model = load_pair(tmp_path, draft, num_pages=NUM_REQUESTS)
    params = SamplingParams(max_tokens=6, temperature=4.0, top_k=TOP_K)
    sampling = [replace(params, seed=seed) for seed in range(NUM_REQUESTS)]
    read_prompts(runner, draft_model, sampling)
    tokens = [*PROMPT, 9]  # the same token 0 for all, so that one distribution follows
    rows = [step_row(tokens, page, each, 2) for page, each in enumerate(sampling)]
    found = list(runner.execute(draft_model.add_drafts(Batch(rows=tuple(rows)))).tokens)
    wrong = [page for page, each in enumerate(found) if len(each) == 1]
    assert NUM_REQUESTS / 20 < len(wrong) < NUM_REQUESTS * 19 / 20
    rows = [step_row([*tokens, *found[page]], page, sampling[page], 2) for page in wrong]
    result = runner.execute(draft_model.add_drafts(Batch(rows=tuple(rows))))
    for page, following in zip(wrong, result.tokens, strict=True):
        found[page] += following

    expected = pair_probabilities(runner, tokens, params)
    counts = Counter(each[:2] for each in found)
    assert counts.keys() <= expected.keys()
    wanted = torch.tensor(list(expected.values())) * NUM_REQUESTS
    observed = torch.tensor([counts[pair] for pair in expected])
    tested = wanted >= 5
    chi_square = ((observed - wanted) ** 2 / wanted)[tested].sum()
    # The 99.99 % quantile of chi square, by Wilson and Hilferty.
    freedom = int(tested.sum()) - 1
    assert freedom > 10
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


def pair_probabilities(
    runner: ModelRunner, tokens: list[int], params: SamplingParams
) -> dict[tuple[int, int], float]:
    """By the definition, of the two tokens behind `tokens` under temperature and top-k."""

    def following(tokens: list[int]) -> dict[int, float]:
        row = BatchRow(request_id="r", token_ids=tokens, start=0, page_table=(0,), sampling=params)
        logits = runner.forward(Batch(rows=(row,)))[0].double() / params.temperature
        top = logits.topk(params.top_k)
        return dict(zip(top.indices.tolist(), top.values.softmax(dim=-1).tolist(), strict=True))

    return {
        (first, second): chance * other
        for first, chance in following(tokens).items()
        for second, other in following([*tokens, first]).items()
    }


def test_drafts_leave_the_copies_of_a_batch_alone(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("llama")
    _, draft_model = load_pair(tmp_path, tmp_path, num_pages=2)
    row = step_row([*PROMPT, 5], 0, SamplingParams(max_tokens=6), 0)
    copies = (PageCopy(source=0, destination=1),)
    for rows in ((row,), (replace(row, draft_work=None),)):
        assert draft_model.add_drafts(Batch(rows=rows, copies=copies)).copies == copies


def test_rows_without_work_stay_as_they_are(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("llama")
    runner, draft_model = load_pair(tmp_path, tmp_path, num_pages=2)
    sampling = SamplingParams(max_tokens=6)
    read_prompts(runner, draft_model, [sampling] * 2)
    drafting = step_row([*PROMPT, 5], 0, sampling, 3)
    plain = replace(step_row([*PROMPT, 6], 1, sampling, 3), draft_work=None)
    with_drafts, unchanged = draft_model.add_drafts(Batch(rows=(drafting, plain))).rows
    assert (with_drafts.num_drafts, len(with_drafts.token_ids)) == (3, 4)
    assert unchanged is plain


def test_another_vocabulary_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "target")
    make_model("llama", vocab_size=100)
    runner = load_engine(tmp_path / "target", dtype="float32", num_pages=1)
    with pytest.raises(ModelError, match="a vocabulary of 100 tokens, the model one of 193"):
        load_draft_model(tmp_path, runner, dtype="float32")


@pytest.mark.parametrize("max_model_len", [2, 5, 200])
def test_costs_can_be_measured_on_one_page(
    max_model_len: int, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model("llama")
    runner = load_engine(
        tmp_path, dtype="float32", page_size=16, num_pages=1, max_model_len=max_model_len
    )
    assert measure_costs(runner, None).per_draft == 0
    costs = measure_costs(runner, runner)
    assert costs.per_draft > 0
    assert [size for size, _ in costs.steps] == [
        size for size in (1, 2, 4, 8, 16, 32, 64) if size <= max_model_len
    ]


def test_a_page_of_the_draft_model_takes_what_its_sizes_say(
    make_model: MakeModel, tmp_path: Path
) -> None:
    make_model("llama")
    runner = load_engine(tmp_path, dtype="float32", page_size=16, num_pages=1)
    found = draft_page_bytes(tmp_path, page_size=16, dtype="float32")
    assert found == runner.layout.page_bytes
