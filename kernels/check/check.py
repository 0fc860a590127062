"""`segattn check`: every backend that runs here against the float64 reference, over a fixed set of calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import HAS_TRITON, NAMES, show_config
from .calls import Call, calls_of, evaluate, spread, tensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUTPUTS = ("out", "memory", "normalizer")
DIFFERS = "differs between two runs"


class Gate(NamedTuple):
    """Largest relative RMS error allowed: of outputs, of gradients, of gradients through the delta memory."""

    outputs: float
    gradients: float
    through_delta: float

    def of(self, output: str, call: Call) -> float:
        if output in OUTPUTS:
            return self.outputs
        return self.through_delta if call.gated and call.update == "delta" else self.gradients


GATES = {
    "float32": Gate(2e-6, 1e-5, 1e-5),
    "float16": Gate(6e-4, 8e-4, 8e-4),
    "bfloat16": Gate(4e-3, 6e-3, 1e-2),
}
# The backend that others are compared with, and how many times its error they may have. Counted only from a quarter of
# the gate on, and from the RMS of one rounding to the dtype on (eps / sqrt 12): products of half precision start from
# rounded operands, and below either the ratio of two errors is luck.
BASELINE = "torch"
TIMES, GRADIENT_TIMES, RATIO_FROM = 1.5, 2.0, 0.25


class OptionError(ValueError):
    """An option that cannot be: its name, what it must be, and what it was."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


@dataclass(frozen=True)
class Row:
    """One output of one call by one backend; error is NaN where there was nothing to measure."""

    backend: str
    dtype: str
    call: str
    output: str
    error: float
    gate: float
    problem: str | None = None

    @property
    def share(self) -> float:
        """Of the gate; what could not be measured counts as the largest."""
        return math.inf if math.isnan(self.error) else self.error / self.gate


