"""The calls that are executed: every kind that the kernels know, small enough for a CPU, in widths of every class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.check.calls import Call, apply, evaluate, gate_gradient_size, gradients, tensors
from ...kernels.check.gates import GATES, OUTPUTS
from ...kernels.decoding import segment_decode
from ...kernels.memory import memory_read, memory_write
from ...kernels.reference import feature_map
from ...kernels.state import MemoryState
from ..planner import floors
from ..planner.floors import Sizes, Work

Values = dict[str, Tensor]


class Case(NamedTuple):
    """A call: how its tensors are drawn, and what it returns; gradients as d and the input's name."""

    draw: Callable[[torch.dtype], Values]
    # tensors, backend → outputs and gradients
    evaluate: Callable[[Values, str], Values]
    # an output's name, a dtype's name → the largest relative error
    gate: Callable[[str, str], float]
    # the tensors, what is expected → output → the least size that its error is relative to
    least: Callable[[Values, Values], dict[str, float]] = lambda made, expected: {}
    # bytes of an element → what any implementation must spend; None: not known
    floor: Callable[[int], Work] | None = None


def attention(**changes: object) -> Case:
    """Return a call of `segment_attention`, forward and backward: three segments of 37 tokens, the last unfinished."""
    call = replace(_BASE, **({"Tq": changes.get("Tk", _BASE.Tk)} | changes))  # type: ignore[arg-type]
    return Case(
        draw=lambda dtype: tensors(call, dtype),
        evaluate=lambda made, backend: evaluate(call, made, backend),
        gate=lambda output, dtype: GATES[dtype].of(output, call),
        least=lambda made, expected: {"dgate": gate_gradient_size(call, made, expected["out"])} if call.gated else {},
    )


def whole(width: int) -> Case:
    """Return a call of whole tiles and segments from an empty memory, whose floor is known."""
    H, G, T, L = (4, 2, 512, 256) if width <= 64 else (2, 1, 512, 256)

    def floor(itemsize: int) -> Work:
        sizes = Sizes(1, H, G, T, width, width, L, itemsize)
        return floors.forward(sizes, "delta") + floors.backward(sizes, "delta")

    return attention(H=H, G=G, Tk=T, segment_len=L, K=width, V=width, with_state=False)._replace(floor=floor)


def inference(**changes: object) -> Case:
    """Return a call of `segment_attention` without gradients, for which the kernels keep nothing."""
    call = replace(_BASE, **({"Tq": changes.get("Tk", _BASE.Tk)} | changes))  # type: ignore[arg-type]

    def run(made: Values, backend: str) -> Values:
        with torch.no_grad():
            return apply(call, made, backend)

    return Case(lambda dtype: tensors(call, dtype), run, lambda output, dtype: GATES[dtype].outputs)


@dataclass(frozen=True)
class Step:
    """A call of `segment_decode`, from buffers that are partly filled with NaN."""

    H: int = 6
    G: int = 2
    Tq: int = 1
    L: int = 140
    K: int = 64
    V: int = 64
    lengths: tuple[int, ...] = (133, 9)
    gated: bool = True
    causal: bool = True
    softcap: float | None = None
    sink_logits: bool = False
    alibi: bool = False


def decoding(**changes: object) -> Case:
    """Return a call of `segment_decode` with several splits."""
    step = replace(Step(), **changes)  # type: ignore[arg-type]

    def draw(dtype: torch.dtype) -> Values:
        call = Call(len(step.lengths), step.H, step.G, step.Tq, step.L, step.K, step.V, gated=step.gated)
        call = replace(call, sink_logits=step.sink_logits)
        made = {name: x.detach() for name, x in tensors(call, dtype).items() if name != "memory_k"}
        for row, length in enumerate(step.lengths):
            for name in ("k", "v"):
                made[name][row, :, length:] = torch.nan
        return made

    def run(made: Values, backend: str) -> Values:
        rest = dict(made)
        state = MemoryState(rest.pop("memory"), rest.pop("normalizer")) if step.gated else None
        lengths = torch.tensor(step.lengths, dtype=torch.int32, device=made["q"].device)
        options = {"causal": step.causal, "softcap": step.softcap, "backend": backend}
        options["alibi_slopes"] = Call(H=step.H, alibi=step.alibi).slopes(made["q"])
        return {"out": segment_decode(**rest, lengths=lengths, state=state, **options)}  # type: ignore[arg-type]

    return Case(draw, run, lambda output, dtype: GATES[dtype].outputs)


@dataclass(frozen=True)
class Turn:
    """A `memory_write` into a state, and a `memory_read` of what comes of it."""

    H: int = 4
    G: int = 2
    T: int = 69
    K: int = 64
    V: int = 64
    update: str = "delta"
    strengths: bool = True
    corrected: bool = False
    mapped: bool = False


