"""The messages between ranks that share a sequence: their settings, and what the memory holds before each of them.

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

from .autocast import autocast_holds


class Ranks(NamedTuple):
    """The processes that share a sequence, each with a run of it, in the order of their ranks in the group."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: object) -> Ranks:
        """Return the ranks of a process group, or of a device mesh with one dimension.

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
        """Return x of every rank, [W, ...]."""
        flat = x.detach().reshape(-1)
        gathered = flat.new_empty(self.size * flat.numel())
        # the name since PyTorch 2.13, and the one before
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered, flat, group=self.group)
        return gathered.view(self.size, *x.shape)


def agree(ranks: Ranks, settings: Mapping[str, object], problem: Exception | None = None, time: int = 0) -> list[int]:
    """Let every rank go on, or none: one collective of 24 bytes per rank.

    Args:
        ranks: the processes that call this together.
        settings: what must be equal on all of them, by name; numbers by value, whatever their type.
        problem: what is wrong with this rank's own call.
        time: tokens that this rank holds.

    Returns:
        The tokens of every rank.

    Raises:
        ValueError: on every rank alike: settings differ, or a rank has a problem, which that rank itself raises as it
            is.
    """
    texts = {name: _as_text(value) for name, value in settings.items()}
    digest = hashlib.blake2b(repr(sorted(texts.items())).encode(), digest_size=7).digest()
    header = torch.tensor([int.from_bytes(digest, "big"), time, problem is not None], device="cpu")
    digests, times, problems = ranks.gather(header.to(quick_device(ranks))).T.tolist()
    if any(problems) or len(set(digests)) > 1:
        raise_on_all_ranks(ranks, texts, problem)
    return times


def agree_on_runs(
    ranks: Ranks, settings: Mapping[str, object], time: int, segment_len: int, problem: Exception | None = None
) -> list[int]:
    """Let every rank go on, as `agree` does, if every rank holds tokens, and all but the last whole segments.

    Raises:
        ValueError: on every rank alike, as `agree`, or naming the rank that does not.
    """
    times = agree(ranks, settings, problem, time)
    for rank, count in enumerate(times):
        if count < 1:
            raise ValueError(
                f"every rank must hold tokens, got none on rank {rank} of {ranks.size}: use fewer ranks for this text"
            )
        if count % segment_len and rank < ranks.size - 1:
            raise ValueError(
                f"every rank but the last must hold whole segments of {segment_len} tokens, got {count} on rank {rank} "
                f"of {ranks.size}: split with segattn.shard_batch"
            )
    return times


def modes(device_type: str) -> dict[str, object]:
    """Return the modes of PyTorch around a call, which must be the same on every rank: settings for `agree`."""
    lowered = torch.get_autocast_dtype(device_type) if autocast_holds(device_type) else "off"
    return {"torch.is_grad_enabled()": torch.is_grad_enabled(), "autocast": lowered}


def quick_device(ranks: Ranks) -> torch.device:
    """Return the CPU where the group can use it, as nothing then waits for a GPU; else the group's device."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(ranks.group).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def _as_text(value: object) -> str:
    """Return a setting as text, the same for 1 and 1.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def raise_on_all_ranks(ranks: Ranks, settings: Mapping[str, str], problem: Exception | None) -> None:
    """Raise what is wrong, on every rank, once all ranks know that something is."""
    mine = dict(settings), None if problem is None else f"{type(problem).__name__}: {problem}"
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


# an argument that keeps an exchange in the graph of ranks where nothing else asks for a gradient
ANCHOR = torch.empty(0, requires_grad=True, dtype=torch.float32, device="cpu")


class Sums(torch.autograd.Function):
    """Prefix sums over ranks: X_0 the start of rank 0, X_1 = S_0, X_{r+1} = X_r + S_r.

    Takes S_r, which on rank 0 includes the start, and the start, which counts on rank 0 alone.
    Returns X_r, and X after the last rank if that is wanted, as by all ranks or by none. Sums are in float64.
    """

    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, anchor: Tensor, sums: Tensor, start: Tensor, want_after: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.ranks = ranks
        gathered = ranks.gather(sums)
        before = _sum(gathered[: ranks.rank]).to(sums.dtype) if ranks.rank else start.clone()
        return before, _sum(gathered).to(sums.dtype) if want_after else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: Tensor, dafter: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        gathered = ranks.gather(torch.stack([dbefore] if dafter is None else [dbefore, dafter]))
        dsums = _sum(gathered[ranks.rank + 1 :, 0])
        if dafter is not None:
            dsums += _sum(gathered[:, 1])
        return None, None, dsums.to(dbefore.dtype), dbefore if ranks.rank == 0 else None, None


class Maps(torch.autograd.Function):
    """Affine maps composed over ranks: X_0 the start of rank 0, X_1 = B_0, X_{r+1} = P_r X_r + B_r.

    Takes [B_r | P_r], [..., K, V + K], whose B_0 includes the start, and the start, which counts on rank 0 alone.
    Returns X_r, [..., K, V], and X after the last rank if that is wanted, as by all ranks or by none. Products are in
    float64, which no setting lowers. What W ranks gather is W times as large as one's, so none of it is kept: the
    backward gathers the P_r again.
    """

    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, anchor: Tensor, maps: Tensor, start: Tensor, want_after: bool
    ) -> tuple[Tensor, Tensor | None]:
        gathered = ranks.gather(maps)
        x = _through(gathered[1 : ranks.rank], gathered[0, ..., : start.shape[-1]].double())
        # copied, so that a part of what was gathered does not keep the whole
        before = (x if ranks.rank else start).to(start.dtype, copy=True)
        after = _through(gathered[max(ranks.rank, 1) :], x).to(start.dtype, copy=True) if want_after else None
        ctx.ranks = ranks
        ctx.save_for_backward(before, maps)
        return before, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: Tensor, dafter: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        before, maps = ctx.saved_tensors
        width = before.shape[-1]
        sent = [maps[..., width:], dbefore, *([] if dafter is None else [dafter])]
        factors, *gradients = ranks.gather(torch.cat(sent, dim=-1)).split([x.shape[-1] for x in sent], dim=-1)
        dx = _sum(gradients[1]) if len(gradients) > 1 else dbefore.new_zeros(dbefore.shape, dtype=torch.float64)
        for rank in range(ranks.size - 1, ranks.rank, -1):
            dx = torch.matmul(factors[rank].double().mT, dx).add_(gradients[0][rank])
        # rank 0 does not pass its start on by P_0, which B_0 includes
        dfactors = dx @ before.double().mT if ranks.rank else dx.new_zeros(factors.shape[1:])
        dmaps = torch.cat([dx, dfactors], dim=-1).to(before.dtype)
        return None, None, dmaps, dbefore if ranks.rank == 0 else None, None


def _sum(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float64)


def _through(maps: Tensor, x: Tensor) -> Tensor:
    """Apply maps [N, ..., K, V + K] to x [..., K, V], one after another."""
    for one in maps:
        added, factors = one.double().tensor_split((x.shape[-1],), dim=-1)
        x = torch.matmul(factors, x).add_(added)
    return x
