"""The losses that training shares: one rule for labels, and sums that no default dtype or device changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from torch_defaults import defaults

from segattn import mean_loss
from segattn.infini.loss import cross_entropy_sum


@pytest.fixture
def group() -> Iterator[Any]:
    """Return a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_targets_may_be_int32() -> None:
    logits, targets = torch.randn(2, 300, 11), torch.randint(11, (2, 300))
    targets[:, :7] = -100
    assert torch.equal(cross_entropy_sum(logits, targets.int()), cross_entropy_sum(logits, targets))


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_the_default_dtype_and_device_change_nothing(other: dict[str, Any], group: Any) -> None:
    logits, targets = torch.randn(2, 300, 11, dtype=torch.float32), torch.randint(11, (2, 300))
    wanted = mean_loss(logits, targets, group)
    torch.testing.assert_close(wanted, cross_entropy_sum(logits, targets) / 600)
    with defaults(**other):
        assert torch.equal(mean_loss(logits, targets, group), wanted)
        with pytest.raises(ValueError, match="shift_labels must be"):
            mean_loss(logits, targets[:1], group)