def memory(**changes: object) -> Case:
    """Return a write and a read of the memory alone, forward and backward."""
    turn = replace(Turn(), **changes)  # type: ignore[arg-type]
    features = None if turn.mapped else "elu1"

    def draw(dtype: torch.dtype) -> Values:
        call = Call(1, turn.H, turn.G, turn.T, turn.T, turn.K, turn.V, own_memory_inputs=False)
        made = {name: x.detach() for name, x in tensors(call, dtype).items() if name != "gate"}
        if turn.corrected:
            # a memory of many tokens knows every key: each γ would be 0
            made |= {name: made[name] / 80 for name in ("memory", "normalizer")}
        if turn.mapped:
            made |= {name: feature_map(made[name].float()).to(dtype) for name in ("q", "k")}
        if turn.strengths:
            made["beta"] = torch.rand(1, turn.G, turn.T, generator=torch.Generator().manual_seed(2))
        return {name: x.requires_grad_() for name, x in made.items()}

    def run(made: Values, backend: str) -> Values:
        leaves = {name: x.detach().requires_grad_() for name, x in made.items()}
        before = MemoryState(leaves["memory"], leaves["normalizer"])
        after = memory_write(
            leaves["k"], leaves["v"], before, update=turn.update, beta=leaves.get("beta"), corrected=turn.corrected,
            feature_map=features, backend=backend,
        )  # fmt: skip
        out = memory_read(leaves["q"], after, feature_map=features, backend=backend)
        outputs = {"out": out, "memory": after.memory, "normalizer": after.normalizer}
        return {name: x.detach() for name, x in (outputs | gradients(outputs, leaves)).items()}

    def gate(output: str, dtype: str) -> float:
        gates = GATES[dtype]
        if output in OUTPUTS:
            return gates.outputs
        return gates.through_delta if turn.update == "delta" else gates.gradients

    return Case(draw, run, gate)


_BASE = Call(B=1, H=4, G=2, Tq=101, Tk=101, K=64, V=64, segment_len=37, remembered=200)
_PACKED = {"Tk": 150, "cu_seqlens": (0, 37, 37, 38, 75, 150)}
_MASK = {"gated": False, "segment_len": 150, "num_read": 9, "num_write": 17}

CASES: dict[str, Case] = {
    "delta": attention(),
    "linear": attention(update="linear"),
    "local": attention(gated=False),
    "shared inputs": attention(own_memory_inputs=False),
    "shared inputs linear": attention(own_memory_inputs=False, update="linear"),
    "young memory": attention(remembered=4),
    "no state": attention(with_state=False),
    "gated when empty": attention(with_state=False, empty_memory="gated", H=2, G=2),
    "token major scale 1": attention(token_major=True, scale=1.0, H=2, G=1),
    "long segments": attention(Tk=300, segment_len=200, H=2, G=1),
    "whole tiles K64": whole(64),
    "whole tiles K128": whole(128),
    "one token": attention(Tk=1, H=1, G=1),
    "pieces": attention(Tk=150, Tq=50),
    "softcap": attention(scale=1.0, softcap=5.0),
    "bidirectional": attention(causal=False),
    "bidirectional local": attention(causal=False, gated=False),
    "packed": attention(**_PACKED),
    "packed linear last queries": attention(**_PACKED, update="linear", with_state=False, Tq=60),
    "padding": attention(B=2, spans=((3, 101), (0, 60))),
    "padding last queries": attention(B=2, spans=((3, 101), (90, 101)), Tq=40, update="linear"),
    "block mask": attention(Tk=150, **_MASK),
    "block mask packed softcap": attention(Tk=150, **_MASK, cu_seqlens=(0, 61, 150), softcap=5.0),
    "lookback": attention(lookback=1),
    "lookback packed": attention(**_PACKED, lookback=1),
    "sinks": attention(sinks=4, own_sinks="segment"),
    "window": attention(lookback=1, sinks=4, own_sinks="segment"),
    "window local K24 V40": attention(lookback=1, sinks=17, own_sinks="segment", gated=False, K=24, V=40),
    "window K128 V128": attention(lookback=1, sinks=4, own_sinks="segment", K=128, V=128, H=2, G=1),
    "sink logits": attention(sink_logits=True),
    "sink logits local K128 V128": attention(sink_logits=True, gated=False, K=128, V=128, H=2, G=1),
    "alibi": attention(alibi=True),
    "alibi sink logits window": attention(alibi=True, sink_logits=True, lookback=1, sinks=4, own_sinks="segment"),
    "inference": inference(),
    "inference packed local": inference(**_PACKED, gated=False),
    "decode": decoding(),
    "decode three queries": decoding(Tq=3, lengths=(131, 2), softcap=5.0),
    "decode local": decoding(gated=False, causal=False, Tq=2),
    "decode alibi sink logits": decoding(alibi=True, sink_logits=True),
    "memory": memory(),
    "memory linear": memory(update="linear", strengths=False),
    "memory corrected": memory(corrected=True),
    "memory mapped": memory(mapped=True, update="linear", corrected=True),
    "K16 V16": attention(K=16, V=16),
    "K24 V40": attention(K=24, V=40),
    "K80 V72": attention(K=80, V=72, H=2, G=1),
    "K128 V128": attention(K=128, V=128, H=2, G=1),
    "K136 V64": attention(K=136, V=64, H=2, G=1, update="linear"),
    "K256 V256": attention(K=256, V=256, H=2, G=1),
    "K200 V256 local": attention(K=200, V=256, H=2, G=1, gated=False),
    "decode K24 V40": decoding(K=24, V=40),
    "decode K128 V128": decoding(K=128, V=128),
    "decode K256 V256": decoding(K=256, V=256, H=2, G=1),
    "memory K24 V40": memory(K=24, V=40),
    "memory K128 V128": memory(K=128, V=128, H=2, G=1),
    "memory K256 V256": memory(K=256, V=256, H=2, G=1),
}
# every kernel once
QUICK = ("delta", "window", "decode", "memory corrected")
# whose instructions and traffic say something of large calls
COUNTED = ("whole tiles K64", "whole tiles K128", "decode", "memory corrected")
# of which a device keeps the bits of the outputs
RECORDED = (
    "delta", "linear", "local", "packed", "padding", "block mask", "softcap", "decode", "memory corrected",
    "K24 V40", "K128 V128", "K256 V256",
)  # fmt: skip
