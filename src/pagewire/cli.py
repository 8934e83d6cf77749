"""The command line. Thin: each command reads its arguments and calls one function of the cluster.

Modules that load Ray or a tokenizer are imported by the command that needs them, so that
``pagewire --help`` answers at once.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

import pagewire
from pagewire.cluster.errors import ClusterError, ConfigError

app = typer.Typer(
    name="pagewire",
    help="LLM serving with prefill and decode on different machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="The configuration of `pagewire serve`.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="parameters in YAML")
]
Url = Annotated[str, typer.Option(help="where the server is")]


def main() -> None:
    """Exit code 0 for success, 1 for a failure, 2 for a command that was not understood."""
    try:
        app()
    except ConfigError as error:
        _fail(error, code=2)
    except ClusterError as error:
        _fail(error, code=1)


def _fail(error: Exception, *, code: int) -> NoReturn:
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pagewire {pagewire.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options without a command."""


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="GGUF file, safetensors directory or cached Hugging Face id"),
    ] = None,
    served_model: Annotated[str | None, typer.Option(help="the name that clients use")] = None,
    prefill: Annotated[int | None, typer.Option(help="prefill workers")] = None,
    decode: Annotated[int | None, typer.Option(help="decode workers")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="processes that compute one worker's model together")
    ] = None,
    prefill_tensor_parallel_size: Annotated[
        int | None, typer.Option(help="of prefill workers, if it is to be another")
    ] = None,
    decode_tensor_parallel_size: Annotated[
        int | None, typer.Option(help="of decode workers, if it is to be another")
    ] = None,
    host: Annotated[str | None, typer.Option(help="address of the API")] = None,
    port: Annotated[int | None, typer.Option(help="port of the API; 0: any free one")] = None,
    dashboard_port: Annotated[
        int | None, typer.Option(help="port of Ray's dashboard; 0: any free one")
    ] = None,
    transport: Annotated[str | None, typer.Option(help="auto, shm, ucx, nccl, gloo or tcp")] = None,
    kv_host: Annotated[str | None, typer.Option(help="address for KV pages")] = None,
    kv_tls_cert: Annotated[str | None, typer.Option(help="certificate of the workers")] = None,
    kv_tls_key: Annotated[str | None, typer.Option(help="its key")] = None,
    kv_tls_ca: Annotated[str | None, typer.Option(help="authority that signed it")] = None,
    insecure_kv: Annotated[
        bool | None,
        typer.Option("--insecure-kv/--no-insecure-kv", help="KV pages in the clear on any network"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda, a GPU for each worker")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32")] = None,
    quantization: Annotated[str | None, typer.Option(help="none, int8, int4, fp8 or w4a16")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, native (C++), triton or torch")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto (as dtype), int8 or fp8")] = None,
    decode_kv_cache_dtype: Annotated[
        str | None, typer.Option(help="of decode workers, if it is to be another")
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic", help="the same to the bit in every batch"
        ),
    ] = None,
    page_size: Annotated[int | None, typer.Option(help="token slots of a page")] = None,
    decode_page_size: Annotated[
        int | None, typer.Option(help="of decode workers, if it is to be another")
    ] = None,
    num_pages: Annotated[int | None, typer.Option(help="pages of each worker")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens, prompt plus output")] = None,
    num_threads: Annotated[int | None, typer.Option(help="threads of each worker")] = None,
    speculation: Annotated[
        str | None, typer.Option(help="none, ngram (drafts from the text so far) or draft")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="a smaller model that drafts, with --speculation draft")
    ] = None,
    draft_quantization: Annotated[
        str | None, typer.Option(help="of the draft model, as --quantization")
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option("--prefix-cache/--no-prefix-cache", help="reuse the KV of equal beginnings"),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="URL of an OpenTelemetry collector that gets traces")
    ] = None,
    lease_s: Annotated[
        float | None, typer.Option(help="how long a failed hand-off keeps its pages")
    ] = None,
    max_parked_share: Annotated[
        float | None,
        typer.Option(help="of prefill pages that may wait for decode workers, above 0 to 1"),
    ] = None,
    max_waiting_handoffs: Annotated[
        int | None, typer.Option(help="hand-offs that a full decode worker lets wait")
    ] = None,
    hang_timeout_s: Annotated[
        float | None, typer.Option(help="after so long without a word a worker is replaced")
    ] = None,
    launcher: Annotated[str | None, typer.Option(help="ray or subprocess")] = None,
    config: ConfigFile = None,
) -> None:
    """Serve a model until Ctrl-C. Without MODEL: SmolLM2-135M-Instruct.

    Environment variables (PAGEWIRE_PORT=...) and the file of --config set the same parameters and
    more; `pagewire config show` lists them.
    """
    given = {
        "model": model,
        "served_model": served_model,
        "prefill": prefill,
        "decode": decode,
        "tensor_parallel_size": tensor_parallel_size,
        "prefill_tensor_parallel_size": prefill_tensor_parallel_size,
        "decode_tensor_parallel_size": decode_tensor_parallel_size,
        "host": host,
        "port": port,
        "dashboard_port": dashboard_port,
        "transport": transport,
        "kv_host": kv_host,
        "kv_tls_cert": kv_tls_cert,
        "kv_tls_key": kv_tls_key,
        "kv_tls_ca": kv_tls_ca,
        "insecure_kv": insecure_kv,
        "device": device,
        "dtype": dtype,
        "quantization": quantization,
        "kernels": kernels,
        "kv_cache_dtype": kv_cache_dtype,
        "deterministic": deterministic,
        "decode_kv_cache_dtype": decode_kv_cache_dtype,
        "page_size": page_size,
        "decode_page_size": decode_page_size,
        "num_pages": num_pages,
        "max_model_len": max_model_len,
        "num_threads": num_threads,
        "prefix_cache": prefix_cache,
        "speculation": speculation,
        "draft_model": draft_model,
        "draft_quantization": draft_quantization,
        "otlp_endpoint": otlp_endpoint,
        "lease_s": lease_s,
        "max_parked_share": max_parked_share,
        "max_waiting_handoffs": max_waiting_handoffs,
        "hang_timeout_s": hang_timeout_s,
        "launcher": launcher,
    }
    from pagewire.cluster.config import load_config

    loaded = load_config(given, config)

    from pagewire.cluster.run import run_server

    run_server(loaded.config)


