"""Which sequences a decode step runs. Pure."""

from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.worker.identity import AttemptKey


class DecodeScheduler:
    """Continuous batching: sequences join and leave the running batch at every step.

    Ready sequences beyond the largest batch wait in the order in which they became ready.
    """

    def __init__(self, max_batch_size: int) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self._max_batch_size = max_batch_size
        self._sequences: dict[AttemptKey, DecodeSequence] = {}  # in order of becoming ready

    @property
    def num_running(self) -> int:
        return min(len(self._sequences), self._max_batch_size)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - self.num_running

    def add(self, sequence: DecodeSequence) -> None:
        self._sequences[sequence.key] = sequence

    def remove(self, sequence: DecodeSequence) -> None:
        """Forget a sequence, whether it runs, waits or is unknown."""
        self._sequences.pop(sequence.key, None)

    def schedule(self) -> list[DecodeSequence]:
        """The sequences of the next step, one token each."""
        batch: list[DecodeSequence] = []
        for sequence in self._sequences.values():
            if len(batch) == self._max_batch_size:
                break
            batch.append(sequence)
        return batch
