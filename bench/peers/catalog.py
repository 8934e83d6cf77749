"""All engines that the benchmarks know, by name, in the order of the tables."""

import sys
from pathlib import Path

from pagewire.engine.precision import default_dtype
from peers.child_peer import ChildPeer
from peers.pagewire_server import PagewireServer
from peers.peer import Interface, Peer, Traits
from peers.vllm_server import VllmServer
from peers.workspace import cores, pagewire_environment


def all_peers() -> dict[str, Peer]:
    """Every engine: Pagewire in its variants first."""
    peers: list[Peer] = [
        PagewireServer(),
        PagewireServer(quantization="int8"),
        PagewireServer(quantization="int4"),
        PagewireServer(variant="1-thread", options=("--num-threads", "1")),  # a core each, always
        pagewire_engine(),
        VllmServer(),
        openvino(),
        llama_cpp(),
        transformers(),
    ]
    return {peer.traits.name: peer for peer in peers}


def pagewire_engine() -> ChildPeer:
    """Pagewire's model runner alone: the same engine without router, workers and hand-off."""
    return ChildPeer(
        traits=Traits(
            name="pagewire-engine",
            weights=default_dtype("cpu"),
            interface=Interface.IN_PROCESS,
            batches_continuously=False,
            reports_tokens=False,
        ),
        module="pagewire_engine",
        python=lambda workspace: Path(sys.executable),
        model=lambda workspace: workspace.model,
        threads=len(cores()),
        environment=pagewire_environment(),
    )


def openvino() -> ChildPeer:
    """OpenVINO GenAI's continuous batching with 8-bit weights."""
    return ChildPeer(
        traits=Traits(name="openvino", weights="int8", interface=Interface.IN_PROCESS),
        module="openvino_pipeline",
        python=lambda workspace: workspace.binary("openvino", "python"),
        model=lambda workspace: workspace.openvino_int8,
        threads=len(cores()),
    )


def llama_cpp() -> ChildPeer:
    """llama.cpp on the 4-bit file itself; its Python interface runs one sequence at a time."""
    return ChildPeer(
        traits=Traits(
            name="llama.cpp",
            weights="int4",
            interface=Interface.IN_PROCESS,
            max_streams=1,
            batches_continuously=False,
        ),
        module="llama_cpp_model",
        python=lambda workspace: workspace.binary("llama-cpp", "python"),
        model=lambda workspace: workspace.model,
        threads=len(cores()),
    )


def transformers() -> ChildPeer:
    """transformers' `generate`: requests that arrive together form a batch until all have ended."""
    return ChildPeer(
        traits=Traits(
            name="transformers",
            weights="bfloat16",
            interface=Interface.IN_PROCESS,
            batches_continuously=False,
        ),
        module="transformers_model",
        python=lambda workspace: workspace.binary("transformers", "python"),
        model=lambda workspace: workspace.safetensors,
        threads=len(cores()),
    )
