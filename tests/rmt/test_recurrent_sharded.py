"""Tests of memories of which FSDP2 shards some modules each by itself, on one rank."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers")

import models

from segattn.rmt.associative.memory import AssociativeMemory
from segattn.rmt.recurrent.memory import RecurrentMemory


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_modules_that_are_sharded_each_by_itself_read_as_before() -> None:
    whole, ids = RecurrentMemory(models.make(), 2, 8), models.tokens(2, 30)
    sharded = copy.deepcopy(whole)
    trunk = sharded.model.model
    for module in (trunk.embed_tokens, *trunk.layers, trunk, sharded.model, sharded):
        fully_shard(module)
    for module in (whole, sharded):
        module(ids, labels=ids).loss.backward()
    parts = dict(sharded.named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parts[name].grad.full_tensor(), parameter.grad), name


@pytest.mark.parametrize("around", [False, True], ids=["alone", "then the whole"])
@pytest.mark.parametrize("schedule", ["vertical", "diagonal"])
def test_memories_of_layers_that_are_sharded_each_by_itself_read_as_before(schedule: str, around: bool) -> None:
    whole, ids = AssociativeMemory(models.make(), 2, 8, schedule=schedule), models.tokens(2, 30)
    with torch.no_grad():
        for memory in whole.memories.values():
            memory.value.weight.normal_(generator=torch.Generator().manual_seed(0))
    sharded = copy.deepcopy(whole)
    for memory in sharded.memories.values():
        fully_shard(memory)
    if around:
        fully_shard(sharded)
    for module in (whole, sharded):
        module(ids, labels=ids).loss.backward()
    parts = dict(sharded.named_parameters())
    for name, parameter in whole.named_parameters():
        grad = parts[name].grad
        assert torch.equal(grad.full_tensor() if isinstance(grad, DTensor) else grad, parameter.grad), name
    if not around:
        assert torch.equal(sharded.generate(ids, max_new_tokens=3), whole.generate(ids, max_new_tokens=3))
