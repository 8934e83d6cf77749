"""What `pagewire serve` says: a line per long step, and the banner at the end.

On a terminal the step that runs has a spinner; into a file or a pipe go plain lines.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

import pagewire


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """One worker, as the banner shows it."""

    name: str
    pid: int
    device: str
    num_pages: int
    page_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Banner:
    """An instance that is ready."""

    model: str
    precision: str  # of the model and its KV cache
    workers: Sequence[WorkerLine]
    transport: str  # what carries KV pages, best first, with the reason where it is not the best
    url: str
    dashboard_url: str | None
    ready_s: float  # from the start of the process to the first token

    def lines(self) -> Iterator[str]:
        """The text, line by line."""
        yield f"Pagewire {pagewire.__version__}"
        yield f"  model      {self.model} ({self.precision})"
        for worker in self.workers:
            yield (
                f"  {worker.name:<9}  pid {worker.pid}, {worker.device}, "
                f"{worker.num_pages} pages of {worker.page_size} tokens"
            )
        yield f"  transport  {self.transport}"
        yield f"  API        {self.url}/v1"
        if self.dashboard_url is not None:
            yield f"  Ray        {self.dashboard_url}"
        yield (
            f"  try        curl {self.url}/v1/chat/completions -H 'Content-Type: application/json' "
            '-d \'{"model": "default", "temperature": 0, "max_tokens": 64, "messages": '
            '[{"role": "user", "content": "What is the capital of France?"}]}\''
        )
        yield f"ready in {self.ready_s:.1f} s; Ctrl-C stops everything"


class Terminal:
    """Writes to `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show that `what` goes on, and once it is done, how long it took."""
        start = time.monotonic()
        if self._console.is_terminal:
            with self._console.status(what):
                yield
        else:
            self.say(f"{what} …")
            yield
        self.say(f"{what}: {time.monotonic() - start:.1f} s")

    def say(self, line: str) -> None:
        # Not wrapped, so that a command can be copied, and not coloured by what looks like markup.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, banner: Banner) -> None:
        self.say("")
        for line in banner.lines():
            self.say(line)
