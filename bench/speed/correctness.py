"""What a peer computes, held to float64.

At a reduced length everything is compared, of every row and head. At the full length, the far end is: the last
segment of the last row's last key/value head, by the memory before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.check.gates import GATES, RATIO_FROM
from . import attention_calls as calls
from .attention_calls import Function
from .peers import Peer, from_segments
from .prepared import Drawn, draw, gradients_of, inputs_of
from .workloads import DTYPES, Case

# a peer's error may be so many times that of PyTorch's operations in the inputs' dtype
TIMES = 2.5
# the most of that error that counts at a far end
FAR_MOST = 0.1
GRADIENTS = ("dq", "dk", "dv", "dgate")
# tokens for a definition that goes token by token, and at the far end of full attention
TOKENS, TAIL = 256, 64


class WrongError(ValueError):
    """A peer computes something else than it is said to."""


class Deviation(NamedTuple):
    """The relative RMS error of the worst row and head, and the largest that is right."""

    error: float
    allowed: float


class Rule(NamedTuple):
    """Say what is computed, by the fields of `Peer`."""

    update: str | None
    full: bool
    definition: Function | None


Results = Mapping[str, Tensor]


class Reference(NamedTuple):
    """Hold what a case's results are held to, by output.

    expected: The results of the reference in float64.
    sizes: The norms that errors are relative to.
    usual: The errors of PyTorch's operations in the inputs' dtype.
    """

    expected: Results
    sizes: Results
    usual: Mapping[str, float]


Deviations = Mapping[str, Deviation]


def errors_in(found: Deviations) -> dict[str, float]:
    """Return the errors, as they stand in the JSON."""
    return {name: float(f"{x.error:.5g}") for name, x in found.items()}


def worse(first: Deviations, second: Deviations) -> dict[str, Deviation]:
    """Return, of each name, the deviation that takes more of what is allowed; a NaN takes all."""

    def share(x: Deviation) -> float:
        return math.inf if math.isnan(x.error) else x.error / x.allowed

    return {
        name: max((x[name] for x in (first, second) if name in x), key=share)
        for name in dict.fromkeys((*first, *second))
    }


def complaint(found: Deviations) -> str:
    """Return which errors are too large; nothing where none is."""
    beyond = [
        f"{name} {x.error:.1e} (at most {x.allowed:.1e})" for name, x in found.items() if not x.error <= x.allowed
    ]
    return f"relative error of {', '.join(beyond)}" if beyond else ""


def named(peer: Peer, case: Case, result: object) -> dict[str, Tensor]:
    """Return the result of a run of `preparation` by name, as [B, heads, T, width].

    Raises:
        WrongError: The results are not of the right shape and dtype, or not finite.
    """
    if isinstance(result, Tensor):
        found = {"out": result}
        _check_output(peer, case, result)
    elif isinstance(result, Sequence):
        gradients = dict(zip(GRADIENTS, result, strict=False))
        if missing := [name for name in GRADIENTS[:3] if gradients.get(name) is None]:
            raise WrongError(f"{', '.join(missing)} must be tensors, got None")
        # a single segment reads no memory
        found = {name: x for name, x in gradients.items() if x is not None}
    else:
        raise WrongError(f"the output must be a tensor, got {type(result).__name__}")
    for name, x in found.items():
        if not bool(x.isfinite().all()):
            raise WrongError(f"{name} is not finite")
    return {
        name: from_segments(x.detach(), case.B) if peer.of_segments and name != "dgate" else x.detach()
        for name, x in found.items()
    }


def _check_output(peer: Peer, case: Case, out: Tensor) -> None:
    shape = (case.B, case.H, case.T, case.K)
    if peer.of_segments:
        shape = (case.B * case.T // case.L, case.H, case.L, case.K)
    dtype = str(out.dtype).removeprefix("torch.")
    if out.shape != shape or dtype != case.dtype:
        raise WrongError(f"the output must be {list(shape)} of {case.dtype}, got {list(out.shape)} of {dtype}")


def results(peer: Peer, case: Case, drawn: Drawn, gradients: bool) -> dict[str, Tensor]:
    """Return output and gradients of one run."""
    inputs = inputs_of(peer, case, drawn, gradients)
    out = peer.run(*inputs[:4], case.L)
    found = named(peer, case, out)
    if gradients:
        found |= named(peer, case, gradients_of(peer, inputs, out))
    return found


def reduced(peer: Peer, case: Case) -> Case:
    """Return the same case with few segments: what a peer confuses, it confuses there."""
    if peer.definition is not None:
        time = min(case.T, TOKENS)
    elif peer.full:
        time = min(case.T, 2 * case.L)
    else:
        time = case.T if case.T <= 4 * case.L else 3 * case.L
    return Case("reduced", time, case.L, case.K, case.H, case.G, (), case.B, case.dtype)


def at_reduced_length(peer: Peer, case: Case, device: torch.device, gradients: bool) -> dict[str, Deviation]:
    """Return the deviations of the output and every gradient.

    Raises:
        WrongError: The results are not of the right shape and dtype, or not finite.
    """
    small, rule = reduced(peer, case), Rule(peer.update, peer.full, peer.definition)
    found = results(peer, small, _drawn(small, device), gradients)
    expected, sizes, usual = _reference(rule, small, device, gradients)
    return {
        name: Deviation(
            _error(found.get(name, torch.zeros_like(x)), x, sizes[name]), _allowed(peer, case.dtype, name, usual[name])
        )
        for name, x in expected.items()
    }


def _allowed(peer: Peer, dtype: str, name: str, usual: float, far: bool = False) -> float:
    """Return the largest error that is right.

    Ours has gates. A memory in half precision may be worth nothing, and then its error is no measure.
    """
    gates = GATES[dtype]
    gate = gates.outputs if name == "out" else gates.through_delta if peer.update == "delta" else gates.gradients
    eps = torch.finfo(DTYPES[dtype]).eps
    # the gate's gradient is one number for each head, whose error is a matter of luck
    least = max(RATIO_FROM * gate, eps if name == "dgate" else eps / math.sqrt(12))
    if peer.ours:
        return TIMES * gate if far else gate
    # over a long text the roundings of a memory add up
    return TIMES * min(max(usual, least), FAR_MOST if far else 2 * gate)


def _error(found: Tensor, expected: Tensor, size: Tensor) -> float:
    return float((_norms(found.double() - expected) / size.clamp(min=1e-30)).max())


def _norms(x: Tensor) -> Tensor:
    """Return the norm of each row and head; of the gate's gradient, of each head."""
    return x.norm(dim=(-2, -1)) if x.ndim > 1 else x.abs()


