"""The Prometheus metrics of a router, under its own names and under vLLM's.

Counters and histograms live in a registry of the router; gauges about requests and workers are
taken from the dispatcher when somebody asks, so a worker that is gone leaves no series behind.
Labels come from fixed sets and worker names; nothing that a client wrote is among them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from pagewire.router.request import TokenUpdate, WorkerView
from pagewire.router.time_ledger import Part, TimeLedger, TimeSplit

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5)
_PART_SECONDS = (0.0001, 0.0005, *_GAP_SECONDS, 10, 30, 60, 120, 300, 600)
_TOKENS = tuple(2**n for n in range(18))

# Our name -> vLLM's, of the same meaning, so that dashboards and schedulers made for it work.
_VLLM_NAMES = {
    "pagewire_requests_running": "vllm:num_requests_running",
    "pagewire_requests_waiting": "vllm:num_requests_waiting",
    "pagewire_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "pagewire_prompt_tokens": "vllm:prompt_tokens",
    "pagewire_generation_tokens": "vllm:generation_tokens",
    "pagewire_prefix_cache_queries": "vllm:prefix_cache_queries",
    "pagewire_prefix_cache_hits": "vllm:prefix_cache_hits",
    "pagewire_requests_finished": "vllm:request_success",
    "pagewire_worker_drafted_tokens": "vllm:spec_decode_num_draft_tokens",
    "pagewire_worker_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "pagewire_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "pagewire_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "pagewire_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "pagewire_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "pagewire_request_prompt_tokens": "vllm:request_prompt_tokens",
    "pagewire_request_generation_tokens": "vllm:request_generation_tokens",
}
_PARTS = "pagewire_request_part_seconds"
_VLLM_PARTS = {
    Part.QUEUE: "vllm:request_queue_time_seconds",
    Part.PREFILL: "vllm:request_prefill_time_seconds",
}


class RouterMetrics:
    """What one router counts."""

    def __init__(self, model_name: str, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.model_name = model_name
        self._registry = CollectorRegistry()
        self._http_responses = Counter(
            "pagewire_http_responses",
            "HTTP responses by endpoint and status.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._finished = Counter(
            "pagewire_requests_finished",
            "Requests that ended, by stop, length, abort (client gone) or error.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.cache_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."
        )
        self.cache_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens that were in the prefix cache."
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two updates of one choice.", _GAP_SECONDS
        )
        self.per_output_token = self._histogram(
            "time_per_output_token_seconds", "Mean time per token after the first.", _GAP_SECONDS
        )
        self.latency = self._histogram(
            "request_latency_seconds", "From arrival to the end of a request.", _SECONDS
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of one request.", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for one request.", _TOKENS
        )

        parts = Histogram(
            _PARTS,
            "Where the time of requests that got tokens went: the parts of their latency.",
            ["model_name", "part"],
            buckets=_PART_SECONDS,
            registry=self._registry,
        )
        self.parts = {part: parts.labels(model_name, part.value) for part in Part}

    def count_response(self, endpoint: str, status: int) -> None:
        """Count an HTTP response. `endpoint` is a route of the app, never a path as received."""
        self._http_responses.labels(endpoint, str(status)).inc()

    def count_finished(self, reason: str) -> None:
        """Count a request that ended by stop, length, abort or error."""
        self._finished.labels(self.model_name, reason).inc()

    def render(
        self,
        counts: Mapping[str, int],
        retries: Mapping[str, int],
        workers: Sequence[WorkerView],
    ) -> bytes:
        """The metrics page, in Prometheus' text format."""
        families = [
            *self._registry.collect(),
            *_request_gauges(self.model_name, counts),
            _retries(self.model_name, retries),
            _cache_usage(self.model_name, workers),
            *_worker_families(workers),
        ]
        aliases = [_under_vllm_name(each) for each in families if each.name in _VLLM_NAMES]
        aliases += [
            _part_under_vllm_name(each, part)
            for each in families
            for part in _VLLM_PARTS
            if each.name == _PARTS
        ]
        return generate_latest(_Page([*families, *aliases]))

    def _counter(self, name: str, help_text: str) -> Counter:
        counter = Counter(f"pagewire_{name}", help_text, ["model_name"], registry=self._registry)
        return counter.labels(self.model_name)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"pagewire_{name}",
            help_text,
            ["model_name"],
            buckets=buckets,
            registry=self._registry,
        )
        return histogram.labels(self.model_name)


