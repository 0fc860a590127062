"""What ranks that share a sequence tell each other: that they agree, and what the memory holds before each of them.

Each exchange is one collective forward and one backward, in which every rank takes part whatever it needs itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh


class Ranks(NamedTuple):
    """The processes that share a sequence, each with a run of it, in the order of their ranks in the group."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: object) -> Ranks:
        """Of a process group, or of a device mesh with one dimension.

        Raises:
            TypeError, ValueError: it is neither, or this process is not in it.
        """
        if isinstance(group, Ranks):
            return group
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group must be one dimension of a mesh, such as mesh['sp'], got {group.ndim}: "
                    f"{group.mesh_dim_names or list(group.shape)}"
                )
            group = group.get_group()
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must hold this process, got one of others")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed.ProcessGroup or one dimension of a DeviceMesh, got "
                f"{type(group).__name__}"
            )
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank, [W, ...]."""
        flat = x.detach().reshape(-1)
        gathered = flat.new_empty(self.size * flat.numel())
        # the name since PyTorch 2.13, and the one before
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered, flat, group=self.group)
        return gathered.view(self.size, *x.shape)


def agree(
    ranks: Ranks,
    settings: Mapping[str, object],
    time: int,
    segment_len: int,
    problem: Exception | None = None,
) -> tuple[int, ...]:
    """Let every rank go on, or none.

    Args:
        ranks: the processes that call this together.
        settings: what must be equal on all of them, by name.
        time: tokens that this rank holds; whole segments, but for the last rank's.
        segment_len: tokens per segment.
        problem: what is wrong with this rank's own call.

    Returns:
        The tokens of every rank.

    Raises:
        ValueError: on every rank alike: settings differ, a rank holds no tokens or a part of a segment, or has a
            problem, which that rank itself raises as it is.
    """
    told = {name: str(value) for name, value in settings.items()}
    digest = hashlib.blake2b(repr(sorted(told.items())).encode(), digest_size=7).digest()
    header = torch.tensor([int.from_bytes(digest, "big"), time, problem is not None])
    digests, times, problems = ranks.gather(header.to(_quick_device(ranks))).T.tolist()
    if any(problems) or len(set(digests)) > 1:
        _tell(ranks, told, problem)
    for rank, held in enumerate(times):
        if held < 1:
            raise ValueError(
                f"every rank must hold tokens, got none on rank {rank} of {ranks.size}: use fewer ranks for this text"
            )
        if held % segment_len and rank < ranks.size - 1:
            raise ValueError(
                f"every rank but the last must hold whole segments of {segment_len} tokens, got {held} on rank {rank} "
                f"of {ranks.size}: split with segattn.shard_batch"
            )
    return tuple(times)


def _quick_device(ranks: Ranks) -> torch.device:
    """The CPU, where the group can use it: nothing then waits for a GPU."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(ranks.group).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def _tell(ranks: Ranks, settings: dict[str, str], problem: Exception | None) -> None:
    """Raise what is wrong, on every rank."""
    mine = settings, None if problem is None else f"{type(problem).__name__}: {problem}"
    everyone: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyone, mine, group=ranks.group)
    if problem is not None:
        raise problem
    for rank, (_, said) in enumerate(everyone):
        if said is not None:
            raise ValueError(f"rank {rank} of {ranks.size} refused its call: {said}")
    first = everyone[0][0]
    for rank, (other, _) in enumerate(everyone):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{name} must be the same on every rank, got {first.get(name)} on rank 0 and {other.get(name)} on "
                    f"rank {rank}"
                )


def anchor() -> Tensor:
    """An argument that keeps an exchange in the graph of ranks where nothing else asks for a gradient."""
    return torch.empty(0, requires_grad=torch.is_grad_enabled())


class Sums(torch.autograd.Function):
    """Prefix sums over ranks: X_0 the start of rank 0, X_1 = S_0, X_{r+1} = X_r + S_r.

    Takes S_r, which on rank 0 includes the start, and the start, which counts on rank 0 alone.
    Returns X_r, and X after the last rank.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, anchor: Tensor, sums: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        ctx.ranks = ranks
        gathered = ranks.gather(sums).double()
        before = start.clone() if ranks.rank == 0 else gathered[: ranks.rank].sum(0).to(sums.dtype)
        return before, gathered.sum(0).to(sums.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        gathered = ranks.gather(torch.stack([dbefore, dafter])).double()
        dsums = gathered[ranks.rank + 1 :, 0].sum(0) + gathered[:, 1].sum(0)
        return None, None, dsums.to(dbefore.dtype), dbefore if ranks.rank == 0 else None


class Maps(torch.autograd.Function):
    """Affine maps composed over ranks: X_0 the start of rank 0, X_1 = B_0, X_{r+1} = P_r X_r + B_r.

    Takes [B_r | P_r], [..., K, V + K], whose B_0 includes the start, and the start, which counts on rank 0 alone.
    Returns X_r, and X after the last rank, [..., K, V]. Products are in float64, which no setting lowers.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, anchor: Tensor, maps: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        width = start.shape[-1]
        gathered = ranks.gather(maps)
        before, x = start.clone(), gathered[0, ..., :width].double()
        for rank in range(1, ranks.size):
            if rank == ranks.rank:
                before = x.to(start.dtype)
            added, kept = gathered[rank].double().tensor_split((width,), dim=-1)
            x = torch.matmul(kept, x).add_(added)
        ctx.ranks = ranks
        # what comes back has passed later ranks only
        ctx.save_for_backward(before, gathered[ranks.rank + 1 :, ..., width:].clone())
        return before, x.to(start.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        before, kept = ctx.saved_tensors
        gathered = ranks.gather(torch.stack([dbefore, dafter]))
        dx = gathered[:, 1].sum(0, dtype=torch.float64)
        for rank in range(ranks.size - 1, ranks.rank, -1):
            dx = torch.matmul(kept[rank - ranks.rank - 1].double().mT, dx).add_(gathered[rank, 0])
        dkept = torch.zeros_like(before @ before.mT) if ranks.rank == 0 else dx @ before.double().mT
        dmaps = torch.cat([dx, dkept], dim=-1).to(before.dtype)
        return None, None, dmaps, dbefore if ranks.rank == 0 else None