@app.command()
def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="ask this and leave; without it, a conversation")
    ] = None,
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="the model to ask")] = "default",
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="longest answer, in tokens")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
) -> None:
    """Talk to a running server; shows TTFT and tokens per second."""
    from pagewire.cluster.chat import Chat

    session = Chat(
        url=url.rstrip("/").removesuffix("/v1"),
        model=model,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    for line in [prompt] if prompt is not None else _lines():
        session.ask(line)


def _lines() -> Iterator[str]:
    """What the user types, until end of file; all of standard input when that is no terminal."""
    if not sys.stdin.isatty():
        yield sys.stdin.read()
        return
    console = Console()
    while True:
        try:
            line = console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line


@app.command()
def doctor() -> None:
    """Show what this machine has for Pagewire, and the remedy for what it lacks."""
    from pagewire.cluster.doctor import diagnose, render
    from pagewire.cluster.finding import Status
    from pagewire.cluster.machine import inspect_machine

    findings = diagnose(inspect_machine())
    Console().print(render(findings))
    if any(finding.status is Status.FAIL for finding in findings):
        raise typer.Exit(1)


@config_app.command("show")
def config_show(config: ConfigFile = None) -> None:
    """Show every parameter, its value, and where the value comes from."""
    from pagewire.cluster.config import ServeConfig, load_config

    loaded = load_config({}, config)
    table = Table("parameter", "value", "from", "meaning", box=None)
    for name, field in ServeConfig.model_fields.items():
        value = getattr(loaded.config, name)
        shown = "-" if value is None else str(value)
        table.add_row(name, shown, loaded.origins[name], field.description)
    Console().print(table)


if __name__ == "__main__":  # python -m pagewire.cli
    main()
