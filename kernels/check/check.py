"""`segattn check`: every backend that runs here against the float64 reference, over a fixed set of calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..backends import HAS_TRITON, show_config
from .calls import Call, evaluate, gradient_sizes, tensors
from .gates import BASELINE, DTYPES, GATES, judge, relative_error
from .report import DIFFERS, CheckReport, Row
from .table import calls_of


class OptionError(ValueError):
    """An option that cannot be: its name, what it must be, and what it was."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


def default_device() -> torch.device:
    """Return a GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter."""
    if not HAS_TRITON:
        return False
    from ..triton.tiles import INTERPRETED

    return bool(INTERPRETED.value)


def _kernels_take(device: torch.device) -> bool:
    """Return whether kernels take tensors on `device`, on the CPU those that are interpreted, or passed on."""
    if not HAS_TRITON or device.type not in ("cuda", "cpu"):
        return False
    from ..triton.launch import is_redirected

    return device.type == "cuda" or interpreted() or is_redirected()


def available(device: torch.device) -> list[str]:
    """List the backends that run on `device` and can be compared, the baseline first."""
    with_triton = _kernels_take(device)
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
        backends: names of `available`; default: all of them.
        dtypes: "float32", "float16" and "bfloat16"; default: all three.
        calls: default: the table in its full size on a GPU, in its small size on a CPU or under the interpreter.
        listener: called after each call with the number of calls done, the number of all, and the call's name.

    Raises:
        OptionError: names the option, what it must be, and what it was.
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


def _chosen(option: str, wanted: Sequence[str] | None, names: list[str], where: str) -> list[str]:
    """Return the wanted names, each once, in the order of `names`; all of them where none are wanted."""
    for name in wanted or ():
        if name not in names:
            remedy = "; triton runs on a GPU, or where TRITON_INTERPRET=1 is set before Python starts"
            known = ", ".join(map(repr, names))
            raise OptionError(
                option, f"must be one of {known}{where}, got {name!r}{remedy if name == 'triton' else ''}"
            )
    return [name for name in names if not wanted or name in wanted]


def compare(name: str, call: Call, dtype: str, device: torch.device, backends: Sequence[str]) -> list[Row]:
    """Compare every output and gradient of one call in one dtype, by every backend, with the reference.

    Raises:
        OptionError: a call that `segment_attention` refuses.
    """
    made = tensors(call, DTYPES[dtype], device)
    exact = {key: x.double() for key, x in made.items()}
    try:
        expected = evaluate(call, exact, "reference")
    except (ValueError, TypeError) as refusal:
        problem = f"must be of calls that segment_attention takes, got {name!r} ({refusal})"
        raise OptionError("calls", problem) from None
    least = gradient_sizes(call, exact, expected["out"])
    rows: list[Row] = []
    baseline: dict[str, float] = {}
    for backend in dict.fromkeys((BASELINE, *backends)):
        runs = [_attempt(call, made, backend) for _ in range(2)]
        measured = []
        for output, wanted in expected.items():
            size = max(float(wanted.norm()), least.get(output, 0.0))
            error, problems = _measure(output, wanted, size, runs)
            if not math.isnan(error):
                problems += judge(output, error, dtype, call, baseline.get(output))
            gate = GATES[dtype].of(output, call)
            measured.append(Row(backend, dtype, name, output, error, gate, "; ".join(problems) or None))
        if backend == BASELINE:
            baseline = {row.output: row.error for row in measured if not math.isnan(row.error)}
        if backend in backends:
            rows += measured
    return rows


def _attempt(call: Call, made: dict[str, Tensor], backend: str) -> dict[str, Tensor] | str:
    """Return outputs and gradients, or the error that was raised, as text."""
    _poison(made["q"].device)
    try:
        return evaluate(call, made, backend)
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _poison(device: torch.device) -> None:
    """Leave NaN in the GPU memory that PyTorch hands out next, so that memory a kernel forgets to write shows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # PyTorch keeps tensors below 1 MiB apart
        blocks = [torch.full((count,), math.nan, device=device) for count in (1 << 26, *[1 << 17] * 64)]
        del blocks


def _measure(
    output: str, expected: Tensor, size: float, runs: Sequence[dict[str, Tensor] | str]
) -> tuple[float, list[str]]:
    """Return the first run's error relative to `size`, and what is wrong: NaN where there is nothing to measure."""
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
    return relative_error(values[0], expected, size), [] if torch.equal(*values) else [DIFFERS]
