"""Options of `pytest bench/`, and the table of ratios that it ends with."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from segattn.bench.workloads import WORKLOADS, Workload

Row = tuple[str, str, str, float, int]
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where to measure: cpu (default), cuda, mps")
    parser.addoption("--workload", action="append", help="sizes B,H,T,K,L instead of the table's; may be repeated")
    parser.addoption(
        "--rounds", type=int, default=5, help="timed rounds of each provider, each beside a baseline round"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        given = metafunc.config.getoption("--workload")
        workloads = WORKLOADS if given is None else [Workload.parse(sizes) for sizes in given]
        metafunc.parametrize("workload", workloads, ids=lambda w: w.name)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """(workload, direction, provider, ratio, peak bytes) of every measurement so far."""
    return request.config.stash[ROWS]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What figures depend on, without the machine's name."""
    device = torch.device(config.getoption("--device"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {name}",
        "cpu_capability": capability,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    group = None
    for workload, direction, provider, ratio, peak in config.stash[ROWS]:
        if (workload, direction) != group:
            group = (workload, direction)
            terminalreporter.section(f"{workload}, {direction}: ratio to SDPA local, peak MiB", sep="-")
        terminalreporter.write_line(f"{provider:36} {ratio:6.2f} {peak / 2**20:9.0f}")
