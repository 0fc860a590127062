"""Options of `pytest bench/`, and the table of ratios that it ends with."""

from __future__ import annotations

import argparse
import math
import os
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from segattn.bench.speed.fixture import Bench
from segattn.bench.speed.machine import machine_info
from segattn.bench.speed.rows import Row, as_json, marked, table
from segattn.bench.speed.workloads import CALL_NUMBERS, DTYPES, parse_workloads

ROWS = pytest.StashKey[list[Row]]()
LOAD = pytest.StashKey[float]()
# files that cannot be imported here
collect_ignore = [] if find_spec("transformers") else ["speed/bench_recurrent_memory.py"]
FORMS = {CALL_NUMBERS: "B,H,T,K,L", 7: "B,S,L,m,layers,heads,width"}


def a_device(name: str) -> str:
    """Return the name of a device that is here."""
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, cuda:N or mps, got {name!r}")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(match[2] or 0) >= here[match[1]]:
        raise argparse.ArgumentTypeError(f"must be a device that PyTorch finds here, got {name!r}")
    return name


def sizes(text: str) -> str:
    """Return the sizes of a workload, once they are possible."""
    count = text.count(",") + 1
    if count not in FORMS:
        raise argparse.ArgumentTypeError(f"must be {' or '.join(FORMS.values())}, got {text!r}")
    try:
        if count == CALL_NUMBERS:
            parse_workloads([text], "float32")
        else:
            from segattn.bench.speed.recurrent_models import Sizes

            Sizes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def some_rounds(text: str) -> int:
    """Return a number of rounds."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def some_seconds(text: str) -> float:
    """Return a time."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", type=a_device, default="cpu", help="where to measure: cpu (default), cuda, mps")
    parser.addoption("--dtype", choices=list(DTYPES), help="of q, k and v; default bfloat16 on cuda, float32 elsewhere")
    parser.addoption(
        "--workload",
        type=sizes,
        action="append",
        help=f"sizes {FORMS[CALL_NUMBERS]}, or of recurrent memories {FORMS[7]}; may be repeated; "
        "default: sizes that suit the device",
    )
    parser.addoption(
        "--rounds", type=some_rounds, default=5, help="timed rounds of each peer, each beside a baseline round"
    )
    parser.addoption(
        "--seconds",
        type=some_seconds,
        default=5.0,
        help="of timing for each peer and direction, three rounds at least",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest bench/ needs pytest-benchmark: pip install 'segattn[bench]'")
    config.stash[ROWS] = []
    config.stash[LOAD] = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    # one table is enough
    config.option.benchmark_quiet = True


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Warn of others at work, who slow some rounds and not others, and of what is left out."""
    load, cores = config.stash[LOAD], os.cpu_count() or 1
    noisy = [f"load {load:.1f} on {cores} cores: times will be noisy"] if load > cores / 4 else []
    return [*noisy, *(f"{name} is left out: it needs segattn[hf]" for name in collect_ignore)]


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Bench:
    """Return what a benchmark needs."""
    option, keep = request.config.getoption, request.config.stash[ROWS].append
    return Bench(benchmark, keep, torch.device(option("--device")), option("--rounds"), option("--seconds"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    load = float(f"{config.stash[LOAD]:.2f}")
    return machine_info(torch.device(config.getoption("--device"))) | {"load": load}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Add the rows that were not timed, with the reasons, and mark the noisy ones."""
    kept = config.stash[ROWS]
    rows = marked(kept)
    output_json["not_timed"] = as_json(rows)["not_timed"]
    noisy = {(row.group, row.peer): row.noisy for row in rows if row.noisy}
    for benchmark in output_json["benchmarks"]:
        info = benchmark["extra_info"]
        if reason := noisy.get((benchmark["group"], info["provider"])):
            info["noisy"] = reason


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    kept = config.stash[ROWS]
    for heading, lines in table(marked(kept)):
        terminalreporter.section(heading, sep="-")
        for line in lines:
            terminalreporter.write_line(line)
