"""Options of `pytest bench/`, and the table of ratios that it ends with."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

from segattn.bench.cases import DTYPES
from segattn.bench.suite import Row, table

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where to measure: cpu (default), cuda, mps")
    parser.addoption("--dtype", choices=list(DTYPES), help="of q, k and v; default bfloat16 on cuda, float32 elsewhere")
    parser.addoption(
        "--workload", action="append", help="sizes B,H,T,K,L instead of those that suit the device; may be repeated"
    )
    parser.addoption(
        "--rounds", type=int, default=5, help="timed rounds of each provider, each beside a baseline round"
    )
    parser.addoption(
        "--seconds", type=float, default=5.0, help="of timing for each provider and direction, three rounds at least"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Takes a row of the table."""
    return request.config.stash[ROWS].append


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


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Who was not timed, and why, beside those who were."""
    output_json["not_timed"] = [row.as_json() for row in config.stash[ROWS] if row.ratio is None]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    for heading, lines in table(rows):
        terminalreporter.section(heading, sep="-")
        for line in lines:
            terminalreporter.write_line(line)
