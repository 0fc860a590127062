"""Sequence parallelism of converted models, and other schemes of splitting a text, which are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.exchange import Ranks, agree_on_runs, modes
from ...kernels.sequence_parallel import under_context_parallel
from ..sharding import resumes_after_padding
from .inputs import check_tokens
from .settings import Conversion, conversion_of, trunk_of

_ON_TRUNK = "segattn_ranks"
_LABELS = "segattn_labels"


@contextmanager
def sequence_parallel(model: nn.Module, group: Any) -> Iterator[None]:
    """Let the ranks of a group share texts: in the context each passes its run of the same texts to the model.

    In every layer the ranks exchange the memory before each run, by the equations of `infini/README.md`; nothing else
    of the model changes. All ranks hold the same parameters, call the model together, and pass what `shard_batch`
    returns but for "shift_labels", which go to `mean_loss` with the logits. Each rank gets its share of the gradients,
    to be averaged or added over the ranks (see `mean_loss`). The backward pass may run outside the context.

    A forward pass in the context takes no cache and no labels, and an `attention_mask` with zeros only after a text's
    end; it raises ValueError on every rank if any rank passes another, or if the passes do not fit together.

    Args:
        model: a model with every layer converted, or a model that wraps one, such as FSDP's or PEFT's.
        group: `torch.distributed.ProcessGroup`, or one dimension of a `DeviceMesh`, such as mesh["sp"].

    Raises:
        TypeError: `group` is of another type.
        ValueError: the model is not converted in every layer, or with lookback or sinks, or is in such a context
            already; or this process is not in the group.
    """
    trunk, conversion = trunk_of(model), conversion_of(model)
    if (settings := conversion.settings).lookback or settings.sinks:
        raise ValueError(
            f"model must be converted with lookback=0 and sinks=0 for sequence_parallel, got {settings.lookback} and "
            f"{settings.sinks}, for which ranks would have to see each other's tokens: convert it without, or give "
            "each rank whole texts"
        )
    ranks = Ranks.of(group)
    if native := conversion.native:
        raise ValueError(
            f"model must have every layer converted, as others see the whole text: layers {list(native)} are not "
            "(convert_sliding=True converts those with a sliding window)"
        )
    if _ON_TRUNK in trunk.__dict__:
        raise ValueError("model must not be in a sequence_parallel context already, got one that is")

    def note_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trunk.__dict__[_LABELS] = kwargs.get("labels") is not None

    trunk.__dict__[_ON_TRUNK] = ranks
    # labels go to the model around the trunk, and the hooks of the trunk do not see them
    hook = None if model is trunk else model.register_forward_pre_hook(note_labels, with_kwargs=True)
    try:
        yield
    finally:
        del trunk.__dict__[_ON_TRUNK]
        trunk.__dict__.pop(_LABELS, None)
        if hook is not None:
            hook.remove()


def ranks_of(trunk: nn.Module) -> Ranks | None:
    """Return the processes over which the texts are spread, or None outside of `sequence_parallel`."""
    return trunk.__dict__.get(_ON_TRUNK)


def refuse_other_schemes() -> None:
    """Refuse schemes that split a text without the model's knowledge, whose memory would begin anew with every part.

    They are PyTorch's context_parallel, outside of compiled passes, and Accelerate's ParallelismConfig with cp_size or
    sp_size. Texts that the caller has split by other means look like short texts, and are not noticed.

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
    trunk: nn.Module, conversion: Conversion, ranks: Ranks, inputs: dict[str, Any], tokens: Tensor
) -> int:
    """Check a forward pass over the runs of all ranks together, and set its positions among the inputs.

    Returns:
        The number of columns of all runs together.

    Raises:
        ValueError: on every rank, if the inputs of any rank are refused, or those of all do not fit together.
    """
    problem = _problem(trunk, inputs, tokens)
    batch, time = (0, 0) if problem else tokens.shape[:2]
    mask, segment_len = inputs.get("attention_mask"), conversion.settings.segment_len
    settings = {
        "conversion": conversion.settings,
        "the batch size": batch,
        "whether the model is in training": trunk.training,
        "whether there is an attention_mask": mask is not None,
        **modes(tokens.device.type),
    }
    times = agree_on_runs(ranks, settings, time, segment_len, problem)
    first = sum(times[: ranks.rank])
    positions = torch.arange(first, first + time, device=tokens.device)
    if mask is not None:
        _check_gathered(ranks, mask, times)
    inputs["attention_mask"] = inputs["past_key_values"] = None
    inputs["use_cache"] = False
    inputs["position_ids"] = (positions % segment_len).expand(batch, -1)
    return sum(times)


def _problem(trunk: nn.Module, inputs: dict[str, Any], tokens: Tensor) -> Exception | None:
    """Return why this rank's inputs are refused, or None."""
    if trunk.__dict__.pop(_LABELS, False):
        return ValueError(
            "labels must be left out in sequence_parallel, as each rank would see its own alone: give the logits and "
            "shard_batch's shift_labels to segattn.mean_loss"
        )
    try:
        check_tokens(trunk, inputs)
    except (TypeError, ValueError) as error:
        return error
    if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
        return ValueError("past_key_values and use_cache must be left out in sequence_parallel, which keeps no cache")
    if inputs.get("cu_seq_lens_q") is not None:
        return ValueError("cu_seq_lens_q must be None in sequence_parallel: each row is one text")
    positions = inputs.get("position_ids")
    if positions is not None and bool((positions.diff(dim=-1) != 1).any()):
        return ValueError("position_ids must count by ones in sequence_parallel: each row is one text")
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        return ValueError(f"attention_mask must be that of this rank's run, {list(tokens.shape[:2])}, got {got}")
    if resumes_after_padding(mask):
        return ValueError(
            "attention_mask must have zeros after a text's end only in sequence_parallel: pad on the right"
        )
    return None


def _check_gathered(ranks: Ranks, mask: Tensor, times: list[int]) -> None:
    """Check that no text goes on upon a rank after it has ended on one before."""
    counts = ranks.gather(mask.bool().sum(1))
    full = counts == counts.new_tensor(times)[:, None]
    if bool((counts[1:] > 0).logical_and(~full[:-1]).any()):
        raise ValueError(
            "attention_mask must have zeros after a text's end only, got a text that goes on upon later ranks"
        )
