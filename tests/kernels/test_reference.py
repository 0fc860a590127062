"""The reference equals the definition, written token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from calls import KINDS, Call, apply, tensors
from definition import one_head
from torch import Tensor


def sinks_of_each_segment(
    call: Call, arrays: dict[str, np.ndarray], n: int, g: int, row: int, begin: int, end: int
) -> list[np.ndarray | None]:
    """Return the sinks of one head of sequence n for each of its segments: the first tokens, if none are passed."""
    if not call.sinks:
        return [None, None]
    if call.own_sinks == "segment":
        return [arrays[name][n, g] for name in ("sink_k", "sink_v")]
    if call.own_sinks == "sequence":
        once = [arrays[name][n, g] for name in ("sink_k", "sink_v")]
    else:
        once = [arrays[name][row, g, begin:end][: call.sinks] for name in ("k", "v")]
    return [np.stack([x] * -(-call.Tk // call.segment_len)) for x in once]


def by_definition(call: Call, made: dict[str, Tensor]) -> dict[str, np.ndarray]:
    arrays = {name: x.detach().numpy() for name, x in made.items()}
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    group = call.H // call.G
    slopes = [0.0] * call.H if not call.alibi else call.slopes(made["q"]).tolist()
    out = np.zeros((call.B, call.H, call.Tq, call.V))
    memory = np.zeros((call.sequences, call.G, call.K, call.V))
    normalizer = np.zeros((call.sequences, call.G, call.K))
    first_query = call.Tk - call.Tq
    for n in range(call.sequences):
        begin, end = (0, call.Tk) if call.spans is None else call.spans[n]
        row = n
        if call.cu_seqlens is not None:
            row, (begin, end) = 0, call.cu_seqlens[n : n + 2]
        asked = slice(max(begin - first_query, 0), max(end - first_query, 0))
        for h in range(call.H):
            g = h // group
            m0 = arrays["memory"][n, g] if "memory" in arrays else np.zeros((call.K, call.V))
            z0 = arrays["normalizer"][n, g] if "normalizer" in arrays else np.zeros(call.K)
            sink_k, sink_v = sinks_of_each_segment(call, arrays, n, g, row, begin, end)
            out[row, h, asked], memory[n, g], normalizer[n, g] = one_head(
                q[row, h, asked],
                k[row, g, begin:end],
                v[row, g, begin:end],
                arrays.get("memory_q", q)[row, h, asked],
                arrays.get("memory_k", k)[row, g, begin:end],
                arrays["gate"][h] if call.gated else None,
                m0,
                z0,
                segment_len=call.segment_len,
                update=call.update,
                causal=call.causal,
                num_read=call.num_read,
                num_write=call.num_write,
                empty_memory=call.empty_memory,
                scale=call.scale,
                softcap=call.softcap,
                lookback=call.lookback,
                sink_k=sink_k,
                sink_v=sink_v,
                past=call.pasts[n],
                sink_logit=arrays["sink_logits"][h] if call.sink_logits else None,
                slope=slopes[h],
            )
    return {"out": out, "memory": memory, "normalizer": normalizer} if call.gated else {"out": out}


@pytest.mark.parametrize("name", KINDS)
def test_reference_is_the_definition(name: str) -> None:
    call = KINDS[name]
    made = tensors(call, torch.float64)
    found = apply(call, made, "reference")
    expected = by_definition(call, made)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key].detach().numpy(), value, rtol=1e-11, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    "name",
    [
        "lookback", "window, linear", "window, packed", "sinks of each segment", "sink logits", "alibi, window",
        "alibi, sink logits, window, padding",
    ],
)  # fmt: skip
def test_gradients_of_windows(name: str) -> None:
    """By finite differences, sinks passed and sinks that are the first tokens, and what heads add to their scores."""
    kind = KINDS[name]
    call = replace(kind, B=kind.B if kind.spans else 1, H=2, G=1, K=3, V=2)
    made = tensors(call, torch.float64)

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(apply(call, dict(zip(made, values, strict=True)), "reference").values())

    assert torch.autograd.gradcheck(f, tuple(made.values()), atol=1e-7, rtol=1e-5)


def test_delta_subtracts_what_the_memory_returns() -> None:
    """One key written twice with values 1 then 3, by hand: M = σ(k)·1, then M + σ(k)(3 − 1)."""
    k = torch.zeros(1, 1, 2, 1, dtype=torch.float64)  # σ(0) = 1
    v = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 2, 1)
    call = Call(B=1, H=1, G=1, Tq=2, Tk=2, K=1, V=1, segment_len=1)
    made = {"q": k, "k": k, "v": v, "gate": torch.zeros(1, dtype=torch.float64)}
    delta = apply(call, made, "reference")
    linear = apply(call, made, "reference", update="linear")
    assert delta["memory"].item() == 1 + (3 - 1)
    assert linear["memory"].item() == 1 + 3
    assert delta["normalizer"].item() == linear["normalizer"].item() == 2
    # the second token: local value 3, recalled value 1, half each
    assert delta["out"].flatten().tolist() == [1.0, 2.0]
