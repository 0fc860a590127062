"""Memories in wrappers for data parallelism, in a process of its own: DDP, and FSDP2 with mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

from calls import error
from models import VERSION, make, tokens

from segattn import AssociativeMemory, RecurrentMemory

L = 8


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def memory(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "recurrent":
        return RecurrentMemory(make(), 2, L, **options).train()
    module = AssociativeMemory(make(), 2, L, d_mem=4, **options).train()
    for layer in module.memories.values():
        # they begin at 0
        nn.init.normal_(layer.value.weight, std=0.2)
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    grads = {name: x.grad for name, x in module.named_parameters() if x.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


@pytest.mark.parametrize("kind", ["recurrent", "associative"])
@pytest.mark.parametrize(
    ("time", "options"),
    [
        (L - 2, {}),
        (L, {"bptt": 1}),
        (3 * L, {"bptt": 1}),
        (5 * L - 2, {"bptt": 2, "checkpoint": True}),
        (3 * L, {"checkpoint": True}),
    ],
)
@pytest.mark.parametrize("pieces", [1, 2])
def test_data_parallelism_goes_on_whatever_a_text_leaves_unused(
    kind: str, time: int, options: dict[str, Any], pieces: int
) -> None:
    module = memory(kind, **options)
    wrapped, plain = DistributedDataParallel(module), memory(kind, **options)
    for model in (wrapped, plain):
        for step in range(2):
            state = None
            for piece in range(pieces):
                ids = tokens(2, time, 10 * step + piece)
                out = model(ids, labels=ids, state=state)
                out.loss.backward()
                # a piece ends with a whole segment
                state = out.state.detach() if time % L == 0 else None
    found, wanted = gradients(module), gradients(plain)
    assert set(found) == {name for name, _ in module.named_parameters()}
    for name, grad in wanted.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("kind", ["recurrent", "associative"])
def test_what_a_text_leaves_unused_has_a_gradient_of_zero(kind: str) -> None:
    module, ids = memory(kind), tokens(2, L)
    state = module(ids).state.detach()
    module(ids, state=state, labels=ids).loss.backward()
    unused = [name for name, _ in module.named_parameters() if name == "memory" or ".key." in name or ".value." in name]
    assert unused
    for name, grad in gradients(module).items():
        assert (name in unused) <= (grad == 0).all(), name


def sharded(module: Any) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in module.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(module, mp_policy=policy)


@pytest.mark.skipif(VERSION < (5,), reason="transformers 4 rounds rotary angles to bfloat16 elsewhere")
@pytest.mark.parametrize("kind", ["recurrent", "associative"])
def test_mixed_precision_reads_pieces_as_the_whole(kind: str) -> None:
    plain, whole, pieces, ids = memory(kind), sharded(memory(kind)), sharded(memory(kind)), tokens(2, 4 * L)
    logits = [model(ids).logits.float() for model in (plain, whole)]
    state, parts = None, []
    for piece in ids.split(2 * L, dim=1):
        out = pieces(piece, state=state)
        state = out.state
        parts.append(out.logits.float())
    logits.append(torch.cat(parts, 1))
    # every segment begins with the same bits
    assert torch.equal(logits[2], logits[1])
    assert error(logits[2], logits[0]) < 0.03
    if kind == "associative":
        assert all(part.dtype == torch.float32 for memory in state.memories for part in memory)
    for each in logits:
        each.square().mean().backward()
    wanted, found = gradients(whole), gradients(pieces)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        # the sum over pieces is rounded to bfloat16
        assert error(found[name], grad) < 0.01, name
