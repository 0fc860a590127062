"""What `RecurrentMemory` and `AssociativeMemory` share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..runs.untrained import warn_untrained_piece, without_memory
from .checkpointing import Checkpointing
from .generation import TextGeneration
from .trainer import missing


class MemoryModule(TextGeneration, Checkpointing, nn.Module):
    """A model with a trainable memory around it.

    Attributes:
        model: another one that fits may be assigned, such as the same with adapters.
        settings: a frozen dataclass of the constructor's arguments.
    """

    model: nn.Module

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers a submodule without calling a property's setter
        if name == "model" and "model" in self._modules:
            self._fit(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if (error := missing(name, type(self).__name__)) is not None:
            raise error
        return super().__getattr__(name)

    def _fit(self, model: nn.Module) -> None:
        """Check that `model` can take the present one's place, and note how it is called.

        Raises:
            TypeError, ValueError: it cannot; the memory is unchanged.
        """
        raise NotImplementedError

    def _refuse_graph(self, instead: str) -> None:
        """Refuse to become one graph; without fullgraph=True, torch.compile then leaves the call as it is.

        Raises:
            ValueError: the call is being compiled.
        """
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{type(self).__name__} must not be compiled whole, by torch.compile(fullgraph=True) or torch.export, "
                f"since its loop over segments follows the lengths of the texts: {instead}"
            )

    def _warn_untrained(self, rows: list[tuple[int, int]], state: Any) -> None:
        """Warn once of training on texts of one segment, given the columns at which each row begins and ends."""
        limit = without_memory(self.settings.segment_len)
        warn_untrained_piece(self, state is not None, limit, lambda: max(end - begin for begin, end in rows))


def draw_memory_tokens(embeddings: Tensor, count: int) -> nn.Parameter:
    """Return `count` random vectors [m, d], as far from zero as embeddings [vocabulary, d], among which they stand."""
    spread = embeddings.detach().float().std()
    # of the CPU's generator in float32, whatever the defaults, so that a seed gives the same memory everywhere
    drawn = torch.randn(count, embeddings.shape[1], device="cpu", dtype=torch.float32)
    return nn.Parameter(drawn.to(embeddings) * spread)


def with_zero_gradients(x: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Return x, whose backward pass gives `others` gradients too, of zeros.

    Data parallelism waits for a gradient of every parameter, also of one that a short text has no use for.
    """
    if not torch.is_grad_enabled():
        return x
    result: Tensor = _ZeroGradients.apply(x, *others)
    return result


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, {"dtype": other.dtype, "device": other.device}) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, **kind) for shape, kind in ctx.others)
