"""A worker's state as metrics in Ray's dashboard.

The vllm_ names are those that Ray's own board for serving queries; what vLLM has no name for is
called pagewire_.
"""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from pagewire.proto import worker_pb2 as pb
from pagewire.worker.config import WorkerConfig

_TAGS = ("role", "worker", "model_name")


class RayMetrics:
    """Made in the worker's actor; `report` is called with each new state."""

    def __init__(self, config: WorkerConfig) -> None:
        self._tags = {
            "role": config.role.value,
            "worker": config.name,
            "model_name": config.served_model,
        }
        self._running = _gauge("vllm_num_requests_running", "sequences in the step loop")
        self._waiting = _gauge("vllm_num_requests_waiting", "requests that have not started")
        self._usage = _gauge("vllm_kv_cache_usage_perc", "share of pages in use, 0 to 1")
        self._pages = _gauge("pagewire_pages", "pages by state", "state")
        self._prompt_tokens = _Total("vllm_prompt_tokens_total", "prompt tokens computed")
        self._generated_tokens = _Total("vllm_generation_tokens_total", "tokens sampled")
        self._drafted_tokens = _Total(
            "vllm_spec_decode_num_draft_tokens_total", "drafted tokens that were checked"
        )
        self._accepted_tokens = _Total(
            "vllm_spec_decode_num_accepted_tokens_total", "drafted tokens that were right"
        )
        self._bytes = _Total(
            "pagewire_kv_transfer_bytes_total", "payload bytes", "transport", "direction"
        )
        self._seconds = _Total(
            "pagewire_kv_transfer_seconds_total", "time in transfers", "transport", "direction"
        )

    def report(self, state: pb.WorkerState) -> None:
        """Export `state`."""
        pages = state.pages
        self._running.set(state.running, self._tags)
        self._waiting.set(state.queued, self._tags)
        self._usage.set(1 - pages.free / pages.total if pages.total else 0.0, self._tags)
        for name in ("free", "cached", "owned", "pinned", "quarantined"):
            self._pages.set(getattr(pages, name), self._tags | {"state": name})
        self._prompt_tokens.set(state.prompt_tokens, self._tags)
        self._generated_tokens.set(state.generated_tokens, self._tags)
        self._drafted_tokens.set(state.drafted_tokens, self._tags)
        self._accepted_tokens.set(state.accepted_tokens, self._tags)
        for transfer in state.transfers:
            sent = self._tags | {"transport": transfer.kind, "direction": "sent"}
            received = sent | {"direction": "received"}
            self._bytes.set(transfer.bytes_sent, sent)
            self._bytes.set(transfer.bytes_received, received)
            self._seconds.set(transfer.send_seconds, sent)
            self._seconds.set(transfer.receive_seconds, received)


def _gauge(name: str, description: str, *tags: str) -> Gauge:
    return Gauge(name, description, tag_keys=(*_TAGS, *tags))


class _Total:
    """A counter that is told totals, of which Ray's is told the differences."""

    def __init__(self, name: str, description: str, *tags: str) -> None:
        self._counter = Counter(name, description, tag_keys=(*_TAGS, *tags))
        self._totals: dict[tuple[str, ...], float] = {}

    def set(self, total: float, tags: Mapping[str, str]) -> None:
        key = tuple(tags.values())
        difference = total - self._totals.get(key, 0.0)
        if difference > 0:  # Ray refuses to count by nothing
            self._counter.inc(difference, dict(tags))
            self._totals[key] = total
