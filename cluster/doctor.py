"""What is good and what is missing on a machine: pure, from a Machine to findings."""

from collections.abc import Iterable, Iterator

from rich.table import Column, Table
from rich.text import Text

from pagewire.cluster.finding import Finding, Status, judge
from pagewire.cluster.gpu_findings import gpu_findings
from pagewire.cluster.machine import Machine
from pagewire.engine.loading.resolve import DEFAULT_INSTALL

_MIN_PYTHON = (3, 11)
_MIN_CORES = 2
_MIN_MEMORY_BYTES = 2 << 30
_MIN_SHARED_MEMORY_BYTES = 200 << 20
_RDMA_PREFIXES = ("rc_", "dc_", "ud_", "srd")  # of UCX's transports


def diagnose(machine: Machine) -> list[Finding]:
    """Judge `machine`. Every finding that is not OK has a remedy."""
    return [
        _python(machine),
        _cores(machine),
        _memory(machine),
        _shared_memory(machine),
        _torch(machine),
        *gpu_findings(
            machine.gpus,
            machine.torch_cuda,
            machine.ucx.transports,
            driver_problem=machine.gpu_driver_problem,
        ),
        _kernels(machine),
        _checksums(machine),
        Finding(subject="matrices", status=Status.OK, detail=machine.matrices),
        _ray(machine),
        _ucx(machine),
        *_rdma(machine),
        _model(machine),
        *_ports(machine),
    ]


def render(findings: Iterable[Finding]) -> Table:
    """The findings as a table for the terminal."""
    colours = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}
    # Folded: of an address that is cut off nobody can make use.
    wide = (Column(title, overflow="fold") for title in ("found", "remedy"))
    table = Table("", "what", *wide, box=None)
    for finding in findings:
        table.add_row(
            Text(finding.status, style=colours[finding.status]),
            # As Text: "pagewire[ucx]" is not markup.
            *(Text(cell) for cell in (finding.subject, finding.detail, finding.remedy)),
        )
    return table


def _python(machine: Machine) -> Finding:
    return judge(
        "Python",
        f"{machine.python[0]}.{machine.python[1]} on {machine.system}",
        sound=machine.python >= _MIN_PYTHON,
        remedy="make install PYTHON=python3.11, or newer",
        otherwise=Status.FAIL,
    )


def _cores(machine: Machine) -> Finding:
    return judge(
        "cores",
        str(machine.cores),
        sound=machine.cores >= _MIN_CORES,
        remedy="prefill and decode share one core and slow each other; give it two",
    )


def _memory(machine: Machine) -> Finding:
    return judge(
        "memory",
        f"{machine.memory_available / (1 << 30):.1f} GiB available",
        sound=machine.memory_available >= _MIN_MEMORY_BYTES,
        remedy="stop other programs, or lower --num-pages and --max-model-len",
    )


def _shared_memory(machine: Machine) -> Finding:
    free = machine.shared_memory_free
    return judge(
        "/dev/shm",
        "there is none" if free is None else f"{free / (1 << 20):.0f} MiB free",
        sound=free is not None and free >= _MIN_SHARED_MEMORY_BYTES,
        remedy="Ray and UCX fall back to slower ways; in a container: --shm-size=1g",
    )


def _torch(machine: Machine) -> Finding:
    return judge(
        "torch",
        machine.torch or "not installed",
        sound=machine.torch is not None,
        remedy="make install",
        otherwise=Status.FAIL,
    )


def _kernels(machine: Machine) -> Finding:
    return judge(
        "CPU kernels",
        machine.kernels,
        sound=not machine.kernels_remedy,
        remedy=machine.kernels_remedy,
    )


def _checksums(machine: Machine) -> Finding:
    return judge(
        "checksums",
        machine.checksums,
        sound=machine.checksums == "C++",
        remedy="slower, not wrong; on x86-64: apt install g++, then: make kernels",
    )


def _ray(machine: Machine) -> Finding:
    if machine.ray is None:
        return judge(
            "Ray",
            "not installed",
            sound=False,
            remedy="make install, or pagewire serve --launcher subprocess",
            otherwise=Status.FAIL,
        )
    return judge(
        "Ray",
        machine.ray if machine.ray_has_dashboard else f"{machine.ray} without its dashboard",
        sound=machine.ray_has_dashboard,
        remedy="pip install 'ray[default]'",
    )


def _ucx(machine: Machine) -> Finding:
    return judge(
        "UCX",
        machine.ucx.explanation,
        sound=machine.ucx.usable,
        remedy="pip install 'pagewire[ucx]'; until then KV pages go to other machines over TCP",
    )


def _rdma(machine: Machine) -> Iterator[Finding]:
    if machine.rdma_devices:
        yield judge(
            "RDMA",
            ", ".join(machine.rdma_devices),
            sound=any(name.startswith(_RDMA_PREFIXES) for name in machine.ucx.transports),
            # The wheel is built without it.
            remedy="UCX has no transport for it: install the system's UCX, 1.19 to 1.21, and set "
            "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true",
        )


def _model(machine: Machine) -> Finding:
    return judge(
        "default model",
        "installed" if machine.has_default_model else "not installed",
        sound=machine.has_default_model,
        remedy=f"{DEFAULT_INSTALL}, or name a model: pagewire serve MODEL",
    )


def _ports(machine: Machine) -> Iterator[Finding]:
    for name, port in machine.ports.items():
        yield judge(
            f"port {port}",
            "taken" if port in machine.taken_ports else "free",
            sound=port not in machine.taken_ports,
            remedy=f"stop what listens there, or pagewire serve --{name.replace('_', '-')} 0",
        )
