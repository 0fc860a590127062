"""Sink logits and ALiBi equal what they stand for: a key without a value, and a bias that PyTorch's attention adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import Call, apply, error, for_kernels, gradients, tensors

from segattn import segment_attention, segment_decode

# what each backend computes in, and how far it may be from another way to the same numbers
PRECISE = {"reference": (torch.float64, 1e-12), "torch": (torch.float64, 1e-12), "triton": (torch.float32, 1e-5)}


def drawn(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device).requires_grad_()


@pytest.mark.parametrize("backend", PRECISE)
def test_a_sink_logit_is_a_sink_whose_value_is_zero(backend: str, device: torch.device) -> None:
    """A column more, in which queries hold their head's logit, and one sink that every segment sees, alone hold 1."""
    dtype, limit = PRECISE[backend]
    q, k, v = (drawn(2, n, 21, 16, dtype=dtype, device=device) for n in (4, 2, 2))
    logits = drawn(4, dtype=dtype, device=device)
    options: dict[str, Any] = {"segment_len": 8, "scale": 0.5, "backend": backend}
    found = segment_attention(q, k, v, sink_logits=logits, **options).out
    column = F.pad((logits * 2)[None, :, None, None].expand(2, 4, 21, 1), (0, 7))
    zeros = k.new_zeros(2, 2, 21, 8)
    sink_k, sink_v = (x.new_zeros(2, 2, 1, width) for x, width in ((k, 24), (v, 16)))
    sink_k[..., 16] = 1
    expected = segment_attention(
        torch.cat([q, column], 3), torch.cat([k, zeros], 3), v, sinks=1, sink_k=sink_k, sink_v=sink_v, past=8, **options
    ).out
    assert error(found, expected) < limit
    leaves = (q, k, v, logits)
    grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected))
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < 4 * limit


@pytest.mark.parametrize("backend", PRECISE)
@pytest.mark.parametrize("size", [-80.0, 80.0])
def test_a_logit_may_be_far_from_the_scores(size: float, backend: str, device: torch.device) -> None:
    """Far below it changes nothing; far above it takes all of the weight: by autograd, no gradient is NaN."""
    dtype, limit = PRECISE[backend]
    call = for_kernels(Call(B=1, H=2, G=1, Tq=13, Tk=13, gated=False, sink_logits=True))
    made = tensors(call, dtype, device)
    made["sink_logits"] = torch.full((2,), size, dtype=dtype, device=device, requires_grad=True)
    found = apply(call, made, backend)
    grads = gradients(found, made)
    assert all(x.isfinite().all() for x in grads.values())
    rest = {name: x for name, x in made.items() if name != "sink_logits"}
    plain = apply(replace(call, sink_logits=False), rest, backend)["out"]
    if size < 0:
        assert error(found["out"], plain) < limit
        assert grads["dsink_logits"].abs().max() < 1e-20
    else:
        assert found["out"].abs().max() < 1e-25 < plain.abs().max()


@pytest.mark.parametrize("backend", PRECISE)
@pytest.mark.parametrize("causal", [True, False])
def test_alibi_is_a_bias_of_the_scores(causal: bool, backend: str, device: torch.device) -> None:
    """By PyTorch's attention, of one segment; where it is causal, a key's place times the slope, as in Bloom."""
    dtype, limit = PRECISE[backend]
    q, k, v = (drawn(2, n, 21, 16, dtype=dtype, device=device) for n in (4, 2, 2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=dtype, device=device)
    found = segment_attention(q, k, v, segment_len=21, causal=causal, alibi_slopes=slopes, backend=backend).out
    place = torch.arange(21, device=device)
    bias = place[None] if causal else -(place[:, None] - place[None]).abs()
    mask = slopes[:, None, None] * bias
    if causal:
        mask = mask.expand(4, 21, 21).masked_fill(torch.ones(21, 21, device=device).triu(1).bool(), float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert error(found, expected) < limit
    grads = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected))
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < limit


@pytest.mark.parametrize("backend", PRECISE)
def test_distances_are_those_of_the_window(backend: str, device: torch.device) -> None:
    """Text of 3 segments, the first moved 40 segments back by `past`: sinks stand before the window all the same."""
    dtype, limit = PRECISE[backend]
    call = for_kernels(Call(B=1, H=2, G=1, Tq=5, Tk=10, gated=False, alibi=True, lookback=1, sinks=3))
    call = replace(call, own_sinks="sequence", past=5)
    made = tensors(call, dtype, device)
    near, far = (apply(replace(call, past=n), made, backend)["out"] for n in (5, 200))
    assert torch.equal(near, far)
    # a window of 13 keys in a row, of which the first are the sinks
    k, v = (torch.cat([made[f"sink_{x}"], made[x]], 2) for x in ("k", "v"))
    slopes = call.slopes(made["q"])
    row = segment_attention(made["q"], k, v, segment_len=13, alibi_slopes=slopes, backend=backend).out
    assert error(near, row) < limit
    step = segment_decode(
        made["q"][:, :, -1:].detach(), *(made[x].detach() for x in ("k", "v")), alibi_slopes=slopes,
        sink_k=made["sink_k"].detach(), sink_v=made["sink_v"].detach(), backend=backend,
    )  # fmt: skip
    assert error(step, row[:, :, -1:]) < limit


def test_decoding_wants_no_gradient_of_logits() -> None:
    x = torch.randn(1, 1, 3, 16)
    with pytest.raises(RuntimeError, match="segment_decode has no gradients"):
        segment_decode(x[:, :, :1], x, x, sink_logits=torch.zeros(1, requires_grad=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "options"), [("bloom", {}), ("falcon", {"alibi": True})])
def test_alibi_is_that_of_models(name: str, options: dict[str, Any], padded: bool) -> None:
    """The output projection of Bloom's and Falcon's own attention gets the same, in rows that are no padding."""
    pytest.importorskip("transformers")
    import models

    model, ids, mask = models.make(name, **options).double(), models.tokens(2, 19), torch.ones(2, 19).long()
    # behind the text: before it, rows that see nothing make Bloom's own attention NaN
    mask[0, 19 - 6 * padded :] = 0
    attention = [m for m in model.modules() if type(m).__name__.endswith("Attention")][-1]
    seen: dict[str, torch.Tensor] = {}
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(alibi=kwargs["alibi"] if "alibi" in kwargs else args[1]), with_kwargs=True
    )
    attention.query_key_value.register_forward_hook(lambda _, args, out: seen.update(qkv=out))
    attention.dense.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    split = getattr(attention, "_reshape", None) or attention._split_heads
    q, k, v = (x if x.shape[2] == 19 else x.transpose(1, 2) for x in split(seen["qkv"]))
    bias = seen["alibi"].reshape(2, 4, -1)[1]
    slopes = (bias[:, 2] - bias[:, 1]) * (attention.inv_norm_factor if name == "falcon" else 1)
    spans = torch.stack([torch.zeros(2).long(), mask.sum(1)], 1)
    out = segment_attention(q, k, v, segment_len=19, spans=spans, alibi_slopes=slopes, backend="torch").out
    real = mask.bool()
    assert error(out.transpose(1, 2).flatten(2)[real], seen["out"][real]) < 1e-6
