"""One case on a device: peers are checked against the reference, and those that are right timed side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import floors
from .attention_calls import Function, ours
from .cases import DTYPES, Case
from .check import GATES
from .device_counts import launches
from .floors import Peak, Sizes, Work
from .machine import plain
from .measure import peak_bytes, synchronize
from .peers import PEERS, Peer, from_segments, to_segments
from .timing import Prepare, Times, copies_needed, interleaved

# others compute in the inputs' dtype throughout: this many times the error that is allowed to ours
LENIENCY = 8.0
Note = Callable[[dict[str, Any]], None]


class Drawn(NamedTuple):
    """One copy of a case's inputs, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    dout: Tensor


class DeviceLostError(RuntimeError):
    """The device answers nothing more in this process."""


def draw(case: Case, device: torch.device, copies: int | None = None) -> list[Drawn]:
    """Copies of the inputs, by default enough to outrun the L2 cache."""
    sizes = case.sizes()
    if copies is None:
        copies = copies_needed(sizes.queries + sizes.keys_values, device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (case.B, heads, case.T, case.K)
        return torch.randn(shape, device=device, dtype=DTYPES[case.dtype], generator=generator)

    found = []
    for _ in range(copies):
        gate = torch.randn(case.H, device=device, generator=generator)
        found.append(Drawn(normal(case.H), normal(case.G), normal(case.G), gate, normal(case.H)))
    return found


def preparation(peer: Peer, case: Case, drawn: list[Drawn], direction: str) -> Prepare:
    """What is timed in one direction; for the backward alone, the forward is the preparation."""
    grad = direction != "forward"

    def prepare(copy: int) -> Callable[[], object]:
        q, k, v, gate, dout = drawn[copy]
        if peer.of_segments:
            q, k, v, dout = (to_segments(x, case.L) for x in (q, k, v, dout))
        q, k, v, gate = (x.detach().requires_grad_(grad) for x in (q, k, v, gate))
        used = (q, k, v) if peer.update is None else (q, k, v, gate)
        if direction == "forward":
            return lambda: peer.run(q, k, v, gate, case.L)
        if direction == "backward":
            out = peer.run(q, k, v, gate, case.L)
            return lambda: torch.autograd.grad(out, used, dout)
        return lambda: torch.autograd.grad(peer.run(q, k, v, gate, case.L), used, dout)

    return prepare


def _results(peer: Peer, case: Case, drawn: Drawn, prefix: int, gradients: bool) -> dict[str, Tensor]:
    """Output and gradients of the first row's first key/value head over a prefix, from a run over everything.

    What comes later has no part in them: attention is causal, and the output's gradient is 0 behind the prefix.
    """
    members = case.H // case.G
    dout = torch.zeros_like(drawn.dout)
    dout[:1, :members, :prefix] = drawn.dout[:1, :members, :prefix]
    q, k, v = drawn.q, drawn.k, drawn.v
    if peer.of_segments:
        q, k, v, dout = (to_segments(x, case.L) for x in (q, k, v, dout))
    leaves = [x.detach().requires_grad_(gradients) for x in (q, k, v)]
    out = peer.run(leaves[0], leaves[1], leaves[2], drawn.gate, case.L)
    grads = torch.autograd.grad(out, leaves, dout) if gradients else ()
    found = (out.detach(), *grads)
    if not all(bool(x.isfinite().all()) for x in found):
        raise ValueError("not finite")
    if peer.of_segments:
        found = tuple(from_segments(x[: -(-prefix // case.L)]) for x in found)
    return {
        name: x[:1, :heads, :prefix].double()
        for (name, heads), x in zip((("out", members), ("dq", members), ("dk", 1), ("dv", 1)), found, strict=False)
    }


def _expected(peer: Peer, case: Case, drawn: Drawn, prefix: int, gradients: bool) -> dict[str, Tensor]:
    """The same by the reference in float64."""
    members = case.H // case.G
    leaves = q, k, v = [
        x[:1, :heads, :prefix].double().requires_grad_(gradients)
        for x, heads in ((drawn.q, members), (drawn.k, 1), (drawn.v, 1))
    ]
    gate = drawn.gate[:members].double()
    out = (peer.definition or _reference(peer.update))(q, k, v, gate, prefix if peer.full else case.L)
    found = [out.detach()]
    if gradients:
        found += torch.autograd.grad(out, leaves, drawn.dout[:1, :members, :prefix].double())
    return dict(zip(("out", "dq", "dk", "dv"), found, strict=False))


def _reference(update: str | None) -> Function:
    return functools.partial(ours, update=update, backend="reference")


def errors_of(peer: Peer, case: Case, drawn: Drawn, gradients: bool = True) -> dict[str, float]:
    """Relative RMS errors of a peer's output and gradients, over three segments (one, for full attention)."""
    prefix = min(case.T, case.L if peer.full else 3 * case.L)
    if peer.definition is not None:
        # token by token
        prefix = min(prefix, 256)
    expected = _expected(peer, case, drawn, prefix, gradients)
    found = _results(peer, case, drawn, prefix, gradients)
    return {name: float((found[name] - x).norm() / x.norm()) for name, x in expected.items()}


def is_wrong(peer: Peer, dtype: str, errors: Mapping[str, float]) -> bool:
    gate = GATES[dtype]
    times = 1.0 if peer.ours else LENIENCY
    gradients = gate.through_delta if peer.update == "delta" else gate.gradients
    return not all(error <= times * (gate.outputs if name == "out" else gradients) for name, error in errors.items())


def work_of(peer: Peer, sizes: Sizes, direction: str) -> Work:
    if peer.full:
        sizes = Sizes(**(sizes.__dict__ | {"L": sizes.T}))
    forward, backward = floors.forward(sizes, peer.update), floors.backward(sizes, peer.update)
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[direction]


def rounded(number: float) -> float:
    return float(f"{number:.5g}")


def as_record(times: Times, work: Work, peak: Peak | None) -> dict[str, Any]:
    """Times, what they come to per second, and their share of the floor: 1 is as fast as the GPU can be."""
    record = {
        "median_ms": rounded(times.median),
        "low_ms": rounded(times.low),
        "high_ms": rounded(times.high),
        "rounds": times.rounds,
        "operations": work.operations,
        "bytes": work.bytes,
        "tflops": rounded(work.operations / times.median / 1e9),
        "gbytes_per_s": rounded(work.bytes / times.median / 1e6),
    }
    if peak is not None:
        floor = floors.seconds(work, peak) * 1e3
        record |= {"floor_ms": rounded(floor), "floor_share": rounded(floor / times.median)}
    return record


def still_there(device: torch.device) -> None:
    """Raises DeviceLostError where a kernel's fault has taken the process's context with it."""
    try:
        synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(plain(error)) from error
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """A CPU's allocator raises a RuntimeError like any other."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def admit(
    peer: Peer, case: Case, drawn: list[Drawn], device: torch.device, excluded: str | None = None
) -> dict[str, Any]:
    """The gate before timing: status "right", or why the peer is not timed; with memory and launches."""
    reason = excluded or peer.refusal(device, case.H != case.G, case.directions)
    if reason is not None:
        return {"status": "skipped" if excluded is None else "failed", "reason": reason}
    record: dict[str, Any] = {}
    try:
        record["errors"] = {
            name: rounded(error)
            for name, error in errors_of(peer, case, drawn[0], case.directions != ("forward",)).items()
        }
        if is_wrong(peer, case.dtype, record["errors"]):
            return record | {"status": "wrong", "reason": "errors beyond the gate"}
        for direction in case.directions:
            if direction != "backward":
                run = preparation(peer, case, drawn, direction)(0)
                record[direction] = {"peak_bytes": _peak(run, device)}
                if case.counted:
                    record[direction]["launches"] = launches(run, device)
        record["status"] = "right"
    # others assert
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        record |= {"status": "out of memory" if is_out_of_memory(error) else "failed", "reason": plain(error)}
    still_there(device)
    return record


def _peak(run: Callable[[], object], device: torch.device) -> int:
    def without_result() -> None:
        run()

    return peak_bytes(without_result, device)


def measure_case(
    case: Case,
    device: torch.device,
    peak: Peak | None,
    note: Note,
    excluded: Mapping[str, str] | None = None,
    peers: Mapping[str, Peer] = PEERS,
) -> dict[str, Any]:
    """Times of every right peer in every direction. `note` is told which peer is at work, for whoever must end it."""
    try:
        drawn = draw(case, device)
    except torch.OutOfMemoryError:
        return case.as_json() | {"status": "out of memory", "peers": {}}
    found: dict[str, dict[str, Any]] = {}
    for name in case.peers:
        note({"at": name})
        found[name] = admit(peers[name], case, drawn, device, (excluded or {}).get(name))
    note({"at": None})
    record = case.as_json() | {"copies": len(drawn), "peers": found}
    for direction in case.directions:
        right = [name for name in case.peers if found[name]["status"] in ("right", "timed")]
        prepares = {name: preparation(peers[name], case, drawn, direction) for name in right}
        if not prepares:
            continue
        try:
            warm = device.type == "cuda"
            times = interleaved(
                prepares, device, copies=len(drawn), seconds=case.seconds, rounds=case.rounds, warm_up=warm
            )
        except torch.OutOfMemoryError:
            record.setdefault("out of memory", []).append(direction)
            continue
        for name, measured in times.items():
            work = work_of(peers[name], case.sizes(), direction)
            found[name]["status"] = "timed"
            found[name].setdefault(direction, {}).update(as_record(measured, work, peak))
    return record
