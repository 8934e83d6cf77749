"""Bias, penalties and grammar masks: to the bit what the formulas give in torch."""

import numpy as np
import pytest
import torch

from pagewire.engine.logit_adjustments import LogitAdjustments
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.grammar_mask import mask_forbidden
from pagewire.kernels.gpu.logit_bias import add_logit_bias
from pagewire.kernels.gpu.penalties import apply_penalties

VOCAB_SIZE = 1003


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, VOCAB_SIZE) * 5


def test_bias(logits: torch.Tensor) -> None:
    tokens = torch.cat([torch.randperm(VOCAB_SIZE)[:700], torch.tensor([0, VOCAB_SIZE - 1])])
    bias = torch.randn(702)
    bias[3] = -torch.inf
    rows = torch.tensor([0] * 700 + [2] * 2)
    expected = logits.clone()
    expected[rows, tokens] += bias
    offsets = torch.tensor([0, 700, 700, 702], dtype=torch.int32)
    add_logit_bias(logits, offsets=offsets, tokens=tokens, bias=bias)
    assert torch.equal(logits, expected)


def test_penalties_are_those_of_the_engine(logits: torch.Tensor) -> None:
    params = (
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.77),
        SamplingParams(),
        SamplingParams(repetition_penalty=0.7, frequency_penalty=-0.1, presence_penalty=-1.0),
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCAB_SIZE, (3, 900)).tolist()
    outputs = rng.integers(0, 200, (3, 300)).tolist()
    histories = [
        TokenHistory(prompt, output) if row.has_penalties else None
        for row, prompt, output in zip(params, prompts, outputs, strict=True)
    ]
    adjustments = LogitAdjustments(params, VOCAB_SIZE, torch.device("cpu"))
    adjusted = logits.clone()
    with adjustments.applied(adjusted, [300] * 3, histories):
        expected = adjusted.clone()

    known = [history for history in histories if history is not None]
    lengths = [0 if history is None else len(history.token_ids) for history in histories]
    apply_penalties(
        logits,
        offsets=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        tokens=torch.from_numpy(np.concatenate([history.token_ids for history in known])),
        counts=torch.from_numpy(np.concatenate([history.output_counts for history in known])),
        repetition=torch.tensor([row.repetition_penalty for row in params]),
        frequency=torch.tensor([row.frequency_penalty for row in params]),
        presence=torch.tensor([row.presence_penalty for row in params]),
    )
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 9000])
def test_grammar_mask(vocab_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, vocab_size)
    words = torch.randint(-(2**31), 2**31, (3, -(-vocab_size // 32)), dtype=torch.int64)
    words[1] = -1  # a row without a grammar
    token = torch.arange(vocab_size)
    allowed = (words[:, token // 32] >> (token % 32)) & 1
    expected = logits.masked_fill(allowed == 0, -torch.inf)
    mask_forbidden(logits, words.int())
    assert torch.equal(logits, expected)


def test_what_does_not_fit_is_refused(logits: torch.Tensor) -> None:
    offsets, tokens = torch.zeros(4, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(KernelArgumentError, match=r"bias is \[4\]; give \[5\]"):
        add_logit_bias(logits, offsets=offsets, tokens=tokens, bias=torch.zeros(4))
    with pytest.raises(KernelArgumentError, match=r"offsets is torch\.int64; give torch\.int32"):
        add_logit_bias(logits, offsets=offsets.long(), tokens=tokens, bias=torch.zeros(5))
    with pytest.raises(KernelArgumentError, match=r"bitmask is \[3, 31\]; give \[3, 32\]"):
        mask_forbidden(logits, torch.zeros(3, 31, dtype=torch.int32))
