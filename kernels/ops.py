"""The signatures of every operation that a model runs, one Protocol for all devices.

`torch_ops` implements them anywhere. An implementation is chosen once, when a model is loaded;
a model calls nothing else. Shapes are ragged: the tokens of all rows of a step lie behind one
another in dimension 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, overload

from torch import Tensor

from pagewire.kernels.kv_pool import KVPool

NO_SLOT = -1  # of a token of padding: its KV is stored nowhere
FAULTY = -1  # in place of the token of a row of logits from which none can be chosen
GROUP = 32  # input features with a scale of their own, in activations and in quantised weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupedActivation:
    """Activations in 8 bits with a scale per group of features, padded with 0 to whole groups.

    x ≈ unit * value with int8 values of -127 .. 127. Where the scale of a group is well above its
    token's mean, x ≈ unit * (128 * value + remainder): few features of a decoder are far larger
    than the others (Dettmers et al., 2022), and these would lose most in one byte.
    Every implementation gives the same bytes.
    """

    # uint8 [num_tokens, num_groups, 76]: 32 values, 32 remainders, float32 unit, float32 sum of
    # the features, int32 1 where there are remainders
    groups: Tensor
    num_features: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenActivation:
    """Activations in 8 bits with one scale a token, as matrix units of GPUs multiply them.

    x ≈ values * scale; scales are as `pagewire.kernels.kv_pool.quantize_vectors` makes them.
    """

    values: Tensor  # int8 or float8_e4m3fn [num_tokens, num_features]
    scales: Tensor  # float32 [num_tokens]


QuantizedActivation = GroupedActivation | TokenActivation  # each device knows one of them
Activation = Tensor | QuantizedActivation


class Linear(Protocol):
    """A matrix with its bias, stored as its implementation multiplies it fastest."""

    @property
    def takes_quantized(self) -> bool:
        """Whether it wants a QuantizedActivation, which the operation before it then makes."""

    @property
    def num_bytes(self) -> int:
        """Memory that the stored matrix and its bias take."""

    def __call__(self, x: Activation) -> Tensor:
        """x: [num_tokens, in_features]; returns [num_tokens, out_features].

        In the model's dtype or, where the matrix was made to give logits, in float32.

        Raises TypeError for the kind of activation that it does not take.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionBatch:
    """The rows of one step as attention sees them: ragged queries over paged contexts.

    The tokens of a row are the last of its context: token i of a row with q tokens and a context
    of c sits at position c - q + i and sees the positions up to its own.
    """

    cu_seqlens: Tensor  # int32 [num_rows + 1], where each row's tokens start; the last is the end
    context_lens: Tensor  # int32 [num_rows], tokens in the pool once this step's are stored
    page_table: Tensor  # int32 [num_rows, max_pages], 0 behind the pages of a row
    positions: Tensor  # int64 [num_tokens], in the sequence
    slots: Tensor  # int64 [num_tokens], page * page_size + offset: where the KV is stored
    page_size: int


class AttentionPlan(Protocol):
    """Attention of one step, prepared once and run in every layer."""

    def run(self, q: Tensor, pool: KVPool, layer: int) -> Tensor:
        """Attend over the context of each row, this step's tokens included.

        q: [num_tokens, num_heads, head_dim]. Returns [num_tokens, num_heads, head_dim].
        """


class RenewablePlan(AttentionPlan, Protocol):
    """A plan that recorded steps read."""

    @property
    def has_run(self) -> bool:
        """Whether its first run, which cannot be recorded, lies behind it."""

    def renew(self, batch: AttentionBatch) -> None:
        """Take the rows of another step, for replays too; so many tokens as the replayed step has.

        Where a recorder has buckets, also fewer: rows of padding follow those of `batch`. Raises
        RuntimeError before the first run.
        """


class NotRecordableError(Exception):
    """A step does something that a recording of it would not do again."""

    def __init__(self, operation: str) -> None:
        super().__init__(f"{operation} cannot be recorded")


class Recording(Protocol):
    """A recorded step."""

    @property
    def output(self) -> Tensor:
        """Where runs leave their result: the recorded one too, if the recorder lets it compute."""

    def replay(self) -> Tensor:
        """Run it again on what its inputs hold now. The result is void at the next replay."""


