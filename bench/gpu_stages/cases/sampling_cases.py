"""What a step does with logits: what changes them, what draws from them, and their logprobs."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gpu_stages.cases.kernel_case import KernelCase, NamedCase, Setting, same_bytes
from pagewire.engine import random_numbers
from pagewire.kernels import reference
from pagewire.kernels.gpu.grammar_mask import mask_forbidden
from pagewire.kernels.gpu.logit_bias import add_logit_bias
from pagewire.kernels.gpu.penalties import apply_penalties
from pagewire.kernels.gpu.sampling import TritonSamplingPlan, logprobs
from pagewire.kernels.gpu.uniform import uniform
from pagewire.kernels.ops import Logprobs, SamplingRows

TOP_K, TOP_P, MIN_P, TEMPERATURE = 50, 0.9, 0.01, 0.7
NUM_TOP = 5  # logprobs
MAX_HELD = 1000  # different tokens that a sequence holds
ALLOWED_SHARE = 0.01  # of a vocabulary by a grammar
SPREAD = 4.0  # of logits: a few hundred tokens have nearly all of the probability
_SECTOR = 32  # bytes that a GPU reads or writes at least


def greedy_case(setting: Setting) -> KernelCase:
    logits = _logits(setting)
    rows = _sampling_rows(logits, temperature=0.0)
    numbers = torch.rand(len(logits), dtype=torch.float64, device=logits.device)
    return KernelCase(
        run=lambda: TritonSamplingPlan(rows).run(logits, numbers),
        expected=lambda: logits.cpu().argmax(dim=-1),
        num_bytes=logits.nbytes,
        max_ratio=2.0,
    )


def sampling_case(setting: Setting) -> KernelCase:
    """Temperature, top-k, top-p and min-p at once, each token at its share of what they keep."""
    logits = _logits(setting)
    rows = _sampling_rows(logits, temperature=TEMPERATURE)
    numbers = torch.rand(len(logits), dtype=torch.float64, device=logits.device)

    def expected() -> Tensor:
        tokens = []
        for row, number in zip(logits.cpu(), numbers.cpu(), strict=True):
            kept = reference.next_token_distribution(
                row, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, min_p=MIN_P
            )
            tokens.append(torch.searchsorted(kept.cumsum(0), number, right=True))
        return torch.stack(tokens)

    return KernelCase(
        run=lambda: TritonSamplingPlan(rows).run(logits, numbers),
        expected=expected,
        num_bytes=logits.nbytes,
        max_ratio=2.0,
    )


def uniform_case(setting: Setting) -> KernelCase:
    """Random numbers: those that a host makes, to the bit."""
    count = setting.sizes.sampled_rows
    seeds = np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)
    positions = np.arange(count)
    on_device = [
        torch.from_numpy(numbers).to(setting.scale.device)
        for numbers in (seeds.view(np.int64), positions)
    ]
    return KernelCase(
        run=lambda: uniform(*on_device),
        read=same_bytes,
        expected=lambda: same_bytes(
            torch.from_numpy(random_numbers.uniform(seeds, positions.tolist()))
        ),
        num_bytes=24 * count,
        max_ratio=None,
    )


def logprobs_case(setting: Setting) -> KernelCase:
    """Of the sampled tokens, and behind each those of the most likely ones."""
    logits = _logits(setting)
    device = logits.device
    rows = torch.arange(len(logits), device=device)
    tokens = torch.randint(logits.shape[1], (len(logits),), device=device)

    def expected() -> Tensor:
        exact = logits.cpu().double().log_softmax(dim=-1)
        sampled = exact.gather(1, tokens.cpu()[:, None])
        return torch.cat((sampled, exact.topk(NUM_TOP, dim=-1).values), dim=1)

    def read(found: Logprobs) -> Tensor:
        return torch.cat((found.sampled[:, None], found.top), dim=1)

    return KernelCase(
        run=lambda: logprobs(logits, rows, tokens, NUM_TOP),
        read=read,
        expected=expected,
        num_bytes=4 * logits.nbytes,  # copied, and then read by the sum and by top-k
        max_ratio=None,
    )


def penalties_case(setting: Setting) -> KernelCase:
    """To the bit what torch makes of them, one rounding after another."""
    logits = _logits(setting)
    offsets, tokens = _held(setting, logits)
    device, num_rows = logits.device, len(logits)
    counts = setting.integers(3, len(tokens)).float()
    repetition = 1 + torch.rand(num_rows, device=device)
    frequency, presence = torch.rand(2, num_rows, device=device).unbind()

    def expected() -> Tensor:
        changed = logits.cpu().clone()
        r, f, p = (column.cpu() for column in (repetition, frequency, presence))
        for row, (start, end) in enumerate(_ranges(offsets)):
            held, count = tokens[start:end].cpu(), counts[start:end].cpu()
            values = changed[row, held]
            values = torch.where(values > 0, values / r[row], values * r[row])
            changed[row, held] = values - (f[row] * count + p[row] * (count > 0).float())
        return same_bytes(changed)

    return KernelCase(
        run=lambda: apply_penalties(
            logits,
            offsets=offsets,
            tokens=tokens,
            counts=counts,
            repetition=repetition,
            frequency=frequency,
            presence=presence,
        ),
        read=lambda _: same_bytes(logits),
        expected=expected,
        num_bytes=tokens.nbytes + counts.nbytes + 2 * _SECTOR * len(tokens),
        max_ratio=1.3,
    )


def logit_bias_case(setting: Setting) -> KernelCase:
    logits = _logits(setting)
    offsets, tokens = _held(setting, logits)
    bias = torch.randn(len(tokens), device=logits.device)

    def expected() -> Tensor:
        changed = logits.cpu().clone()
        for row, (start, end) in enumerate(_ranges(offsets)):
            changed[row, tokens[start:end].cpu()] += bias[start:end].cpu()
        return same_bytes(changed)

    return KernelCase(
        run=lambda: add_logit_bias(logits, offsets=offsets, tokens=tokens, bias=bias),
        read=lambda _: same_bytes(logits),
        expected=expected,
        num_bytes=tokens.nbytes + bias.nbytes + 2 * _SECTOR * len(tokens),
        max_ratio=1.3,
    )


def grammar_case(setting: Setting) -> KernelCase:
    """A grammar that allows few tokens."""
    logits = _logits(setting)
    num_words = -(-logits.shape[1] // 32)
    is_allowed = torch.rand(len(logits), num_words, 32, device=logits.device) < ALLOWED_SHARE
    places = 1 << torch.arange(32, device=logits.device)
    bitmask = (is_allowed * places).sum(dim=2).int()  # the highest bit is the sign

    def expected() -> Tensor:
        allowed = is_allowed.flatten(1)[:, : logits.shape[1]].cpu()
        return same_bytes(logits.cpu().masked_fill(~allowed, -torch.inf))

    return KernelCase(
        run=lambda: mask_forbidden(logits, bitmask),
        read=lambda _: same_bytes(logits),
        expected=expected,
        num_bytes=logits.nbytes + bitmask.nbytes,
        max_ratio=1.3,
    )


CASES = (
    NamedCase(name="greedy choice", make=greedy_case),
    NamedCase(name="sampling", make=sampling_case),
    NamedCase(name="random numbers", make=uniform_case),
    NamedCase(name="logprobs", make=logprobs_case),
    NamedCase(name="penalties", make=penalties_case),
    NamedCase(name="logit bias", make=logit_bias_case),
    NamedCase(name="grammar mask", make=grammar_case),
)


def _logits(setting: Setting) -> Tensor:
    """float32 [sampled_rows, vocab_size]."""
    shape = setting.sizes.sampled_rows, setting.scale.model.vocab_size
    return SPREAD * torch.randn(*shape, device=setting.scale.device)


def _sampling_rows(logits: Tensor, *, temperature: float) -> SamplingRows:
    ones = torch.ones(len(logits), device=logits.device)
    return SamplingRows(
        temperature=temperature * ones,
        top_k=TOP_K * ones.long(),
        top_p=TOP_P * ones.double(),
        min_p=MIN_P * ones,
        vocab_size=logits.shape[1],
    )


def _held(setting: Setting, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets, int32 [num_rows + 1], and the different tokens of each row, int64."""
    num_rows, vocab_size = logits.shape
    count = min(MAX_HELD, vocab_size // 2)
    offsets = torch.arange(num_rows + 1, dtype=torch.int32, device=logits.device) * count
    tokens = torch.rand(num_rows, vocab_size, device=logits.device).topk(count, dim=1).indices
    return offsets, tokens.flatten()


def _ranges(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(pairwise(ends))