@functools.lru_cache(maxsize=4)
def _drawn(case: Case, device: torch.device) -> Drawn:
    return draw(case, device, copies=1)[0]


@functools.lru_cache(maxsize=6)
def _reference(rule: Rule, case: Case, device: torch.device, gradients: bool) -> Reference:
    exact = rule.definition or functools.partial(calls.ours, update=rule.update, backend="reference")
    plain = rule.definition or functools.partial(calls.eager_loop, update=rule.update)
    length, drawn = case.T if rule.full else case.L, _drawn(case, device)
    expected = _by_heads(exact, length, drawn, gradients, torch.float64)
    sizes = {name: _norms(x) for name, x in expected.items()}
    if "dgate" in sizes:
        # a sum that may cancel: its terms' norm
        attention = functools.partial(calls.ours, update=None, backend="reference")
        local = _by_heads(attention, case.L, drawn, False, torch.float64)["out"]
        weight = (1 - drawn.gate.double().sigmoid())[:, None, None]
        terms = drawn.dout.double() * weight * (expected["out"] - local)
        sizes["dgate"] = sizes["dgate"].maximum(terms.square().sum((0, 2, 3)).sqrt())
    found = _by_heads(plain, length, drawn, gradients, DTYPES[case.dtype])
    return Reference(expected, sizes, {name: _error(found[name], x, sizes[name]) for name, x in expected.items()})


