"""What speculative decoding gains where text is copied, and what it costs where it is not.

Runs the default model in this process, one thread, and counts the processor time of that thread, so
that other work on the machine matters little. With and without drafts alternate; the medians of
their rates are compared. A text that begins again with one word changed stands for edits and
summaries: the model goes on to copy it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from harness.table import markdown_table
from pagewire.cluster.placement import MAX_DRAFT_TOKENS
from pagewire.decode_worker.drafting import Drafting, Speculation
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.draft_length import DraftCosts
from pagewire.engine.draft_model import DraftModel
from pagewire.engine.load import load_engine
from pagewire.engine.load_draft import load_draft_model
from pagewire.engine.loading.resolve import resolve_model
from pagewire.engine.measure_drafts import measure_costs
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.precision import default_dtype
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams
from pagewire.router.tokenizer import Tokenizer
from pagewire.router.tokenizer_loading import load_tokenizer

MAX_MODEL_LEN = 512
PAGE_SIZE = 64
QUICK_TOKENS = 48
SENTENCES = (
    "The harbour of Lisbon opens to the west, and ships have left it for five hundred years.",
    "A ferry crosses the river every twenty minutes and carries bicycles free of charge.",
    "In 1755 an earthquake destroyed most of the houses near the water.",
    "The castle on the hill was built by the Moors and is open until nine in the evening.",
    "Yellow trams climb the narrow streets, and number 28 passes the cathedral.",
    "Bakers near the monastery sell small tarts with cinnamon, still warm, from six o'clock.",
    "The aqueduct brought water from the hills over thirty-five stone arches.",
    "On clear days you can see the bridge, the far bank and the open sea.",
)
SUBJECTS = (
    "a lighthouse keeper",
    "why the sky is blue",
    "how bread is made",
    "a dog that learned to swim",
    "the history of chess",
    "what makes a good teacher",
    "a winter in the mountains",
    "how plants find light",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked, and how answers are sampled."""

    name: str
    prompts: tuple[str, ...]
    temperature: float
    max_tokens: int


COPY = Load(
    name="copy",
    prompts=tuple(
        " ".join((SENTENCES[0], *SENTENCES[first:], *SENTENCES[1:first]))
        + "\n\n"
        + SENTENCES[0].replace("Lisbon", "Porto")
        for first in (1, 2, 3, 4, 5, 6, 7, 1)
    ),
    temperature=0.0,
    max_tokens=100,
)
FREE = Load(
    name="free text",
    prompts=tuple(
        f"<|im_start|>user\nWrite about {subject}.<|im_end|>\n<|im_start|>assistant\n"
        for subject in SUBJECTS
    ),
    temperature=0.8,
    max_tokens=160,
)


