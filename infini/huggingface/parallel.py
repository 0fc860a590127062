"""Converted models whose texts are spread over processes, and other ways of spreading them, which are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.exchange import Ranks, agree_on_runs, modes
from ...kernels.sequence_parallel import under_context_parallel
from .settings import Conversion, conversion_of, trunk_of

_ON_TRUNK = "segattn_ranks"
_LABELS = "segattn_labels"


@contextmanager
def sequence_parallel(model: nn.Module, group: Any) -> Iterator[None]:
    """Within it, each rank of the group gives the model its own run of the same texts, as `shard_batch` cuts them.

    The ranks exchange the memory before each run, in every layer; nothing else of the model changes. Parameters are
    the same on all of them; gradients are each rank's share, to be added up (`mean_loss` says how). Going backward may
    happen outside. A forward pass takes no cache and no labels, of which it would see this rank's alone: the loss is
    `mean_loss`. Its attention_mask may have zeros after a text's end only.

    Args:
        model: converted, every layer of it; or what wraps it, such as FSDP's or PEFT's.
        group: a `torch.distributed.ProcessGroup`, or one dimension of a `DeviceMesh`, such as mesh["sp"].

    Raises:
        TypeError, ValueError: the model is not converted, or not wholly, or is in such a context already; or `group` is
            no group that this process is in.
    """
    trunk, ranks = trunk_of(model), Ranks.of(group)
    if native := conversion_of(model).native:
        raise ValueError(
            f"model must have every layer converted, as others see the whole text: layers {list(native)} are not "
            "(convert_sliding=True converts those with a sliding window)"
        )
    if _ON_TRUNK in trunk.__dict__:
        raise ValueError("model must not be in a sequence_parallel context already, got one that is")

    def note_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trunk.__dict__[_LABELS] = kwargs.get("labels") is not None

    trunk.__dict__[_ON_TRUNK] = ranks
    # those who compute a loss are around the trunk, which does not see what they are given
    hook = None if model is trunk else model.register_forward_pre_hook(note_labels, with_kwargs=True)
    try:
        yield
    finally:
        del trunk.__dict__[_ON_TRUNK]
        trunk.__dict__.pop(_LABELS, None)
        if hook is not None:
            hook.remove()


def ranks_of(trunk: nn.Module) -> Ranks | None:
    """The processes that share the text of the current pass."""
    return trunk.__dict__.get(_ON_TRUNK)


def refuse_other_schemes() -> None:
    """Refuse schemes known to cut a text behind the model's back, so that its memory begins anew with every part.

    Seen are PyTorch's context_parallel while it is on, but not in a compiled pass, and Accelerate's ParallelismConfig
    with cp_size or sp_size. A text that the caller has cut by other means cannot be told from a short one.

    Raises:
        RuntimeError: one of the two is on.
    """
    if (refusal := under_context_parallel("a converted model's text")) is not None:
        raise refusal
    accelerate = sys.modules.get("accelerate.state")
    config = None if accelerate is None else accelerate.AcceleratorState._shared_state.get("parallelism_config")
    for name in ("cp_size", "sp_size"):
        if (size := getattr(config, name, 1) or 1) > 1:
            raise RuntimeError(
                f"a converted model's text must not be cut by Accelerate's ParallelismConfig({name}={size}): turn it "
                "off, and use segattn.shard_batch and segattn.sequence_parallel"
            )


def begin_on_ranks(
    trunk: nn.Module, conversion: Conversion, ranks: Ranks, given: dict[str, Any], tokens: Tensor
) -> None:
    """Check a pass over this rank's run, on all ranks together, and set its arguments.

    Raises:
        ValueError: on every rank, if any is given what cannot be, or the ranks are given what does not fit together.
    """
    (batch, time), mask = tokens.shape[:2], given.get("attention_mask")
    segment_len = conversion.settings.segment_len
    settings = {
        "conversion": conversion.settings,
        "the batch size": batch,
        "whether the model is in training": trunk.training,
        "whether there is an attention_mask": mask is not None,
        **modes(tokens.device.type),
    }
    problem = _problem(given, mask, batch, time)
    if trunk.__dict__.pop(_LABELS, False):
        problem = ValueError(
            "labels must be left out in sequence_parallel, as each rank would see its own alone: give the logits and "
            "shard_batch's shift_labels to segattn.mean_loss"
        )
    times = agree_on_runs(ranks, settings, time, segment_len, problem)
    first = sum(times[: ranks.rank])
    positions = torch.arange(first, first + time, device=tokens.device)
    if mask is not None:
        _check_gathered(ranks, mask, times)
    given["attention_mask"] = given["past_key_values"] = None
    given["use_cache"] = False
    given["position_ids"] = (positions % segment_len).expand(batch, -1)


def _problem(given: dict[str, Any], mask: Any, batch: int, time: int) -> Exception | None:
    if given.get("past_key_values") is not None or given.get("use_cache"):
        return ValueError("past_key_values and use_cache must be left out in sequence_parallel, which keeps no cache")
    if given.get("cu_seq_lens_q") is not None:
        return ValueError("cu_seq_lens_q must be None in sequence_parallel: each row is one text")
    positions = given.get("position_ids")
    if positions is not None and bool((positions.diff(dim=-1) != 1).any()):
        return ValueError("position_ids must count by ones in sequence_parallel: each row is one text")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (batch, time):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        return ValueError(f"attention_mask must be that of this rank's run, {[batch, time]}, got {got}")
    if bool((mask.bool()[:, 1:] & ~mask.bool()[:, :-1]).any()):
        return ValueError(
            "attention_mask must have zeros after a text's end only in sequence_parallel: pad on the right"
        )
    return None


def _check_gathered(ranks: Ranks, mask: Tensor, times: list[int]) -> None:
    """A text that has ended on one rank must not go on upon the next."""
    counts = ranks.gather(mask.bool().sum(1))
    full = counts == counts.new_tensor(times)[:, None]
    if bool((counts[1:] > 0).logical_and(~full[:-1]).any()):
        raise ValueError(
            "attention_mask must have zeros after a text's end only, got a text that goes on upon later ranks"
        )
