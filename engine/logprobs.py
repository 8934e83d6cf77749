"""Log probabilities of a step's rows, in the form that schedulers pass on."""

from collections.abc import Mapping

from pagewire.engine.batch import TokenLogprobs
from pagewire.engine.host_copies import HostCopy
from pagewire.kernels.ops import Logprobs


class PendingLogprobs:
    """Log probabilities on their way to the host."""

    def __init__(self, values: Logprobs, num_top: Mapping[int, int]) -> None:
        """`num_top`: how many tokens each row of `values` asked for, by its index in the step."""
        self._copies = tuple(map(HostCopy, (values.sampled, values.top_ids, values.top)))
        self._num_top = num_top

    def wait(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        """By index in the step, one entry each, once they are there."""
        columns = (copy.wait().tolist() for copy in self._copies)
        return {
            row: (TokenLogprobs(logprob=logprob, top=tuple(zip(ids[:n], top[:n], strict=True))),)
            for (row, n), logprob, ids, top in zip(self._num_top.items(), *columns, strict=True)
        }
