"""Bad input is refused before any work, by a message that names the argument, the requirement and the value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from segattn import MemoryState, segment_attention

B, H, G, T, K, V, L = 2, 4, 2, 12, 6, 5, 4
GATE = torch.zeros(H)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(**changed: Any) -> Any:
    arguments: dict[str, Any] = {"q": x(B, H, T, K), "k": x(B, G, T, K), "v": x(B, G, T, V), "segment_len": L} | changed
    return segment_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


packed = {"q": x(1, H, T, K), "k": x(1, G, T, K), "v": x(1, G, T, V)}
state = MemoryState.zeros(B, G, K, V)
SINK = x(B, G, 3, K)

BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "not a tensor": (TypeError, "q must be a tensor, got list", {"q": [1.0]}),
    "rank": (ValueError, r"k must have 4 dimensions .* got shape \[2, 12, 6\]", {"k": x(B, T, K)}),
    "integer tensor": (TypeError, "v must be bfloat16, .* got torch.int64", {"v": x(B, G, T, V, dtype=torch.int64)}),
    "mixed dtypes": (
        TypeError,
        "k must have q's dtype torch.float32, got torch.float64",
        {"k": x(B, G, T, K).double()},
    ),
    "mixed devices": (ValueError, "k must be on q's device cpu, got meta", {"k": x(B, G, T, K).to("meta")}),
    "batch": (ValueError, "k must have q's batch size 2, got 3", {"k": x(3, G, T, K)}),
    "width": (ValueError, "k must have q's width K = 6, got 7", {"k": x(B, G, T, 7)}),
    "v": (
        ValueError,
        r"v must have shape \[B, G, Tk, V\] = \[2, 2, 12, 5\], got \[2, 1, 12, 5\]",
        {"v": x(B, 1, T, V)},
    ),
    "no width": (ValueError, r"v must have at least one head .* got shape \[2, 2, 12, 0\]", {"v": x(B, G, T, 0)}),
    "heads": (ValueError, "H % G == 0, got H = 4, G = 3", {"k": x(B, 3, T, K), "v": x(B, 3, T, V)}),
    "more queries than keys": (ValueError, "Tq <= Tk positions, got Tq = 13, Tk = 12", {"q": x(B, H, 13, K)}),
    "segment_len": (ValueError, "segment_len must be at least 1, got 0", {"segment_len": 0}),
    "segment_len type": (TypeError, "segment_len must be an integer, got float", {"segment_len": 4.0}),
    "update": (ValueError, "update must be one of 'delta', 'linear', got 'Delta'", {"update": "Delta"}),
    "empty_memory": (ValueError, "empty_memory must be one of 'local', 'gated', got 'zero'", {"empty_memory": "zero"}),
    "backend": (ValueError, "backend must be one of 'triton', 'torch', 'reference', got 'cuda'", {"backend": "cuda"}),
    "gate": (ValueError, r"gate must have shape \[H\] = \[4\], got \[2\]", {"gate": torch.zeros(G)}),
    "gate type": (TypeError, "gate must be a tensor, got float", {"gate": 0.0}),
    "memory_q": (
        ValueError,
        r"memory_q must have shape that of q = \[2, 4, 12, 6\]",
        {"gate": GATE, "memory_q": x(B, G, T, K)},
    ),
    "memory_k": (TypeError, "memory_k must have k's dtype", {"gate": GATE, "memory_k": x(B, G, T, K).half()}),
    "state type": (
        TypeError,
        r"state must be a MemoryState\(memory, normalizer\), got Tensor",
        {"gate": GATE, "state": state.memory},
    ),
    "state shape": (
        ValueError,
        r"state.memory must have shape \[B, G, K, V\] = \[2, 2, 6, 5\], got \[2, 4, 6, 5\]",
        {"gate": GATE, "state": MemoryState.zeros(B, H, K, V)},
    ),
    "state dtype": (
        TypeError,
        "state.memory must be torch.float32, got torch.bfloat16",
        {"gate": GATE, "state": MemoryState.zeros(B, G, K, V, dtype=torch.bfloat16)},
    ),
    "state without gate": (ValueError, "state needs a gate", {"state": state}),
    "decreasing cu_seqlens": (
        ValueError,
        r"cu_seqlens must rise from 0 to T = 12 .* got \[0, 7, 5, 12\]",
        packed | {"cu_seqlens": ints(0, 7, 5, 12)},
    ),
    "cu_seqlens not to T": (
        ValueError,
        r"cu_seqlens must rise from 0 to T = 12 .* got \[0, 7\]",
        packed | {"cu_seqlens": ints(0, 7)},
    ),
    "cu_seqlens not from 0": (ValueError, "cu_seqlens must rise from 0", packed | {"cu_seqlens": ints(1, 12)}),
    "cu_seqlens in a batch": (
        ValueError,
        "cu_seqlens needs one packed row, B = 1, got B = 2",
        {"cu_seqlens": ints(0, 12)},
    ),
    "cu_seqlens rank": (ValueError, r"cu_seqlens must have shape \[N \+ 1\]", packed | {"cu_seqlens": ints([0, 12])}),
    "cu_seqlens dtype": (
        TypeError,
        "cu_seqlens must be int32 or int64, got torch.float32",
        packed | {"cu_seqlens": torch.tensor([0.0, 12.0])},
    ),
    "cu_seqlens type": (
        TypeError,
        "cu_seqlens must be an int32 or int64 tensor, got list",
        packed | {"cu_seqlens": [0, 12]},
    ),
    "spans out of range": (
        ValueError,
        r"spans\[1\] must be .* inside \[0, 12\], got \[3, 13\]",
        {"spans": ints([0, 12], [3, 13])},
    ),
    "negative span": (ValueError, r"spans\[0\] must be .* got \[-1, 12\]", {"spans": ints([-1, 12], [0, 12])}),
    "empty span": (
        ValueError,
        r"spans\[1\] must be .* at least one token .* got \[5, 5\]; drop rows",
        {"spans": ints([0, 12], [5, 5])},
    ),
    "spans shape": (ValueError, r"spans must have shape \[B, 2\] = \[2, 2\], got \[1, 2\]", {"spans": ints([0, 12])}),
    "both": (
        ValueError,
        "cu_seqlens and spans exclude each other",
        packed | {"cu_seqlens": ints(0, 12), "spans": ints([0, 12])},
    ),
    "negative num_read": (ValueError, "num_read must be at least 0, got -1", {"num_read": -1, "segment_len": T}),
    "blocks too long": (
        ValueError,
        r"num_read \+ num_write must not exceed T = 12, got 7 \+ 6",
        {"num_read": 7, "num_write": 6, "segment_len": T},
    ),
    "blocks over segments": (
        ValueError,
        "single segment, T <= segment_len, got T = 12, segment_len = 4",
        {"num_read": 1},
    ),
    "blocks with a gate": (ValueError, "take no gate", {"num_write": 1, "segment_len": T, "gate": GATE}),
    "packed blocks too long": (
        ValueError,
        "at most 8 tokens, got 9",
        packed | {"num_read": 1, "segment_len": 8, "cu_seqlens": ints(0, 9, 12)},
    ),
    "packed blocks too short": (
        ValueError,
        "num_read \\+ num_write = 4 must not exceed a sequence's length, got 3",
        packed | {"num_read": 4, "segment_len": 9, "cu_seqlens": ints(0, 9, 12)},
    ),
    "scale": (ValueError, "scale must be positive and finite, got inf", {"scale": float("inf")}),
    "softcap": (ValueError, "softcap must be positive and finite, or None, got 0", {"softcap": 0}),
    "softcap type": (TypeError, "softcap must be a number or None, got str", {"softcap": "50"}),
    "no scale": (ValueError, "scale must be positive and finite, got 0", {"scale": 0}),
    "causal": (TypeError, "causal must be True or False, got 'no'", {"causal": "no"}),
    "lookback": (ValueError, "lookback must be 0 or 1 segments, got 2", {"lookback": 2}),
    "negative lookback": (ValueError, "lookback must be at least 0, got -1", {"lookback": -1}),
    "lookback type": (TypeError, "lookback must be an integer, got bool", {"lookback": True}),
    "negative sinks": (ValueError, "sinks must be at least 0, got -1", {"sinks": -1}),
    "more sinks than a segment": (ValueError, "sinks must be at most segment_len = 4, got 5", {"sinks": 5}),
    "lookback with the block mask": (
        ValueError,
        "lookback and sinks take no num_read or num_write: .* got lookback = 1, sinks = 0",
        {"lookback": 1, "num_read": 1, "segment_len": T},
    ),
    "sinks with the block mask": (
        ValueError,
        "lookback and sinks take no num_read or num_write: .* got lookback = 0, sinks = 2",
        {"sinks": 2, "num_write": 1, "segment_len": T},
    ),
    "sink_k without sinks": (ValueError, "sink_k needs sinks, .* got sinks = 0", {"sink_k": SINK, "sink_v": SINK}),
    "sink_k alone": (ValueError, "sink_k and sink_v go together", {"sinks": 3, "sink_k": SINK}),
    "sink_v alone": (ValueError, "sink_k and sink_v go together", {"sinks": 3, "sink_v": SINK}),
    "sink_v shape": (
        ValueError,
        r"sink_v must have shape \[N, G, sinks, V\] = \[2, 2, 3, 5\], got \[2, 2, 3, 6\]",
        {"sinks": 3, "sink_k": SINK, "sink_v": SINK},
    ),
    "sink_k of each segment": (
        ValueError,
        r"sink_k must have shape \[N, G, S, sinks, K\] = \[2, 2, 3, 3, 6\], got \[2, 2, 2, 3, 6\]",
        {"sinks": 3, "sink_k": x(B, G, 2, 3, K), "sink_v": x(B, G, 2, 3, V)},
    ),
    "sink_k of packed sequences": (
        ValueError,
        r"sink_k must have shape \[N, G, sinks, K\] = \[3, 2, 3, 6\], got \[2, 2, 3, 6\]",
        packed | {"cu_seqlens": ints(0, 4, 5, 12), "sinks": 3, "sink_k": SINK, "sink_v": x(B, G, 3, V)},
    ),
    "sink_k dtype": (
        TypeError,
        "sink_k must have k's dtype torch.float32, got torch.float64",
        {"sinks": 3, "sink_k": SINK.double(), "sink_v": x(B, G, 3, V)},
    ),
    "sink_v elsewhere": (
        ValueError,
        "sink_v must be on v's device cpu, got meta",
        {"sinks": 3, "sink_k": SINK, "sink_v": x(B, G, 3, V).to("meta")},
    ),
    "past without sink_k": (ValueError, "past needs sink_k and sink_v", {"sinks": 3, "past": 4}),
    "past of rows without sink_k": (ValueError, "past needs sink_k and sink_v", {"sinks": 3, "past": ints(0, 0)}),
    "past between segments": (
        ValueError,
        "past must be 0 or a multiple of segment_len = 4, got 6",
        {"sinks": 3, "sink_k": SINK, "sink_v": x(B, G, 3, V), "past": 6},
    ),
    "past of a row between segments": (
        ValueError,
        r"past must be 0 or multiples of segment_len = 4, got \[4, 6\]",
        {"sinks": 3, "sink_k": SINK, "sink_v": x(B, G, 3, V), "past": ints(4, 6)},
    ),
    "past shape": (ValueError, r"past must have shape \[N\] = \[2\], got \[3\]", {"sinks": 3, "past": ints(0, 4, 8)}),
    "past dtype": (
        TypeError,
        "past must be an integer tensor, got torch.float32",
        {"sinks": 3, "past": torch.zeros(B)},
    ),
    "past type": (TypeError, "past must be an integer, got list", {"sinks": 3, "past": [0, 4]}),
    "negative past": (ValueError, "past must be at least 0, got -4", {"sinks": 3, "past": -4}),
    "sink_logits": (
        ValueError,
        r"sink_logits must have shape \[H\] = \[4\], got \[2\]",
        {"sink_logits": torch.zeros(G)},
    ),
    "sink_logits type": (TypeError, "sink_logits must be a tensor, got int", {"sink_logits": 4}),
    "sink_logits dtype": (
        TypeError,
        "sink_logits must be bfloat16, .* got torch.int32",
        {"sink_logits": ints(*[0] * H)},
    ),
    "sink_logits elsewhere": (
        ValueError,
        "sink_logits must be on q's device cpu, got meta",
        {"sink_logits": GATE.to("meta")},
    ),
    "alibi_slopes": (
        ValueError,
        r"alibi_slopes must have shape \[H\] = \[4\], got \[1, 4\]",
        {"alibi_slopes": GATE[None]},
    ),
    "alibi_slopes type": (TypeError, "alibi_slopes must be a tensor, got bool", {"alibi_slopes": True}),
    "trained alibi_slopes": (
        ValueError,
        r"alibi_slopes must not require gradients, .* pass alibi_slopes.detach\(\)",
        {"alibi_slopes": torch.ones(H, requires_grad=True)},
    ),
    "sparse": (TypeError, "q must be a dense tensor, got torch.sparse_coo", {"q": x(B, H, T, K).to_sparse()}),
    "scale type": (TypeError, "scale must be a number, got Tensor", {"scale": torch.ones(())}),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str, backend: str) -> None:
    kind, message, changed = BAD[name]
    with pytest.raises(kind, match=message):
        call(**({"backend": backend} | changed))


def test_the_base_call_is_good() -> None:
    assert call(gate=GATE, state=state).out.shape == (B, H, T, V)
    assert call(**packed, gate=GATE, cu_seqlens=ints(0, 7, 12).long()).state.memory.shape == (2, G, K, V)
    assert call(spans=ints([0, 12], [3, 9])).state is None
    assert (
        call(gate=GATE, lookback=np.int64(1), sinks=3, sink_k=SINK, sink_v=x(B, G, 3, V), past=8).out.isfinite().all()
    )
    assert call(past=-1.5).state is None  # not looked at without sinks
    assert call(segment_len=np.int64(L), scale=np.float32(0.5)).out.shape == (B, H, T, V)