class RequestMetrics:
    """Follows one request from its arrival to its end."""

    def __init__(self, metrics: RouterMetrics, *, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived  # seconds on the clock of `metrics`
        self._choices: dict[int, _ChoiceTimes] = {}
        self._ledger = TimeLedger(arrived=arrived)
        self.split: TimeSplit | None = None  # set when the request has finished

    def submit(self) -> None:
        """The request is valid and goes to the dispatcher."""
        self._ledger.submit(self._metrics.clock())

    def update(self, update: TokenUpdate) -> None:
        """Something of the request arrived."""
        self._ledger.record(update.times, self._metrics.clock())

    def tokens(self, count: int, choice: int = 0) -> None:
        """New tokens of one choice arrived."""
        now = self._metrics.clock()
        if not self._choices:
            self._metrics.first_token.observe(now - self._arrived)
        if choice in self._choices:
            self._metrics.inter_token.observe(now - self._choices[choice].last)
        times = self._choices.setdefault(choice, _ChoiceTimes(first=now, last=now))
        times.last = now
        times.num_tokens += count

    def finish(self, reason: str, *, num_prompt_tokens: int, num_cached_tokens: int = 0) -> None:
        """The request ended by stop, length, abort or error."""
        metrics = self._metrics
        metrics.count_finished(reason)
        metrics.prompt_tokens.inc(num_prompt_tokens)
        num_tokens = sum(times.num_tokens for times in self._choices.values())
        metrics.generation_tokens.inc(num_tokens)
        metrics.request_prompt_tokens.observe(num_prompt_tokens)
        metrics.request_generation_tokens.observe(num_tokens)
        self.split = self._ledger.close(metrics.clock())
        metrics.latency.observe(self.split.total_s)
        if not self._choices:
            return
        metrics.cache_queries.inc(num_prompt_tokens)
        metrics.cache_hits.inc(num_cached_tokens)
        for part, seconds in self.split.parts.items():
            metrics.parts[part].observe(seconds)
        for times in self._choices.values():
            if times.num_tokens > 1:
                decoding_s = times.last - times.first
                metrics.per_output_token.observe(decoding_s / (times.num_tokens - 1))


@dataclass(slots=True, kw_only=True)
class _ChoiceTimes:
    """When tokens of one choice arrived, in seconds on the clock of the metrics."""

    first: float
    last: float
    num_tokens: int = 0


class _Page(Collector):
    """Metric families that are already collected."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _under_vllm_name(family: Metric) -> Metric:
    name = _VLLM_NAMES[family.name]
    alias = Metric(name, family.documentation, family.type)
    alias.samples = [
        Sample(name + sample.name.removeprefix(family.name), *sample[1:])
        for sample in family.samples
    ]
    return alias


def _part_under_vllm_name(family: Metric, part: Part) -> Metric:
    """One part of all, which has a family of its own there."""
    name = _VLLM_PARTS[part]
    alias = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        labels = {key: value for key, value in sample.labels.items() if key != "part"}
        if sample.labels["part"] == part.value:
            alias.samples.append(
                Sample(name + sample.name.removeprefix(family.name), labels, *sample[2:])
            )
    return alias


def _request_gauges(model_name: str, counts: Mapping[str, int]) -> Iterable[Metric]:
    states = GaugeMetricFamily(
        "pagewire_requests", "Requests by state.", labels=["model_name", "state"]
    )
    for state, count in counts.items():
        states.add_metric([model_name, state], count)
    waiting = counts.get("queued", 0)
    yield states
    yield _gauge("pagewire_requests_waiting", "Requests in the queue.", model_name, waiting)
    running = sum(counts.values()) - waiting
    yield _gauge("pagewire_requests_running", "Requests at a worker.", model_name, running)


def _retries(model_name: str, retries: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(
        "pagewire_retries",
        "Attempts after a failure: prompts dispatched again, and parked prompts repointed.",
        labels=["model_name", "kind"],
    )
    for kind, count in retries.items():
        family.add_metric([model_name, kind], count)
    return family


def _cache_usage(model_name: str, workers: Sequence[WorkerView]) -> Metric:
    pages = [each.state.pages for each in workers if each.role == "decode"]
    total = sum(each.total for each in pages)
    used = total - sum(each.free + each.cached for each in pages)
    help_text = "Part of the pages of all decode workers that requests use, 0 to 1."
    usage = used / total if total else 0.0
    return _gauge("pagewire_kv_cache_usage_ratio", help_text, model_name, usage)


def _gauge(name: str, help_text: str, model_name: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=["model_name"])
    family.add_metric([model_name], value)
    return family


def _worker_families(workers: Sequence[WorkerView]) -> Iterable[Metric]:
    up = GaugeMetricFamily(
        "pagewire_worker_up", "1 when the worker answered just now.", labels=["worker", "role"]
    )
    for worker in workers:
        up.add_metric([worker.name, worker.role], worker.is_responding)
    yield up
    yield _worker_pages(workers)
    gauges = {
        "queued": "Requests that have not started.",
        "running": "Sequences in the step loop.",
        "handoffs": "Hand-offs under way.",
        "parked_pages": "Pages of computed or parked prompts that wait for a decode worker.",
        "queued_tokens": "Prompt tokens not yet computed.",
    }
    for field, help_text in gauges.items():
        gauge = GaugeMetricFamily(f"pagewire_worker_{field}", help_text, labels=["worker", "role"])
        for worker in workers:
            gauge.add_metric([worker.name, worker.role], getattr(worker.state, field))
        yield gauge
    counters = {
        "prompt_tokens": "Prompt tokens computed.",
        "generated_tokens": "Tokens generated.",
        "drafted_tokens": "Drafted tokens that decode steps have checked.",
        "accepted_tokens": "Drafted tokens that were right.",
        "dropped_messages": "Messages that were not for a known attempt.",
    }
    for field, help_text in counters.items():
        counter = CounterMetricFamily(
            f"pagewire_worker_{field}", help_text, labels=["worker", "role"]
        )
        for worker in workers:
            counter.add_metric([worker.name, worker.role], getattr(worker.state, field))
        yield counter
    yield from _transfer_families(workers)


def _worker_pages(workers: Sequence[WorkerView]) -> Metric:
    family = GaugeMetricFamily(
        "pagewire_worker_pages", "KV pages by state.", labels=["worker", "role", "state"]
    )
    for worker in workers:
        for state in ("free", "cached", "owned", "pinned", "quarantined"):
            labels = [worker.name, worker.role, state]
            family.add_metric(labels, getattr(worker.state.pages, state))
    return family


def _transfer_families(workers: Sequence[WorkerView]) -> Iterable[Metric]:
    labels = ["worker", "transport"]
    moved = CounterMetricFamily(
        "pagewire_kv_transfer_bytes", "KV bytes moved.", labels=[*labels, "direction"]
    )
    seconds = CounterMetricFamily(
        "pagewire_kv_transfer_seconds", "Time spent moving KV.", labels=[*labels, "direction"]
    )
    failures = CounterMetricFamily(
        "pagewire_kv_transfer_failures", "Transfers that failed.", labels=labels
    )
    trips = CounterMetricFamily(
        "pagewire_kv_transport_trips",
        "Times that a pair of workers gave a transport up for another, or for a time.",
        labels=labels,
    )
    for worker in workers:
        for totals in worker.state.transfers:
            key = [worker.name, totals.kind]
            moved.add_metric([*key, "sent"], totals.bytes_sent)
            moved.add_metric([*key, "received"], totals.bytes_received)
            seconds.add_metric([*key, "sent"], totals.send_seconds)
            seconds.add_metric([*key, "received"], totals.receive_seconds)
            failures.add_metric(key, totals.failures)
            trips.add_metric(key, totals.trips)
    return [moved, seconds, failures, trips, _links(workers)]


def _links(workers: Sequence[WorkerView]) -> Metric:
    """By name of the peer: incarnations would make a new series with each restart."""
    family = GaugeMetricFamily(
        "pagewire_kv_link",
        "1 for the transport that a pair of workers uses, 0 for one that it gave up for a time.",
        labels=["worker", "peer", "transport"],
    )
    names = {worker.incarnation: worker.name for worker in workers}
    for worker in workers:
        for link in worker.state.links:
            peer = names.get(link.peer.hex())
            if peer is None:  # it has gone
                continue
            family.add_metric([worker.name, peer, link.transport], 1)
            for each in link.given_up:
                family.add_metric([worker.name, peer, each.transport], 0)
    return family