@dataclass(frozen=True)
class CheckReport:
    """What `run_check` found."""

    device: str
    versions: dict[str, str]
    size: str  # of the table: "full", "small"; "given" where calls were
    calls: int
    rows: tuple[Row, ...]

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.problem is not None]

    @property
    def compared(self) -> int:
        """Calls that were run twice, each counted once per backend and dtype."""
        return len({(row.backend, row.dtype, row.call) for row in self.rows})

    def worst(self) -> list[Row]:
        """For every backend, dtype and output the row nearest to its gate, or furthest beyond."""
        found: dict[tuple[str, str, str], Row] = {}
        for row in self.rows:
            key = (row.backend, row.dtype, row.output)
            if key not in found or row.share > found[key].share:
                found[key] = row
        order = {name: place for place, name in enumerate(OUTPUTS)}
        return sorted(
            found.values(),
            key=lambda row: (_place(row.backend, NAMES), _place(row.dtype, DTYPES), order.get(row.output, len(order))),
        )

    def lines(self) -> list[str]:
        """What failed, and how much was compared."""
        failed: dict[tuple[str, ...], list[Row]] = {}
        for row in self.failures:
            # what keeps a whole call from being measured is said once
            alone = "" if math.isnan(row.error) else row.output
            failed.setdefault((row.backend, row.dtype, row.call, alone, row.problem or ""), []).append(row)
        lines = []
        for (backend, dtype, call, alone, problem), rows in failed.items():
            outputs = ", ".join(row.output for row in rows)
            figures = f"error {rows[0].error:.2e}, gate {rows[0].gate:.0e}, " if alone else ""
            lines.append(f"FAILED {backend}, {dtype}, {call!r}, {outputs}: {figures}{problem}")
        unequal = len({(row.backend, row.dtype, row.call) for row in self.failures if DIFFERS in (row.problem or "")})
        void = len({(row.backend, row.dtype, row.call) for row in self.rows if math.isnan(row.error)})
        equal = "bitwise equal" if not unequal else f"{unequal} of them not bitwise equal"
        lines.append(
            f"{self.compared} comparisons of {self.calls} calls, each run twice, {equal}"
            + (f"; {void} could not be measured" if void else "")
        )
        lines.append(f"{len(self.failures)} of {len(self.rows)} outputs failed" if failed else "passed")
        return lines

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`; an error that is not a number is None."""
        errors: dict[str, Any] = {}
        for row in self.rows:
            calls = errors.setdefault(row.backend, {}).setdefault(row.dtype, {})
            calls.setdefault(row.call, {})[row.output] = _number(row.error)
        return {
            "device": self.device,
            "versions": self.versions,
            "size": self.size,
            "calls": self.calls,
            "compared": self.compared,
            "passed": not self.failures,
            "failures": [_as_json(row) for row in self.failures],
            "worst": [_as_json(row) for row in self.worst()],
            "errors": errors,
        }


def _place(name: str, names: Sequence[str] | Mapping[str, Any]) -> int:
    return list(names).index(name)


def _number(error: float) -> float | None:
    return float(f"{error:.3g}") if math.isfinite(error) else None


def _as_json(row: Row) -> dict[str, Any]:
    return row.__dict__ | {"error": _number(row.error)}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interpreted() -> bool:
    """Do the kernels run in Triton's interpreter?"""
    if not HAS_TRITON:
        return False
    from ..triton.tiles import INTERPRETED

    return bool(INTERPRETED.value)


def available(device: torch.device) -> list[str]:
    """Backends that run on `device` and can be compared, the baseline first."""
    with_triton = HAS_TRITON and (device.type == "cuda" or (device.type == "cpu" and interpreted()))
    return [BASELINE, *(["triton"] if with_triton else [])]


def run_check(
    device: torch.device | str | None = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    calls: Mapping[str, Call] | None = None,
    listener: Callable[[int, int, str], None] | None = None,
) -> CheckReport:
    """Compare every call, twice, in every dtype, by every backend, with the reference in float64 on the same values.

    Args:
        device: default: a GPU, or else the CPU.
        backends, dtypes: by name; default: all that there are.
        calls: default: the table in its full size on a GPU, in its small size on a CPU or under the interpreter.
        listener: is told after each call how many are done, of how many, and which it was.

    Raises:
        OptionError: naming the option, what it must be, and what it was.
    """
    device = _usable(default_device() if device is None else device)
    backends = _chosen("backend", backends, available(device), f" on {device}")
    dtypes = _chosen("dtype", dtypes, list(DTYPES), "")
    size = "given"
    if calls is None:
        size = "full" if device.type == "cuda" and not interpreted() else "small"
        calls = calls_of(size)
    rows: list[Row] = []
    total = len(dtypes) * len(calls)
    for done, (dtype, (name, call)) in enumerate(((d, c) for d in dtypes for c in calls.items()), start=1):
        rows += compare(name, call, dtype, device, backends)
        if listener is not None:
            listener(done, total, f"{dtype}, {name}")
    config = show_config(device)
    return CheckReport(_describe(device), config.versions, size, len(calls), tuple(rows))


def _describe(device: torch.device) -> str:
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _usable(device: torch.device | str) -> torch.device:
    try:
        chosen = torch.device(device)
        # the reference computes in float64, which not every device does
        torch.ones(1, device=chosen, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        problem = f"must be one that PyTorch can use here in float64, such as 'cpu', got {str(device)!r} ({reason})"
        raise OptionError("device", problem) from None
    return chosen


def _chosen(option: str, given: Sequence[str] | None, names: list[str], where: str) -> list[str]:
    """The names given, each once, in the order of all names."""
    for name in given or ():
        if name not in names:
            remedy = "; triton runs on a GPU, or where TRITON_INTERPRET=1 is set before Python starts"
            known = ", ".join(map(repr, names))
            raise OptionError(
                option, f"must be one of {known}{where}, got {name!r}{remedy if name == 'triton' else ''}"
            )
    return [name for name in names if not given or name in given]


def compare(name: str, call: Call, dtype: str, device: torch.device, backends: Sequence[str]) -> list[Row]:
    """Every output and gradient of one call in one dtype, by every backend."""
    made = tensors(call, DTYPES[dtype], device)
    exact = {key: x.double() for key, x in made.items()}
    expected = evaluate(call, exact, "reference")
    # with few heads the terms of the gate's gradient may cancel, and what is left is no measure of an error
    least = {"dgate": spread(call, exact, expected["out"])} if call.gated else {}
    rows: list[Row] = []
    baseline: dict[str, float] = {}
    for backend in dict.fromkeys((BASELINE, *backends)):
        runs = [_attempt(call, made, backend) for _ in range(2)]
        found = []
        for output, wanted in expected.items():
            gate = GATES[dtype].of(output, call)
            size = max(float(wanted.norm()), least.get(output, 0.0))
            error, problems = measure(output, wanted, size, runs)
            if not math.isnan(error):
                problems += judge(output, error, dtype, call, baseline.get(output))
            found.append(Row(backend, dtype, name, output, error, gate, "; ".join(problems) or None))
        if backend == BASELINE:
            baseline = {row.output: row.error for row in found if not math.isnan(row.error)}
        if backend in backends:
            rows += found
    return rows


def _attempt(call: Call, made: dict[str, Tensor], backend: str) -> dict[str, Tensor] | str:
    """Outputs and gradients, or what was raised."""
    _poison(made["q"].device)
    try:
        return evaluate(call, made, backend)
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _poison(device: torch.device) -> None:
    """Leave NaN in the GPU memory that PyTorch hands out next: what a kernel forgot to write then shows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # PyTorch keeps tensors below 1 MiB apart
        blocks = [torch.full((count,), math.nan, device=device) for count in (1 << 26, *[1 << 17] * 64)]
        del blocks


def measure(
    output: str, expected: Tensor, size: float, runs: Sequence[dict[str, Tensor] | str]
) -> tuple[float, list[str]]:
    """RMS error of the first run, relative to `size` (absolute where nothing is expected), and what makes it void."""
    values = []
    for run in runs:
        if isinstance(run, str):
            return math.nan, [f"raised {run}"]
        if output not in run:
            return math.nan, ["missing"]
        values.append(run[output])
    if values[0].shape != expected.shape:
        return math.nan, [f"of shape {list(values[0].shape)}, expected {list(expected.shape)}"]
    if not all(bool(x.isfinite().all()) for x in values):
        return math.nan, ["not finite"]
    distance = float((values[0].double() - expected).norm())
    return distance / size if size > 1e-12 else distance, [] if torch.equal(*values) else [DIFFERS]


def judge(output: str, error: float, dtype: str, call: Call, baseline: float | None) -> list[str]:
    """What is wrong with an error; baseline is that of the backend to compare with, if there is one."""
    gate = GATES[dtype].of(output, call)
    problems = ["above the gate"] if error > gate else []
    times = TIMES if output in OUTPUTS else GRADIENT_TIMES
    least = max(RATIO_FROM * gate, torch.finfo(DTYPES[dtype]).eps / math.sqrt(12))
    if baseline is not None and error > max(least, times * baseline):
        problems.append(f"{error / baseline:.1f} times the error of {BASELINE}, at most {times:g} allowed")
    return problems