class StepRecorder(Protocol):
    """Makes recordings of steps."""

    @property
    def buckets(self) -> Sequence[int]:
        """For how many rows recordings are made, ascending, with padding where there are fewer.

        Empty: for any number, without padding, from a step of so many.
        """

    def plan_attention(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> RenewablePlan:
        """As `Ops.plan_attention`."""

    def record(self, step: Callable[[], Tensor]) -> Recording:
        """Keep what a step does to the tensors that it reads, at their addresses.

        One without buckets runs the step for it. Raises NotRecordableError.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingRows:
    """How the next token of each row of logits is chosen; in the logits' memory.

    Top-p counts among what top-k keeps. Each of the three keeps the tokens above a threshold, so a
    token as likely as the last that is kept is kept too.
    """

    temperature: Tensor  # float32 [num_rows], 0: the first of the most likely tokens, else >= 1e-30
    top_k: Tensor  # int64 [num_rows], 1 to vocab_size, which keeps all
    top_p: Tensor  # float64 [num_rows], above 0; 1 keeps all
    min_p: Tensor  # float32 [num_rows], of the most likely token's probability, 0 to 1
    vocab_size: int


class LogitsError(ValueError):
    """From some logits no token can be chosen: they hold NaN, or no finite maximum."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(
            f"the logits of rows {', '.join(map(str, rows))} hold NaN or have no finite maximum: "
            "the model overflowed or its weights are damaged; try dtype float32, or fetch the "
            "model again"
        )
        self.rows = rows


class SamplingPlan(Protocol):
    """The choice of tokens for a batch of the same composition, prepared once for many steps."""

    def run(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The token of each row, int64 [num_rows]; FAULTY where NaN or no finite maximum is.

        They are where the logits are, and nobody waits for them.
        logits: float32 [num_rows, vocab_size], contiguous; uniform: float64 [num_rows], a random
        number of [0, 1) a row, which says at which share of the cumulative probability, in the
        order of token ids, the token lies. Implementations agree unless that share, or a threshold,
        lies within the rounding of float32 sums.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Logprobs:
    """Natural logarithms of probabilities, of single tokens and of the most likely ones."""

    sampled: Tensor  # float64 [num_rows]
    top_ids: Tensor  # int64 [num_rows, num_top], the most likely first
    top: Tensor  # float64 [num_rows, num_top]


class Ops(Protocol):
    """What a decoder computes with, matrices aside: those are `Linear`.

    Reductions accumulate in float32 or better. With `quantize` an operation returns what
    `Ops.quantize` would make of its result, and that has two dimensions.
    """

    @property
    def recorder(self) -> StepRecorder | None:
        """None: steps cannot be recorded."""

    def quantize(self, x: Tensor) -> QuantizedActivation:
        """As the quantised matrices of the device take it; x: [num_tokens, dim]."""

    @overload
    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, quantize: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool) -> Activation: ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool = False
    ) -> Activation:
        """Normalise the last dimension; x: [..., dim], weight: [dim]."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, quantize: bool = False
    ) -> tuple[Activation, Tensor]:
        """(rms_norm(x + residual), x + residual); may overwrite `residual` with the sum."""

    def silu_mul(self, gate_up: Tensor, *, quantize: bool = False) -> Activation:
        """silu(gate) * up; gate_up: [num_tokens, 2 * dim], gate first; returns [.., dim]."""

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor],
        pool: KVPool,
        layer: int,
        slots: Tensor,
    ) -> Tensor:
        """Rotate q and k, write k and v into their slots of the pool, return the rotated q.

        q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim];
        rope: cosine and sine, float32 [num_tokens, head_dim / 2], for the halves of a head; slots:
        as in AttentionBatch. A pool in 8 bits stores k and v of each token and head as `quantize`
        would. Raises ValueError for a pool of another floating dtype than k and v.
        """

    def plan_attention(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> AttentionPlan:
        """Prepare attention with scores q·k * scale.

        With a `window` a token sees itself and the window - 1 positions before it.
        """

    def plan_sampling(self, rows: SamplingRows) -> SamplingPlan:
        """Prepare the choice of one token a row."""

    def logprobs(self, logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        """The log-softmax of some rows, at one token each and at the `num_top` most likely.

        logits: float32 [.., vocab_size], contiguous; rows: int64 [num_rows], indices of those that
        are asked for; tokens: int64 [num_rows], on any device.
        """