@dataclass(slots=True, kw_only=True)
class Stream:
    """One answer on its way."""

    prompt: list[int]
    sampling: SamplingParams
    pages: range
    drafting: Drafting | None
    output: list[int] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        is_over = self.output and self.output[-1] in self.sampling.stop_token_ids
        return 0 if is_over else self.sampling.max_tokens - len(self.output)

    def next_row(self) -> BatchRow:
        drafts = self.drafting.token_ids if self.drafting else ()
        return BatchRow(
            request_id="bench",
            token_ids=(self.output[-1], *drafts),
            start=len(self.prompt) + len(self.output) - 1,
            page_table=self.pages,
            sampling=self.sampling,
            output_position=len(self.output),
            num_drafts=len(drafts),
            draft_work=self.drafting.work if self.drafting else None,
        )

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.num_left:
                self.output.append(token)
                if self.drafting is not None:
                    self.drafting.extend(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The decode steps of all answers to a load."""

    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Decoding with drafts against decoding without, on one load."""

    quantization: Quantization
    drafts: str
    load: str
    num_streams: int
    plain_rate: float  # tokens per second of processor time
    rate: float
    tokens_per_step: float  # and stream
    accepted: float  # of the drafted tokens

    @property
    def ratio(self) -> float:
        return self.rate / self.plain_rate


def generate(
    runner: ModelRunner,
    streams: Sequence[Stream],
    speculation: Speculation | None,
    draft_model: DraftModel | None,
) -> Run:
    """Prefill the streams one by one, then decode them together until all are over."""
    for stream in streams:
        row = BatchRow(
            request_id="bench",
            token_ids=stream.prompt,
            start=0,
            page_table=stream.pages,
            sampling=stream.sampling,
        )
        stream.append(runner.execute(Batch(rows=(row,))).tokens[0])
    num_steps = num_drafted = num_accepted = 0
    started = time.thread_time()
    while running := [stream for stream in streams if stream.num_left]:
        if speculation is not None:
            speculation.plan(
                [stream.drafting for stream in running], [stream.num_left for stream in running]
            )
        batch = Batch(rows=tuple(stream.next_row() for stream in running))
        if draft_model is not None:
            batch = draft_model.add_drafts(batch)
        result = runner.execute(batch)
        num_steps += len(running)
        for stream, tokens in zip(running, result.tokens, strict=True):
            if stream.drafting is not None:
                num_drafted += stream.drafting.num_drafts
                num_accepted += len(tokens) - 1
                stream.drafting.on_step(len(tokens) - 1)
            stream.append(tokens)
    return Run(
        num_tokens=sum(len(stream.output) - 1 for stream in streams),
        num_steps=num_steps,
        num_drafted=num_drafted,
        num_accepted=num_accepted,
        seconds=time.thread_time() - started,
    )


def make_streams(
    tokenizer: Tokenizer,
    load: Load,
    num_streams: int,
    max_tokens: int,
    speculation: Speculation | None,
) -> list[Stream]:
    streams = []
    pages_each = -(-MAX_MODEL_LEN // PAGE_SIZE)
    for index, text in enumerate(load.prompts[:num_streams]):
        prompt = tokenizer.encode(text)
        sampling = SamplingParams(
            max_tokens=min(max_tokens, load.max_tokens),
            temperature=load.temperature,
            seed=index,
            stop_token_ids=tokenizer.config.eos_token_ids,
        )
        streams.append(
            Stream(
                prompt=prompt,
                sampling=sampling,
                pages=range(index * pages_each, (index + 1) * pages_each),
                drafting=speculation.drafting(prompt, sampling) if speculation else None,
            )
        )
    return streams


def compare(
    runner: ModelRunner,
    draft_model: DraftModel | None,
    costs: DraftCosts,
    tokenizer: Tokenizer,
    load: Load,
    *,
    num_streams: int,
    num_rounds: int,
    max_tokens: int,
    quantization: Quantization,
) -> Result:
    """Alternate decoding with and without drafts."""
    speculation = Speculation(
        max_draft_tokens=MAX_DRAFT_TOKENS,
        costs=costs,
        draft_model_len=draft_model.runner.max_model_len if draft_model else None,
    )
    plain, drafted = [], []
    for _ in range(num_rounds):
        streams = make_streams(tokenizer, load, num_streams, max_tokens, None)
        plain.append(generate(runner, streams, None, None))
        streams = make_streams(tokenizer, load, num_streams, max_tokens, speculation)
        drafted.append(generate(runner, streams, speculation, draft_model))
    last = drafted[-1]
    return Result(
        quantization=quantization,
        drafts=f"model, {costs.per_draft:.2f}" if draft_model else "ngram",
        load=load.name,
        num_streams=num_streams,
        plain_rate=median(run.num_tokens / run.seconds for run in plain),
        rate=median(run.num_tokens / run.seconds for run in drafted),
        tokens_per_step=last.num_tokens / last.num_steps,
        accepted=last.num_accepted / max(1, last.num_drafted),
    )


def measure(
    quantizations: Sequence[Quantization],
    *,
    dtype: str,
    with_model: bool,
    num_rounds: int,
    max_tokens: int,
) -> list[Result]:
    path = resolve_model(None)
    tokenizer = load_tokenizer(path)
    results = []
    for quantization in quantizations:
        runner = load_engine(
            path,
            dtype=dtype,
            quantization=quantization,
            page_size=PAGE_SIZE,
            num_pages=len(COPY.prompts) * -(-MAX_MODEL_LEN // PAGE_SIZE),
            max_model_len=MAX_MODEL_LEN,
            num_threads=1,
        )
        draft_models: list[DraftModel | None] = [None]
        if with_model:
            draft_models.append(
                load_draft_model(path, runner, dtype=dtype, quantization=Quantization.INT4)
            )
        for draft_model in draft_models:
            costs = measure_costs(runner, draft_model.runner if draft_model else None)
            for load in (COPY, FREE):
                for num_streams in (1, 8):
                    result = compare(
                        runner,
                        draft_model,
                        costs,
                        tokenizer,
                        load,
                        num_streams=num_streams,
                        num_rounds=num_rounds,
                        max_tokens=max_tokens,
                        quantization=quantization,
                    )
                    results.append(result)
    return results


def table(results: Sequence[Result]) -> str:
    header = (
        "matrices", "drafts", "text", "streams", "tok/s", "with drafts", "ratio", "tokens a step",
        "accepted",
    )  # fmt: skip
    return markdown_table(
        header,
        [
            (
                each.quantization,
                each.drafts,
                each.load,
                str(each.num_streams),
                f"{each.plain_rate:.1f}",
                f"{each.rate:.1f}",
                f"{each.ratio:.2f}",
                f"{each.tokens_per_step:.2f}",
                f"{each.accepted:.0%}",
            )
            for each in results
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of 48 tokens, int8 alone")
    parser.add_argument("--quantization", type=Quantization, action="append")
    parser.add_argument("--dtype", default=default_dtype("cpu"))
    parser.add_argument("--draft-model", action="store_true", help="the model in int4 drafts, too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    quantizations = arguments.quantization or [Quantization.NONE, Quantization.INT8]
    results = measure(
        [Quantization.INT8] if arguments.quick else quantizations,
        dtype=arguments.dtype,
        with_model=arguments.draft_model,
        num_rounds=1 if arguments.quick else arguments.rounds,
        max_tokens=QUICK_TOKENS if arguments.quick else MAX_MODEL_LEN,
    )
    print(table(results))
    if arguments.json:
        values = [asdict(result) | {"ratio": result.ratio} for result in results]
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