def _by_heads(
    function: Function, segment_len: int, drawn: Drawn, gradients: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the results of one row's key/value head after another, so that little memory is needed."""
    members = drawn.q.shape[1] // drawn.k.shape[1]
    like = {"out": drawn.q}
    if gradients:
        like |= {"dq": drawn.q, "dk": drawn.k, "dv": drawn.v, "dgate": drawn.gate}
    found = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in like.items()}
    for row in range(drawn.q.shape[0]):
        for head in range(drawn.k.shape[1]):
            own, one = slice(head * members, (head + 1) * members), slice(head, head + 1)
            q, k, v, gate = (
                x.to(dtype).requires_grad_(gradients)
                for x in (
                    drawn.q[row : row + 1, own].detach(),
                    drawn.k[row : row + 1, one].detach(),
                    drawn.v[row : row + 1, one].detach(),
                    drawn.gate[own].detach(),
                )
            )
            out = function(q, k.expand(-1, members, -1, -1), v.expand(-1, members, -1, -1), gate, segment_len)
            found["out"][row, own] = out[0].detach().double()
            if gradients:
                dout = drawn.dout[row : row + 1, own].to(dtype)
                dq, dk, dv, dgate = torch.autograd.grad(out, (q, k, v, gate), dout, allow_unused=True)
                found["dq"][row, own], found["dk"][row, head], found["dv"][row, head] = dq[0], dk[0, 0], dv[0, 0]
                if dgate is not None:
                    found["dgate"][own] += dgate
    return found


def at_the_far_end(peer: Peer, case: Case, drawn: Drawn, found: Results) -> dict[str, Deviation]:
    """Return the deviations of results at the full length; the gate's gradient is of the whole, and left out."""
    rule = Rule(peer.update, peer.full, peer.definition)
    gradients = "dq" in found and peer.definition is None
    expected, usual = (_far_end(rule, case, drawn, gradients, x) for x in (torch.float64, DTYPES[case.dtype]))
    deviations = {}
    for name in expected.keys() & found.keys():
        wanted = expected[name]
        own = found[name][-1:, -wanted.shape[1] :, -wanted.shape[2] :]
        size = _norms(wanted)
        error, others = _error(own, wanted, size), _error(usual[name], wanted, size)
        deviations[name] = Deviation(error, _allowed(peer, case.dtype, name, others, far=True))
    return deviations


def _far_end(rule: Rule, case: Case, drawn: Drawn, gradients: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the results at the last tokens, by PyTorch's operations in a dtype.

    Neither their output nor its gradients need more of what comes before than the memory, or for full attention the
    keys and values.
    """
    members, gate = case.H // case.G, drawn.gate[-(case.H // case.G) :].to(dtype)
    count = min(TAIL, case.T) if rule.full or rule.definition else case.L
    q, k, v = (x[-1:, -heads:].to(dtype) for x, heads in ((drawn.q, members), (drawn.k, 1), (drawn.v, 1)))
    if rule.definition is not None:
        return {"out": rule.definition(q, k, v, gate, case.L)[:, :, -count:]}
    q_end, k_end, v_end = leaves = [x[:, :, -count:].detach().requires_grad_(gradients) for x in (q, k, v)]
    before = case.T - count
    seen = 0 if rule.full else before
    keys, values = (torch.cat((x[:, :, seen:before], end), 2) for x, end in ((k, k_end), (v, v_end)))
    mask = torch.ones(count, keys.shape[2], dtype=torch.bool, device=q.device).tril(keys.shape[2] - count)
    keys, values = (x.expand(-1, members, -1, -1) for x in (keys, values))
    out = F.scaled_dot_product_attention(q_end, keys, values, attn_mask=mask)
    if rule.update is not None and before:
        memory, normalizer = k.new_zeros(1, 1, case.K, case.K), k.new_zeros(1, 1, case.K)
        for k_s, v_s in zip(*(x[:, :, :before].split(case.L, 2) for x in (k, v)), strict=True):
            memory, normalizer = calls.memory_after(k_s, v_s, memory, normalizer, rule.update)
        asked, g = F.elu(q_end) + 1, gate.sigmoid()[:, None, None]
        out = g * (asked @ memory / (asked @ normalizer.unsqueeze(-1))) + (1 - g) * out
    found = {"out": out.detach()}
    if gradients:
        dout = drawn.dout[-1:, -members:, -count:].to(dtype)
        found |= zip(GRADIENTS, torch.autograd.grad(out, leaves, dout), strict=False)
    return found


def gated(peer: Peer, case: Case, device: torch.device, drawn: Drawn, gradients: bool) -> dict[str, Deviation]:
    """Return the worst deviations of both runs of the gate, and change the sign of v for the run to come.

    Raises:
        WrongError: The results are not of the right shape and dtype, or not finite.
    """
    found = at_reduced_length(peer, case, device, gradients)
    far = at_the_far_end(peer, case, drawn, results(peer, case, drawn, gradients))
    # a peer that remembers this result is then wrong
    drawn.v.neg_()
    return worse(found, far)
