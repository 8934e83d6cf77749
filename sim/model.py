"""A model that a simulation can check: its tokens depend on every byte of KV and on the seed alone.

Attention is a weighted sum over all words of the sequence's pages. A page that is stale, missing,
in the wrong place or somebody else's changes the token.
"""

from collections.abc import Sequence

from pagewire.engine.batch import Batch, BatchRow, StepResult
from pagewire.engine.sampling_params import SamplingParams
from pagewire.sim.kv_memory import LANES, LAYOUT, KvMemory

VOCAB_SIZE = 50_000
_MASK = 0xFFFFFFFF
_LANE_STEP = 0x9E3779B9


class SimModel:
    """Runs batches over one worker's pages."""

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory

    def execute(self, batch: Batch) -> StepResult:
        """Copy pages and write the KV of every row; sample where the row says so."""
        for source, destination in batch.copies:
            self._memory.copy(source, destination)
        self.compute_layers(batch, LAYOUT.num_layers)
        return StepResult(tokens=tuple(self._sample(row) for row in batch.rows))

    def compute_layers(self, batch: Batch, num_layers: int) -> None:
        """Write the KV of every row in the first `num_layers` layers: what a step does on its way.

        A step that runs again writes the same.
        """
        for row in batch.rows:
            self._compute(row, range(2 * num_layers))

    def _compute(self, row: BatchRow, lanes: range) -> None:
        state = self._memory.read(row.page_table, row.start - 1, 0) if row.start else 0
        for position, token in enumerate(row.token_ids, row.start):
            state = _mix(state ^ token)
            for lane in lanes:
                word = (state + lane * _LANE_STEP) & _MASK  # lane 0 holds the state itself
                self._memory.write(row.page_table, position, lane, word)

    def _sample(self, row: BatchRow) -> tuple[int, ...]:
        if row.sampling is None:
            return ()
        attended = self._attend(row.page_table, row.start + len(row.token_ids))
        params = (row.sampling, *row.siblings)
        return tuple(_mix(attended ^ (each.seed & _MASK)) % VOCAB_SIZE for each in params)

    def _attend(self, page_table: Sequence[int], num_tokens: int) -> int:
        total = 0
        for index in range(LAYOUT.num_pages(num_tokens)):
            num_slots = min(LAYOUT.page_size, num_tokens - index * LAYOUT.page_size)
            for lane in range(LANES):
                weight = index * LANES + lane + 1
                total += weight * self._memory.lane_sum(page_table[index], lane, num_slots)
        return _mix(total & _MASK)


def reference_tokens(prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """The output of one worker that does nothing else: what every stream must equal."""
    num_pages = LAYOUT.num_pages(len(prompt) + sampling.max_tokens)
    model = SimModel(KvMemory(num_pages))
    output: list[int] = []
    inputs, start = list(prompt), 0
    while len(output) < sampling.max_tokens:
        row = BatchRow(
            request_id="reference",
            token_ids=inputs,
            start=start,
            page_table=range(num_pages),
            sampling=sampling,
        )
        ((token,),) = model.execute(Batch(rows=(row,))).tokens
        output.append(token)
        start += len(inputs)
        inputs = [token]
        if token in sampling.stop_token_ids:
            break
    return output


def _mix(value: int) -> int:
    """A 32-bit hash."""
    value = ((value ^ (value >> 16)) * 0x45D9F3B) & _MASK
    value = ((value ^ (value >> 16)) * 0x45D9F3B) & _MASK
    return value ^ (value >> 16)
