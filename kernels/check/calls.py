"""The calls that `segattn check` compares: one table in two sizes, and the tensors drawn for a call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import segment_attention
from ..reference import feature_map
from ..state import MemoryState


@dataclass(frozen=True)
class Call:
    """Sizes and options of a call."""

    B: int
    H: int
    G: int
    T: int
    K: int
    V: int
    L: int
    remembered: int  # tokens in the incoming memory; 0: none is passed
    asked: int | None = None  # the last positions only
    gated: bool = True
    own_memory_inputs: bool = True
    token_major: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    update: str = "delta"
    empty_memory: str = "local"
    causal: bool = True
    num_read: int = 0
    num_write: int = 0
    scale: float | None = None
    softcap: float | None = None


# for a CPU, and for the interpreter, which takes 10 to 50 milliseconds for every tile of 16 x 16
SMALL = Call(B=1, H=1, G=1, T=21, K=16, V=16, L=16, remembered=40)
FULL = Call(B=2, H=4, G=2, T=1111, K=64, V=64, L=128, remembered=400)

Changes = dict[str, Any]
# a call's name: what it changes in both sizes, in the small one (None: it is not in it), in the full one
TABLE: dict[str, tuple[Changes, Changes | None, Changes]] = {
    "rows": ({}, {"H": 2}, {}),
    "whole segments": ({}, None, {"T": 1024}),
    "no state": ({"remembered": 0}, {"T": 32}, {}),
    "gated when empty": ({"remembered": 0, "empty_memory": "gated"}, {}, {}),
    "linear": ({"update": "linear"}, {}, {}),
    "linear, no state": ({"update": "linear", "remembered": 0}, None, {"T": 1024}),
    "shared memory inputs": ({"own_memory_inputs": False}, {"T": 16}, {}),
    "shared, linear": ({"own_memory_inputs": False, "update": "linear"}, None, {}),
    "token major": ({"token_major": True}, {"T": 9}, {}),
    "scale 1": ({"scale": 1.0}, {"T": 9}, {}),
    "capped": ({"scale": 1.0, "softcap": 5.0}, {"T": 17}, {}),
    # the delta rule overshoots where a memory of few tokens meets a long segment
    "young memory": ({}, {"remembered": 4, "T": 16}, {"remembered": 32}),
    "equal heads": ({}, {"H": 2, "G": 2, "T": 9}, {"G": 4}),
    "four heads to one": ({}, None, {"H": 8}),
    "eight heads to one": ({}, None, {"H": 16, "G": 2, "B": 1}),
    "prefill in pieces": ({}, {"asked": 9}, {"T": 1500, "asked": 777}),
    "one token": ({"T": 1}, {}, {}),
    "decode": ({"asked": 1}, {"T": 13}, {"T": 1531, "L": 2048, "H": 8}),
    "decode over an edge": ({}, {"asked": 3, "T": 18}, {"asked": 5, "T": 131}),
    "decode, linear": ({"asked": 1, "update": "linear"}, {"T": 9}, {"T": 127, "B": 3}),
    "packed": (
        {"B": 1},
        {"T": 18, "cu_seqlens": (0, 1, 1, 18)},
        {"T": 2100, "cu_seqlens": (0, 37, 37, 38, 900, 2100)},
    ),
    "packed, linear, no state": (
        {"B": 1, "update": "linear", "remembered": 0},
        {"T": 22, "cu_seqlens": (0, 17, 22)},
        {"cu_seqlens": (0, 129, 512, 1111)},
    ),
    "packed, last queries": (
        {"B": 1},
        None,
        {"asked": 300, "cu_seqlens": (0, 300, 900, 1111)},
    ),
    "packed, shorter than a segment": (
        {"B": 1},
        {"L": 30, "T": 12, "cu_seqlens": (0, 4, 4, 12)},
        {"L": 700, "cu_seqlens": (0, 5, 600, 1111)},
    ),
    "padding": ({"B": 2}, {"T": 11, "L": 8, "spans": ((3, 11), (0, 5))}, {"spans": ((130, 1111), (0, 600))}),
    "padding, last queries": (
        {"B": 2},
        None,
        {"asked": 200, "spans": ((3, 1111), (999, 1111))},
    ),
    "bidirectional": ({"causal": False}, {"T": 16}, {}),
    "bidirectional, packed": ({"B": 1, "causal": False}, None, {"cu_seqlens": (0, 333, 1111)}),
    "local": ({"gated": False}, {}, {}),
    "local, decode": ({"gated": False}, {"asked": 2, "T": 18}, {"asked": 1, "T": 1000}),
    "local, bidirectional": ({"gated": False, "causal": False}, None, {}),
    "block mask": (
        {"gated": False},
        {"L": 40, "T": 15, "num_read": 3, "num_write": 5},
        {"T": 600, "L": 700, "num_read": 16, "num_write": 20},
    ),
    "block mask, padded": (
        {"B": 2, "gated": False},
        {"T": 12, "L": 12, "num_read": 2, "num_write": 3, "spans": ((0, 12), (3, 10))},
        {"T": 600, "L": 600, "num_read": 16, "num_write": 16, "spans": ((0, 600), (100, 500))},
    ),
    "block mask, packed": (
        {"B": 1, "gated": False},
        None,
        {"T": 1111, "L": 700, "num_read": 16, "num_write": 16, "cu_seqlens": (0, 600, 1111)},
    ),
    "odd segments": ({}, {"L": 11, "T": 11}, {"L": 37, "T": 500}),
    "short segments": ({}, None, {"L": 16}),
    "long segments": ({}, {"L": 20, "T": 20}, {"L": 2048, "T": 4099, "B": 1, "K": 128, "V": 128}),
    "long rows": ({}, None, {"T": 8192, "L": 512, "B": 1, "K": 128, "V": 128}),
    "uneven widths": ({"K": 24}, {"T": 8, "L": 8}, {"V": 80}),
    "wide keys": ({"V": 16}, None, {"K": 96}),
    "wide": ({}, None, {"K": 192, "V": 192}),
    "widest": ({}, None, {"K": 256, "V": 256}),
    "widest, linear": ({"update": "linear"}, None, {"K": 256, "V": 256}),
    "widest, local": ({"gated": False}, None, {"K": 256, "V": 256}),
    "narrowest": ({"K": 16, "V": 16}, None, {}),
}


def calls_of(size: str) -> dict[str, Call]:
    """The table in one size, "small" or "full"."""
    chosen = {name: (both, small if size == "small" else full) for name, (both, small, full) in TABLE.items()}
    base = SMALL if size == "small" else FULL
    return {name: replace(base, **both, **own) for name, (both, own) in chosen.items() if own is not None}


def tensors(call: Call, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The call's tensors by name, in `dtype`: the same values on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def tokens(heads: int, time: int, width: int) -> Tensor:
        x = normal(call.B, time, heads, width).to(device, dtype).transpose(1, 2)
        return x if call.token_major else x.contiguous()

    asked = call.T if call.asked is None else call.asked
    made = {
        "q": tokens(call.H, asked, call.K),
        "k": tokens(call.G, call.T, call.K),
        "v": tokens(call.G, call.T, call.V),
    }
    if not call.gated:
        return made
    made["gate"] = normal(call.H).to(device)
    if call.own_memory_inputs:
        made |= {"memory_q": tokens(call.H, asked, call.K), "memory_k": tokens(call.G, call.T, call.K)}
    if call.remembered:
        sequences = call.B if call.cu_seqlens is None else len(call.cu_seqlens) - 1
        features = feature_map(normal(sequences, call.G, call.remembered, call.K))
        made["memory"] = (features.mT @ normal(sequences, call.G, call.remembered, call.V)).to(device)
        made["normalizer"] = features.sum(2).to(device)
    return made


def _offsets(values: tuple[Any, ...] | None, device: torch.device) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def spread(call: Call, made: dict[str, Tensor], out: Tensor) -> float:
    """The size of the gate's gradient but for the luck of signs: the root of the sum of its terms' squares.

    It sums g (1 - g) do (A_mem - A_dot) = (1 - g) do (out - A_dot) over rows and values.
    """
    local = evaluate(replace(call, gated=False), {name: made[name] for name in ("q", "k", "v")}, "reference")["out"]
    terms = _direction(out) * (out - local) * (1 - made["gate"].sigmoid())[:, None, None]
    return float(terms.norm())


def evaluate(call: Call, made: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs by name, and the gradients, by input, of a random projection of all outputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in made.items()}
    tokens: dict[str, Any] = dict(leaves)
    device = made["q"].device
    state = MemoryState(tokens.pop("memory"), tokens.pop("normalizer")) if "memory" in tokens else None
    out, after = segment_attention(
        **tokens,
        segment_len=call.L,
        state=state,
        update=call.update,
        cu_seqlens=_offsets(call.cu_seqlens, device),
        spans=_offsets(call.spans, device),
        causal=call.causal,
        num_read=call.num_read,
        num_write=call.num_write,
        empty_memory=call.empty_memory,
        scale=call.scale,
        softcap=call.softcap,
        backend=backend,
    )
    outputs = {"out": out} if after is None else {"out": out, "memory": after.memory, "normalizer": after.normalizer}
    found = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [_direction(x) for x in outputs.values()], allow_unused=True
    )
    gradients = {
        f"d{name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), found, strict=True)
    }
    return {name: x.detach() for name, x in (outputs | gradients).items()}


def _direction(x: Tensor) -> Tensor:
    """What x is projected on: in steps of 1/32, which every dtype holds exactly."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return (32 * drawn).round().div(32).to(x.device, x.dtype)
