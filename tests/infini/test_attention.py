"""`InfiniAttention`: streaming, positions, padding, gates, and the parameter groups of an optimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import error
from hypothesis import given, settings
from hypothesis import strategies as st

from segattn import InfiniAttention, parameter_groups
from segattn.infini.demo.decoder import Decoder, DecoderConfig
from segattn.infini.gate import Gate
from segattn.infini.rotary import rotate

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"update": "linear"},
    "grouped": {"kv_heads": 2},
    "normalised": {"qk_norm": True},
    "sequence positions": {"rope": "sequence"},
    "no positions": {"rope": None},
    "write bias": {"write_bias": -1.0},
    "wide heads": {"head_width": 6},
    "gated when empty": {"empty_memory": "gated"},
    "lookback": {"lookback": 1},
    "sinks": {"sinks": 2, "rope": "sequence"},
    "segment positions and as many sinks": {"sinks": 5, "rope": "segment"},
    "lookback and sinks": {"lookback": 1, "sinks": 3, "kv_heads": 2},
    "lookback and sinks without positions": {"lookback": 1, "sinks": 1, "rope": None, "update": "linear"},
    "maps": {"memory_maps": True, "write_bias": -1.0, "lookback": 1},
}


def layer(**options: Any) -> InfiniAttention:
    return InfiniAttention(16, 4, segment_len=5, **options).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 16, dtype=torch.float64)


@settings(max_examples=40)
@given(st.sampled_from(sorted(VARIANTS)), st.sets(st.integers(1, 22), max_size=7))
def test_pieces_equal_the_whole(name: str, cuts: set[int]) -> None:
    """Compare output, state and gradients, whatever the cuts, single tokens included."""
    torch.manual_seed(0)
    attention = layer(**VARIANTS[name])
    x = tokens(2, 23)
    whole, expected = attention(x)
    state, outs = None, []
    for piece in x.tensor_split(sorted(cuts), dim=1):
        out, state = attention(piece, state)
        outs.append(out)
    assert error(torch.cat(outs, 1), whole) < 1e-12
    assert error(state.memory.memory, expected.memory.memory) < 1e-12
    assert error(state.keys, expected.keys) < 1e-12
    assert state.position == expected.position == 23
    assert (state.sink_keys is None) == (expected.sink_keys is None) == (attention.sinks == 0)
    if attention.sinks:
        assert error(state.sink_keys, expected.sink_keys) < 1e-12
        assert error(state.sink_values, expected.sink_values) < 1e-12
    grads = torch.autograd.grad(torch.cat(outs, 1).square().sum(), attention.parameters(), retain_graph=True)
    for got, wanted in zip(grads, torch.autograd.grad(whole.square().sum(), attention.parameters()), strict=True):
        # the gate is float32 in a float64 model too
        assert error(got, wanted) < (1e-10 if got.dtype == torch.float64 else 1e-6)


def test_decoding_token_by_token_equals_one_pass() -> None:
    attention = layer(rope="sequence")
    x = tokens(1, 21)
    state, outs = None, []
    with torch.no_grad():
        for t in range(21):
            out, state = attention(x[:, t : t + 1], state)
            outs.append(out)
            assert state.keys.shape[2] == (t + 1) % 5
        assert error(torch.cat(outs, 1), attention(x)[0]) < 1e-12


def test_the_state_is_constant_in_size() -> None:
    attention = layer()
    sizes = set()
    state = None
    with torch.no_grad():
        for _ in range(4):
            _, state = attention(tokens(2, 502), state)
            sizes.add(
                sum(x.untyped_storage().nbytes() for x in (*state.memory, state.keys, state.values))
                - state.keys.nbytes * 2
            )
    assert sizes == {(2 * 4 * 4 * 4 + 2 * 4 * 4) * 8}
    assert state.position == 2008


@pytest.mark.parametrize("rope", ["segment", "sequence"])
def test_the_memory_never_sees_positions(rope: str) -> None:
    """Change the rotary base: the output changes, and the memory keeps the same bits."""
    torch.manual_seed(1)
    one = layer(rope=rope, rope_base=10_000.0)
    torch.manual_seed(1)
    other = layer(rope=rope, rope_base=10.0)
    x = tokens(1, 20)
    (out, state), (out_other, state_other) = one(x), other(x)
    assert not torch.equal(out, out_other)
    assert torch.equal(state.memory.memory, state_other.memory.memory)
    assert torch.equal(state.memory.normalizer, state_other.memory.normalizer)


def test_rotation_depends_on_distance_alone() -> None:
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(2))
    scores = [(rotate(q, torch.tensor([t + 3]), 100.0) * rotate(k, torch.tensor([t]), 100.0)).sum() for t in (0, 7, 50)]
    assert torch.allclose(torch.stack(scores), scores[0], rtol=1e-5)
    assert torch.equal(rotate(q, torch.tensor([0]), 100.0), q)
    assert error(rotate(q, torch.tensor([5]), 100.0).norm(), q.norm()) < 1e-6


def test_segment_positions_restart() -> None:
    """Repeat a segment: local attention is the same in each, also by positions over the whole text."""
    x = tokens(1, 5).repeat(1, 3, 1)
    for rope in ("segment", "sequence"):
        attention = layer(rope=rope, gate_init=-60.0)
        out, _ = attention(x)
        assert error(out[:, 5:10], out[:, :5]) < 1e-6
        assert error(out[:, 10:], out[:, :5]) < 1e-6


@pytest.mark.parametrize("rope", ["segment", "sequence", None])
@pytest.mark.parametrize(("lookback", "sinks"), [(0, 0), (1, 0), (0, 3), (1, 2)])
def test_a_window_sees_what_it_says_at_the_distances_of_a_cache(lookback: int, sinks: int, rope: str | None) -> None:
    """Compare local attention with a softmax over each token's window and sinks, the sinks just before the window."""
    attention = layer(lookback=lookback, sinks=sinks, rope=rope, gate_init=-60.0, rope_base=30.0)
    x = tokens(1, 18)
    q, k, v = (
        p(x).detach().unflatten(-1, (4, 4)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    expected = []
    for t in range(18):
        begin = max(t // 5 - lookback, 0) * 5
        seen = list(range(begin, t + 1))
        places = [0.0] * 99 if rope is None else [float(j) for j in seen]
        if begin:
            seen = [*range(sinks), *seen]
            places = [0.0] * 99 if rope is None else [float(begin - sinks + j) for j in range(sinks)] + places
        at = torch.tensor(places[: len(seen)], dtype=torch.float64)
        now = torch.tensor([0.0 if rope is None else float(t)], dtype=torch.float64)
        scores = rotate(q[:, :, t : t + 1], now, 30.0) @ rotate(k[:, :, seen], at, 30.0).mT / 2
        expected.append(scores.softmax(-1) @ v[:, :, seen])
    wanted = attention.o_proj(torch.cat(expected, 2).transpose(1, 2).flatten(2))
    assert error(attention(x)[0], wanted) < 1e-10


def test_angles_keep_their_digits_far_into_a_text() -> None:
    """Compare the scores of equal distances at the start and 100 million tokens later."""
    q, k = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(2))
    near, far = (
        rotate(q, torch.arange(3, 7) + t, 1e4) @ rotate(k, torch.arange(4) + t, 1e4).mT for t in (0, 100_000_000)
    )
    assert error(far, near) < 1e-6


def test_memory_maps_are_the_identity_at_first_and_only_the_memory_sees_them() -> None:
    torch.manual_seed(3)
    plain = layer(kv_heads=2)
    mapped = layer(kv_heads=2, memory_maps=True)
    mapped.load_state_dict(plain.state_dict(), strict=False)
    x = tokens(2, 12)
    assert error(mapped(x)[0], plain(x)[0]) < 1e-12
    for module, heads in ((mapped.memory_q_map, 4), (mapped.memory_k_map, 2)):
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
        rows = torch.randn(1, heads, 1, 4, dtype=torch.float64)
        expected = [
            rows[0, h, 0] + rows[0, h, 0] @ module.weight[h] + module.bias[4 * h : 4 * h + 4] for h in range(heads)
        ]
        assert error(module(rows)[0, :, 0], torch.stack(expected)) < 1e-12
    out = mapped(x)[0]
    assert torch.equal(out[:, :5], plain(x)[0][:, :5])
    assert error(out[:, 5:], plain(x)[0][:, 5:]) > 1e-3


def test_weight_decay_pulls_memory_maps_to_the_identity() -> None:
    attention = layer(memory_maps=True)
    groups = parameter_groups(attention, lr=1e-3)
    matrices = {id(p) for p in groups[0]["params"]}
    assert {id(attention.memory_q_map.weight), id(attention.memory_k_map.weight)} <= matrices
    assert not {id(attention.memory_q_map.bias), id(attention.memory_k_map.bias)} & matrices


@pytest.mark.parametrize("rope", ["segment", "sequence"])
@pytest.mark.parametrize("window", [{}, {"lookback": 1, "sinks": 2}, {"sinks": 4}])
def test_padded_and_packed_rows_equal_rows_alone(rope: str, window: dict[str, int]) -> None:
    attention = layer(rope=rope, kv_heads=2, **window)
    x = tokens(2, 13)
    spans = torch.tensor([[4, 13], [0, 11]], dtype=torch.int32)
    out, state = attention(x, spans=spans)
    assert state is None
    for row, (begin, end) in enumerate(spans.tolist()):
        assert error(out[row : row + 1, begin:end], attention(x[row : row + 1, begin:end])[0]) < 1e-12
        assert not out[row, :begin].any()
        assert not out[row, end:].any()
    offsets = torch.tensor([0, 3, 3, 13], dtype=torch.int32)
    out, _ = attention(x[:1], cu_seqlens=offsets)
    for begin, end in ((0, 3), (3, 13)):
        assert error(out[:, begin:end], attention(x[:1, begin:end])[0]) < 1e-12


def test_layers_keep_states_of_their_own() -> None:
    model = Decoder(DecoderConfig(vocabulary=11, segment_len=4, width=16, heads=2))
    states = model(torch.randint(11, (1, 9)))[1].layers
    assert len(states) == 2
    assert error(states[0].memory.memory, states[1].memory.memory) > 0.1


def test_gates_stay_float32() -> None:
    attention = InfiniAttention(16, 4, segment_len=5, gate_init=0.1234567)
    before = attention.gate().detach().clone()
    attention.to(torch.bfloat16)
    assert attention.gate().dtype == torch.float32
    assert torch.equal(attention.gate(), before)
    assert attention.q_proj.weight.dtype == torch.bfloat16
    out, state = attention(torch.randn(1, 12, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert state.memory.memory.dtype == torch.float32
    assert "gate.bias" in attention.state_dict()


def test_gates_are_made_and_read_in_float32() -> None:
    """Make gates under a lower default dtype, and assign a checkpoint in half precision to them."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        attention = InfiniAttention(16, 4, segment_len=5, gate_init=0.1234567)
    finally:
        torch.set_default_dtype(torch.float32)
    assert attention.gate().dtype == torch.float32
    assert attention.gate()[0].item() == pytest.approx(0.1234567, rel=1e-6)
    attention.load_state_dict({k: v.bfloat16() for k, v in attention.state_dict().items()}, assign=True)
    assert attention.gate().dtype == torch.float32


def test_a_gate_gives_away_no_parameter() -> None:
    gate = Gate(3, 0.5)
    beta = gate()
    assert beta.dtype == torch.float32
    assert beta.untyped_storage().data_ptr() != gate.bias.untyped_storage().data_ptr()
    beta.square().sum().backward()
    assert torch.equal(gate.bias.grad, torch.ones(3))


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_gradient_of_a_gate_keeps_its_dtype_when_a_model_is_cast(held: torch.dtype, dtype: torch.dtype) -> None:
    attention = InfiniAttention(16, 4, segment_len=5)
    # as of a checkpoint in half precision that was assigned
    attention.gate.bias = torch.nn.Parameter(attention.gate.bias.detach().to(held))
    optimizer = torch.optim.AdamW(parameter_groups(attention, 1e-3))
    attention(torch.randn(1, 12, 16))[0].sum().backward()
    wanted = attention.gate.bias.grad.float()
    attention.to(dtype)
    assert attention.gate.bias.dtype == torch.float32
    assert torch.equal(attention.gate.bias.grad, wanted)
    optimizer.step()


def test_norms_do_not_warn_under_autocast(recwarn: pytest.WarningsRecorder) -> None:
    attention = InfiniAttention(16, 4, segment_len=5, qk_norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(torch.randn(1, 12, 16))[0].float().sum().backward()
    assert not [w for w in recwarn if "dtype" in str(w.message)]


def test_parameter_groups() -> None:
    options = {"write_bias": -4.0, "qk_norm": True}
    model = Decoder(DecoderConfig(vocabulary=11, segment_len=4, width=16, heads=2, attention=options))
    model.embedding.weight.requires_grad_(False)
    matrices, vectors, gates = parameter_groups(model, lr=1e-3, gate_lr=2e-2, weight_decay=0.1)
    assert [g["lr"] for g in (matrices, vectors, gates)] == [1e-3, 1e-3, 2e-2]
    assert [g["weight_decay"] for g in (matrices, vectors, gates)] == [0.1, 0.0, 0.0]
    assert {id(p) for p in gates["params"]} == {id(block.attention.gate.bias) for block in model.blocks}
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert {id(block.attention.write_bias) for block in model.blocks} <= {id(p) for p in vectors["params"]}
    grouped = [id(p) for g in (matrices, vectors, gates) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    before = gates["params"][0].detach().clone()
    optimiser = torch.optim.AdamW([matrices, vectors, gates])
    model(torch.randint(11, (1, 12)))[0].square().sum().backward()
    optimiser.step()
    with pytest.raises(
        TypeError, match=r"model must be a torch\.nn\.Module, .*, got list: pass the model, not its par"
    ):
        parameter_groups(list(model.parameters()), lr=1e-3)  # type: ignore[arg-type]
    # Adam's first step has the size of the rate
    assert torch.allclose((gates["params"][0] - before).abs(), torch.full_like(before, 2e-2), rtol=1e-3)


def test_truncation_is_where_the_caller_detaches() -> None:
    attention = layer()
    first, second = tokens(1, 10).requires_grad_(), tokens(1, 10)
    _, state = attention(first)
    out, _ = attention(second, state.detach())
    assert torch.autograd.grad(out.sum(), first, allow_unused=True) == (None,)
    out, _ = attention(second, state)
    assert torch.autograd.grad(out.sum(), first)[0].any()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("heads must be a multiple of kv_heads, got 4 and 3", {"kv_heads": 3}),
        ("rope must be one of 'segment', 'sequence', None, got 'yarn'", {"rope": "yarn"}),
        ("head_width must be even for rotary embedding, got 3", {"head_width": 3}),
        ("segment_len must be at least 1, got 0", {"segment_len": 0}),
        ("update must be one of 'delta', 'linear', got 'gated'", {"update": "gated"}),
        ("empty_memory must be one of 'local', 'gated', got None", {"empty_memory": None}),
        ("backend must be one of 'triton', 'torch', 'reference', got 'cpu'", {"backend": "cpu"}),
        ("lookback must be .* got 2", {"lookback": 2}),
        ("sinks must be .* got 6", {"sinks": 6}),
    ],
)
def test_bad_options_are_named_at_construction(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        InfiniAttention(16, 4, **({"segment_len": 5} | options))


def test_bad_calls_are_named() -> None:
    attention = layer()
    _, state = attention(tokens(2, 3))
    spans = torch.tensor([[0, 3], [0, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"width must be a multiple of heads"):
        InfiniAttention(15, 4, segment_len=5)
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, 16\], got \[2, 16\]"):
        attention(tokens(2))
    with pytest.raises(ValueError, match=r"state must be of x's batch size 3, got 2"):
        attention(tokens(3, 3), state)
    with pytest.raises(ValueError, match="state cannot go with spans"):
        attention(tokens(2, 3), state, spans=spans)
    with pytest.raises(ValueError, match=r"state must hold keys .* got \[2, 4, 3, 4\]"):
        InfiniAttention(16, 2, segment_len=5).double()(tokens(2, 3), state)
    with pytest.raises(TypeError, match=r"state must be the InfiniState of an earlier call, got MemoryState"):
        attention(tokens(2, 3), state.memory)
    with pytest.raises(
        ValueError,
        match=r"state must hold the last 2 tokens of its 7 for segments of 5 .* it is of another segment_len",
    ):
        attention(tokens(2, 3), InfiniAttention(16, 4, segment_len=6).double()(tokens(2, 7))[1])
    with pytest.raises(ValueError, match=r"spans must have shape \[B, 2\]"):
        attention(tokens(2, 3), spans=spans[0])
    with pytest.raises(TypeError, match="cu_seqlens must be an int32 or int64 tensor, got list"):
        attention(tokens(1, 3), cu_seqlens=[0, 3])
    with pytest.raises(TypeError, match=r"x must be bfloat16, float16, float32 or float64, got torch.int64"):
        attention(torch.zeros(2, 3, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"state must hold keys of shape \[B, 4, P < 5, 4\], got \[2, 4, 7, 4\]"):
        attention(tokens(2, 3), layer(lookback=1)(tokens(2, 7))[1])
    with pytest.raises(ValueError, match=r"state must hold the last 7 tokens of its 7 .* lookback = 1, got 2 keys"):
        layer(lookback=1)(tokens(2, 3), attention(tokens(2, 7))[1])
    with pytest.raises(ValueError, match=r"state.sink_keys must be \[2, 4, 3, 4\], got none"):
        layer(sinks=3)(tokens(2, 3), attention(tokens(2, 7))[1])
    with pytest.raises(ValueError, match=r"state.sink_keys must be None, got \[2, 4, 3, 4\]"):
        attention(tokens(2, 3), layer(sinks=3)(tokens(2, 7))[1])
    with pytest.raises(TypeError, match="memory_maps must be"):
        InfiniAttention(16, 4, segment_len=5, memory_maps=1)
    with pytest.raises(TypeError, match="heads must be an integer, got float"):
        InfiniAttention(16, 4.0, segment_len=5)


def test_gates_that_nobody_trains_are_noticed() -> None:
    layer = InfiniAttention(16, 2, segment_len=4)
    layer.gate.requires_grad_(False)
    with pytest.warns(UserWarning, match="no gate is trained"):
        parameter_groups(layer, 1e-3)


def test_a_model_without_a_gate_is_noticed(recwarn: pytest.WarningsRecorder) -> None:
    model = torch.nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"model has no gate, .* got a Linear: call segattn\.convert before"):
        groups = parameter_groups(model, 1e-3)
    assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in model.parameters()]
    parameter_groups(InfiniAttention(16, 2, segment_len=4), 1e-3)
    assert not recwarn


@pytest.mark.parametrize("options", [{}, {"memory_maps": True}, {"lookback": 1, "sinks": 3}])
def test_a_text_of_one_segment_gives_every_parameter_a_gradient(options: dict[str, Any]) -> None:
    """Data parallelism waits for the gradients of all parameters, also of those that only later segments use."""
    attention = layer(write_bias=-1.0, qk_norm=True, **options)
    attention(tokens(1, 3))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())
