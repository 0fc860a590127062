"""FSDP2 in a process of its own: pieces, caches, states and gates under its hooks, and under mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

transformers = pytest.importorskip("transformers")

from calls import error
from models import make, open_gates, tokens
from sharding import HALF, shard, shard_gates_apart

import segattn

L = 8
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
# the whole model, one layer of two, and all layers but one with a sliding window
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "whole": ("llama", {}, {}),
    "one layer": ("llama", {}, {"layers": [0]}),
    "windows": ("llama", {}, {"lookback": 1, "sinks": 3, "memory_maps": True}),
    "sliding": ("gemma3_text", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}, {}),
}


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_of(kind: str) -> Any:
    name, changes, options = MODELS[kind]
    model = segattn.convert(make(name, **changes), L, quiet=True, **options)
    open_gates(model)
    return model.train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def worst(mine: nn.Module, other: nn.Module) -> float:
    """Return the largest error among the gradients of two models."""
    found, wanted = gradients(mine), gradients(other)
    assert found.keys() == wanted.keys()
    return max(error(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("kind", "checkpointed"), [*((kind, False) for kind in MODELS), ("whole", True)])
def test_pieces_have_the_gradient_of_one_process(kind: str, checkpointed: bool) -> None:
    ids, plain, spread = tokens(1, 40), model_of(kind), shard(model_of(kind))
    for model in (plain, spread):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        segattn.backward_in_pieces(model, ids, 10)
    assert worst(spread, plain) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_mixed_precision_in_pieces_is_that_of_the_whole_text(kind: str) -> None:
    ids, plain = tokens(1, 40), model_of(kind)
    plain(ids, labels=ids, use_cache=False).loss.backward()
    spread = shard(model_of(kind), mp_policy=BFLOAT16)
    segattn.backward_in_pieces(spread, ids, 10)
    assert worst(spread, plain) < 0.05


@pytest.mark.parametrize("kind", MODELS)
def test_mixed_precision_keeps_the_memory_in_float32(kind: str) -> None:
    model, ids = shard(model_of(kind), mp_policy=BFLOAT16).eval(), tokens(2, 20)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        before = {layer: state.memory for layer, state in cache.states.items()}
        model(ids[:, :1], past_key_values=cache)
    for layer, state in cache.states.items():
        assert state.memory.memory.dtype == torch.float32
        # no segment was completed
        assert all(torch.equal(x, y) for x, y in zip(state.memory, before[layer], strict=True))


@pytest.mark.parametrize("kind", MODELS)
def test_mixed_precision_generates(kind: str) -> None:
    model, ids = shard(model_of(kind), mp_policy=BFLOAT16).eval(), tokens(1, 20)
    read = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert read.shape == (1, 32)


def test_a_static_cache_generates() -> None:
    plain, spread, ids = model_of("whole").eval(), shard(model_of("whole")).eval(), tokens(2, 20)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found = spread.generate(ids, past_key_values=segattn.StaticInfiniCache(spread, 2), **options)
    assert torch.equal(found, plain.generate(ids, **options))


class Echo(nn.Module):
    """A module around a layer, which hands a state on as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = segattn.InfiniAttention(32, 4, kv_heads=2, segment_len=L)

    def forward(self, x: Tensor, state: segattn.InfiniState) -> tuple[Tensor, segattn.InfiniState]:
        return x, state


@pytest.mark.parametrize("policy", [BFLOAT16, MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16)])
def test_a_state_passes_a_module_bit_for_bit(policy: MixedPrecisionPolicy) -> None:
    model, x = Echo(), torch.randn(2, 20, 32)
    state = model.layer(x)[1].detach()
    fully_shard(model, mp_policy=policy)
    cast, passed = model(x, state)
    assert cast.dtype == torch.bfloat16
    assert isinstance(passed.memory, segattn.MemoryState)
    for mine, wanted in zip(passed.memory, state.memory, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, wanted)


def test_a_layer_in_mixed_precision_reads_pieces_as_the_whole() -> None:
    def layer() -> segattn.InfiniAttention:
        torch.manual_seed(0)
        return segattn.InfiniAttention(32, 4, kv_heads=2, segment_len=L, write_bias=-1.0)

    x, plain, spread = torch.randn(2, 29, 32), layer(), layer()
    wanted, _ = plain(x)
    wanted.square().sum().backward()
    fully_shard(spread, mp_policy=BFLOAT16)
    state, outs = None, []
    for piece in x.split(10, dim=1):
        out, state = spread(piece, state)
        outs.append(out.float())
    found = torch.cat(outs, 1)
    found.square().sum().backward()
    assert state.memory.memory.dtype == torch.float32
    assert error(found, wanted) < 0.02
    assert worst(spread, plain) < 0.05


@pytest.mark.parametrize("kind", ["whole", "windows"])
@pytest.mark.parametrize("way", HALF)
def test_half_precision_weights_beside_float32_gates(way: str, kind: str) -> None:
    ids, plain, spread = tokens(1, 40), model_of(kind).bfloat16(), model_of(kind).bfloat16()
    HALF[way](spread)
    for model in (plain, spread):
        for _ in range(2):
            segattn.backward_in_pieces(model, ids, 10)
    gate = spread.model.layers[0].self_attn.segattn_gate.bias
    assert gate.dtype == gate.grad.dtype == torch.float32
    assert worst(spread, plain) < (1e-6 if way == "gates apart" else 0.05)


def test_a_gate_that_is_sharded_by_itself_frees_nothing_that_is_in_use() -> None:
    ids, plain, spread = tokens(1, 40), model_of("whole"), model_of("whole")
    shard_gates_apart(spread)
    for model in (plain, spread):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert worst(spread, plain) < 1e-6


def test_gates_that_are_partitioned_outside_of_their_calls() -> None:
    """Partition each module's parameters, as ZeRO-3 does: they are whole from a call's beginning to its end alone."""
    ids, plain, spread = tokens(1, 40), model_of("whole"), model_of("whole")
    gates = [layer.self_attn.segattn_gate for layer in spread.model.layers]
    held = [gate.bias.detach().clone() for gate in gates]

    def gather(gate: Any, whole: Tensor) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            gate.bias.data = whole.clone()

        return hook

    def partition(gate: Any) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # what still looks at the memory reads nonsense
            gate.bias.data.fill_(torch.nan)
            gate.bias.data = torch.empty(0)

        return hook

    for gate, whole in zip(gates, held, strict=True):
        partition(gate)()
        gate.register_forward_pre_hook(gather(gate, whole))
        gate.register_forward_hook(partition(gate))
    losses = [model(ids, labels=ids, use_cache=False).loss for model in (plain, spread)]
    assert torch.equal(*losses)
    for gate, whole in zip(gates, held, strict=True):
        assert gate.bias.shape == (0,)
        # before a backward pass, whole again
        gather(gate, whole)()
    for loss in losses:
        loss.backward()
    assert worst(spread, plain) < 1e-6
