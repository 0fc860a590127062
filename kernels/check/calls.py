"""One call of the operation as a value: its sizes and options, the tensors drawn for it, its outputs and gradients.

`segattn check`, the tests and the tuner of tiles describe calls by this class alone.
"""

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
    """Sizes and options of a call. The defaults are small and odd: five segments, the last one unfinished."""

    B: int = 2
    H: int = 4
    G: int = 2
    Tq: int = 23
    Tk: int = 23
    K: int = 6
    V: int = 6
    segment_len: int = 5
    gated: bool = True
    with_state: bool = True
    # tokens that `tensors` writes the incoming state from
    remembered: int = 40
    # memory_q and memory_k differ from q and k
    own_memory_inputs: bool = True
    # q, k and v are transposed views of [B, T, heads, width]
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
    lookback: int = 0
    sinks: int = 0
    # sink_k and sink_v are passed: "sequence", one for each sequence; "segment", one for each of its segments
    own_sinks: str | None = None
    # tokens before k; a tuple: of each sequence
    past: int | tuple[int, ...] = 0
    # each head has a logit of nothing, and a slope of ALiBi
    sink_logits: bool = False
    alibi: bool = False
    seed: int = 0

    @property
    def sequences(self) -> int:
        """The number of sequences, each with a state of its own."""
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def slopes(self, like: Tensor) -> Tensor | None:
        """Return ALiBi's slopes [H] on the device of `like`, steep enough for short segments."""
        if not self.alibi:
            return None
        heads = torch.arange(1, self.H + 1, device=like.device)
        return 0.3 / heads.to(torch.promote_types(like.dtype, torch.float32))

    @property
    def pasts(self) -> tuple[int, ...]:
        """The tokens before k, of each sequence."""
        return self.past[: self.sequences] if isinstance(self.past, tuple) else (self.past,) * max(1, self.sequences)

    def sink_shape(self, width: int) -> tuple[int, ...]:
        """Return the shape of sink_k or sink_v, of `width` columns."""
        segments = (-(-self.Tk // self.segment_len),) if self.own_sinks == "segment" else ()
        return (self.sequences, self.G, *segments, self.sinks, width)


def tensors(call: Call, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Draw the call's tensors: leaves that need gradients, by name, with the same values on every device.

    Args:
        call: the sizes, and the seed.
        dtype: of q, k, v, memory_q and memory_k; the gate and the state are at least float32.
        device: where the tensors are put. They are drawn on the CPU.

    Returns:
        q, k, v; with a gate also gate and, as the call has them, memory_q, memory_k, memory and normalizer; sink_k and
        sink_v if the call passes its own; sink_logits if it has them.
    """
    generator = torch.Generator().manual_seed(call.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    def tokens(heads: int, time: int, width: int) -> Tensor:
        x = normal(call.B, time, heads, width).transpose(1, 2)
        return x if call.token_major else x.contiguous()

    drawn = {
        "q": tokens(call.H, call.Tq, call.K),
        "k": tokens(call.G, call.Tk, call.K),
        "v": tokens(call.G, call.Tk, call.V),
    }
    wide = {}
    if call.sink_logits:
        wide["sink_logits"] = normal(call.H)
    if call.gated:
        wide["gate"] = normal(call.H)
        if call.own_memory_inputs:
            drawn |= {"memory_q": tokens(call.H, call.Tq, call.K), "memory_k": tokens(call.G, call.Tk, call.K)}
        if call.with_state:
            n, G, K, V = call.sequences, call.G, call.K, call.V
            keys = feature_map(normal(n, G, call.remembered, K))
            wide |= {"memory": keys.mT @ normal(n, G, call.remembered, V), "normalizer": keys.sum(2)}
    if call.own_sinks is not None:
        drawn |= {"sink_k": normal(*call.sink_shape(call.K)), "sink_v": normal(*call.sink_shape(call.V))}
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    # in the order in which the operation names them
    made = {name: x.to(dtype) for name, x in drawn.items()} | {name: x.to(at_least_float32) for name, x in wide.items()}
    return {name: x.to(device).detach().requires_grad_() for name, x in made.items()}


def apply(call: Call, made: dict[str, Tensor], backend: str | None = None, **changed: Any) -> dict[str, Tensor]:
    """Run the call on tensors of its shapes and return its outputs: out, and with a gate memory and normalizer.

    Args:
        call: the options.
        made: as `tensors` returns them.
        backend: as `segment_attention` takes it.
        changed: options to pass in place of the call's.
    """
    tokens: dict[str, Any] = dict(made)
    device = made["q"].device
    state = MemoryState(tokens.pop("memory"), tokens.pop("normalizer")) if "memory" in tokens else None
    options: dict[str, Any] = {
        "segment_len": call.segment_len,
        "update": call.update,
        "empty_memory": call.empty_memory,
        "causal": call.causal,
        "num_read": call.num_read,
        "num_write": call.num_write,
        "scale": call.scale,
        "softcap": call.softcap,
        "lookback": call.lookback,
        "sinks": call.sinks,
        "alibi_slopes": call.slopes(made["q"]),
        "past": _offsets(call.pasts, device) if isinstance(call.past, tuple) else call.past,
        "cu_seqlens": _offsets(call.cu_seqlens, device),
        "spans": _offsets(call.spans, device),
        "backend": backend,
    }
    out, after = segment_attention(**tokens, state=state, **(options | changed))
    return {"out": out} if after is None else {"out": out, "memory": after.memory, "normalizer": after.normalizer}


def _offsets(values: tuple[Any, ...] | None, device: torch.device) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def directions(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draw a tensor to project each output on, in its shape and dtype."""
    return {name: _direction(x) for name, x in outputs.items()}


def _direction(x: Tensor) -> Tensor:
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu")
    # in steps of 1/32, which every dtype holds exactly
    return (32 * drawn).round().div(32).to(x.device, x.dtype)


def gradients(outputs: dict[str, Tensor], made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a random projection of all outputs, as d and the input's name; 0 where there is none."""
    loss = torch.zeros((), dtype=torch.float64, device=outputs["out"].device)
    for name, direction in directions(outputs).items():
        loss = loss + (outputs[name] * direction).sum(dtype=torch.float64)
    grads = torch.autograd.grad(loss, list(made.values()), allow_unused=True)
    return {
        f"d{name}": torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(made.items(), grads, strict=True)
    }


def evaluate(call: Call, made: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """Return outputs and gradients of the call on the values of `made`, detached."""
    leaves = {name: x.detach().requires_grad_() for name, x in made.items()}
    outputs = apply(call, leaves, backend)
    return {name: x.detach() for name, x in (outputs | gradients(outputs, leaves)).items()}


def _local(call: Call, made: dict[str, Tensor]) -> Tensor:
    """Return the reference's local attention of a call, with the sink logits that `made` has."""
    tokens = {name: x for name, x in made.items() if name in ("q", "k", "v", "sink_k", "sink_v", "sink_logits")}
    with torch.no_grad():
        return apply(replace(call, gated=False, sink_logits="sink_logits" in tokens), tokens, "reference")["out"]


def gate_gradient_size(call: Call, made: dict[str, Tensor], out: Tensor) -> float:
    """Return the size that the gate's gradient has on average over projections: the root of its squared terms' sum.

    It is the sum of g (1 - g) do (A_mem - A_dot) = (1 - g) do (out - A_dot) over rows and values, whose terms may
    cancel where there are few heads: what is left is then no measure of an error.
    """
    terms = _direction(out) * (out - _local(call, made)) * (1 - made["gate"].detach().sigmoid())[:, None, None]
    return float(terms.norm())


def sink_gradient_size(call: Call, made: dict[str, Tensor]) -> float:
    """Return the size that the gradient of the sink logits has on average over projections, as that of the gate.

    It is the sum of -(1 - w) p do A_dot over rows and values, p being the weight of the sink logit in a row.
    """
    plain = _local(call, {name: x for name, x in made.items() if name != "sink_logits"})
    local = _local(call, made)
    # 0 in rows of padding, where both are
    weight = 1 - ((local * plain).sum(-1, keepdim=True) / plain.square().sum(-1, keepdim=True)).nan_to_num(nan=1.0)
    if call.gated:
        weight = weight * (1 - made["gate"].detach().sigmoid())[:, None, None]
    return float((_direction(local) * weight * local).norm())


def gradient_sizes(call: Call, made: dict[str, Tensor], out: Tensor) -> dict[str, float]:
    """Return the least sizes that errors of gradients are relative to, of those whose terms may cancel."""
    sizes = {"dgate": gate_gradient_size(call, made, out)} if call.gated else {}
    return sizes | ({"dsink_logits": sink_gradient_size(call, made)} if call.sink_logits else {})
