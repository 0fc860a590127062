"""Tests of `RecurrentMemory` around a model whose modules FSDP2 shards each by itself, on one rank."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers")

import models

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
