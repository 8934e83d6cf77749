"""The oracle of the kernel tests: each operation in float64, from its formula.

Dense and unpaged on purpose, with a Python loop where a formula has a sum, so that it shares no
code and no layout with what it checks.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y_i = w_i x_i / sqrt(mean(x²) + eps); x: [..., dim]."""
    x = x.double()
    return weight.double() * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up; both [num_tokens, dim]."""
    gate = gate.double()
    return gate / (1.0 + torch.exp(-gate)) * up.double()


def rope(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Multiply x_j + i x_{j + d/2} by exp(i position f_j); x: [num_tokens, heads, head_dim]."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None, None] * inverse_frequencies.double()
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 round(127 x / m), halves to even, and m / 127, with m = max |x| over the last dimension.

    1 in place of m / 127 where all are 0. x: [..., dim].
    """
    x = x.double()
    scales = x.abs().amax(dim=-1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return torch.round(x / scales[..., None]).to(torch.int8), scales


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Causal attention of one sequence, its queries being the last of its positions.

    q: [query_len, num_heads, head_dim]; k, v: [context_len, num_kv_heads, head_dim].
    """
    query_len, num_heads, _ = q.shape
    context_len, num_kv_heads, _ = k.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for i in range(query_len):
        end = context_len - query_len + i + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            keys, values = k[start:end, kv_head].double(), v[start:end, kv_head].double()
            weights = torch.softmax(keys @ q[i, head].double() * scale, dim=0)
            out[i, head] = weights @ values
    return out


def next_token_distribution(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """What is left of softmax(logits / temperature), one token after another; both [vocab_size].

    Top-k keeps the k most likely; of these a token stays while those before it have less than
    top-p of their mass; of all, those with min-p of the highest probability. Who is as likely as
    the last of top-k or top-p stays too. temperature is above 0.
    """
    probabilities = torch.softmax(logits.double() / temperature, dim=0)
    ranked = sorted(probabilities.tolist(), reverse=True)[:top_k]
    before, least = 0.0, 0.0
    for probability in ranked:
        if before >= top_p * sum(ranked):
            break
        before, least = before + probability, probability
    is_kept = probabilities >= max(least, min_p * ranked[0])
    kept = torch.where(is_kept, probabilities, 0.0)
    return kept / kept.sum()
