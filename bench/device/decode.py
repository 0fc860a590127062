"""One decoding step on a device: ours and PyTorch's operations, as they are called and as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.attention import segment_attention
from ...kernels.check.gates import GATES
from ...kernels.state import MemoryState
from ..planner import floors
from ..planner.floors import Peak
from ..speed.attention_calls import has_kernels
from ..speed.correctness import TIMES
from ..speed.counts import launches
from ..speed.machine import plain
from ..speed.measure import synchronize
from ..speed.timing import Prepare, captured, copies_needed, interleaved
from ..speed.workloads import DTYPES, DecodeCase
from .cases import Note, as_record, rounded, still_there


class Step(NamedTuple):
    """One decoding step's inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    memory: Tensor
    normalizer: Tensor


Decoder = Callable[[Step, int], Tensor]
NO_KERNELS = "the kernels need a GPU, or TRITON_INTERPRET=1 before Python starts"


def draw_step(case: DecodeCase, device: torch.device, copies: int | None = None) -> list[Step]:
    """Copies of the inputs, by default enough to outrun the L2 cache."""
    sizes = case.sizes()
    if copies is None:
        copies = copies_needed(sizes.keys_values + sizes.state, device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, rows: int, dtype: torch.dtype = DTYPES[case.dtype]) -> Tensor:
        return torch.randn((case.B, heads, rows, case.K), device=device, dtype=dtype, generator=generator)

    # as a memory of all the segments behind the tail might be
    written = case.context // case.L * case.L
    return [
        Step(
            normal(case.H, 1),
            normal(case.G, case.tail),
            normal(case.G, case.tail),
            torch.zeros(case.H, device=device),
            normal(case.G, case.K, torch.float32) * written**0.5,
            torch.rand(case.B, case.G, case.K, device=device, generator=generator) * written,
        )
        for _ in range(copies)
    ]


def step_ours(x: Step, segment_len: int, backend: str = "triton") -> Tensor:
    q, k, v, gate, *state = x
    return segment_attention(
        q, k, v, segment_len=segment_len, gate=gate, state=MemoryState(*state), backend=backend
    ).out


def step_eager(x: Step, segment_len: int) -> Tensor:
    """The same in PyTorch's own operations."""
    q, k, v, gate, memory, normalizer = x
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    asked = (F.elu(q) + 1).float().unflatten(1, (k.shape[1], -1)).squeeze(3)
    weight = asked @ normalizer[..., None]
    held = weight > 0
    recalled = torch.where(held, asked @ memory / weight, 0.0).flatten(1, 2).unsqueeze(2)
    g = gate.sigmoid()[:, None, None] * held.flatten(1, 2).unsqueeze(2)
    return (g * recalled + (1 - g) * out).to(q.dtype)


def allowed_in_decoding(name: str, dtype: str) -> float:
    """The largest relative error of a step that is right."""
    return GATES[dtype].outputs * (1.0 if name.startswith("segattn") else TIMES)


DECODERS: dict[str, Decoder] = {"segattn": step_ours, "eager": step_eager}


def measure_decode(
    case: DecodeCase, device: torch.device, peak: Peak | None, note: Note, excluded: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """One step by each decoder: on the device, per call with the CPU's part, and replayed as a CUDA graph."""
    drawn = draw_step(case, device)
    held = sum(x.nbytes for x in (drawn[0].k, drawn[0].v, drawn[0].memory, drawn[0].normalizer))
    expected = step_ours(Step(*(x.double() for x in drawn[0])), case.L, "reference")
    found: dict[str, dict[str, Any]] = {}
    prepares: dict[str, Prepare] = {}
    for name, decoder in DECODERS.items():
        note({"at": name})
        refused = None if name != "segattn" or has_kernels(device) else NO_KERNELS
        reason = (excluded or {}).get(name) or refused
        if reason is not None:
            found[name] = {"status": "skipped" if refused else "failed", "reason": reason}
            continue
        try:
            with torch.no_grad():
                found[name] = _admit(name, decoder, case, drawn, expected, device)
                if found[name]["status"] == "right":
                    prepares[name] = partial(_prepared, decoder, drawn, case.L)
                    graph = _graphs(decoder, drawn, case.L, device)
                    found[f"{name} graph"] = {"status": "right"} if graph else {"status": "skipped", "reason": "no GPU"}
                    prepares |= {f"{name} graph": graph} if graph else {}
        except (RuntimeError, ValueError) as error:
            still_there(device)
            found[f"{name} graph" if name in prepares else name] = {"status": "failed", "reason": plain(error)}
    note({"at": None})
    with torch.no_grad():
        rounds = (3, 100) if device.type == "cuda" else (1, 1)
        times = interleaved(prepares, device, copies=len(drawn), seconds=1.0, rounds=rounds) if prepares else {}
    for name, measured in times.items():
        found[name] |= {"status": "timed"} | as_record(measured, floors.decode(case.sizes()), peak)
    return case.as_json() | {"copies": len(drawn), "held_bytes": held, "decoders": found}


def _admit(
    name: str, decoder: Decoder, case: DecodeCase, drawn: list[Step], expected: Tensor, device: torch.device
) -> dict[str, Any]:
    """The gate before timing; with launches, and the time of a call among many."""
    error = float((decoder(drawn[0], case.L).double() - expected).norm() / expected.norm())
    if not error <= allowed_in_decoding(name, case.dtype):
        return {"status": "wrong", "error": rounded(error), "reason": "error beyond the gate"}
    return {
        "status": "right",
        "error": rounded(error),
        "launches": launches(partial(decoder, drawn[0], case.L), device),
        "call_ms": rounded(_call(decoder, drawn, case.L, device)),
    }


def _prepared(decoder: Decoder, drawn: list[Step], segment_len: int, copy: int) -> Callable[[], object]:
    return partial(decoder, drawn[copy], segment_len)


def _graphs(decoder: Decoder, drawn: list[Step], segment_len: int, device: torch.device) -> Prepare | None:
    """A graph for each copy of the inputs; None without a GPU."""
    if device.type != "cuda":
        return None
    graphs = [captured(partial(decoder, x, segment_len), device) for x in drawn]
    return lambda copy: graphs[copy]


def _call(decoder: Decoder, drawn: list[Step], segment_len: int, device: torch.device) -> float:
    """Milliseconds of one call among many, the CPU's part included."""
    count = 50 if device.type == "cuda" else 1
    synchronize(device)
    begin = time.perf_counter()
    for i in range(count):
        decoder(drawn[i % len(drawn)], segment_len)
    synchronize(device)
    return (time.perf_counter() - begin) / count * 1e3
