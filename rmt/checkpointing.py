"""Gradient checkpointing of a memory, by the names that Hugging Face's Trainer calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Checkpointing:
    """The switches of `checkpoint` that models of transformers have, by the names of version 5 and of version 4.

    Attributes:
        checkpoint: whether segments are run again in the backward pass instead of keeping what is inside them.
    """

    checkpoint: bool

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Set `checkpoint`, for all segments.

        Args:
            activation_checkpointing_kwargs: `use_reentrant`, of either value, or nothing.
            every_n_layers: 1.
            offload: False.

        Raises:
            ValueError: another value, for which a memory has no checkpointing.
        """
        others = {name: x for name, x in (activation_checkpointing_kwargs or {}).items() if name != "use_reentrant"}
        for name, value, known in (
            ("activation_checkpointing_kwargs", others, {}),
            ("every_n_layers", every_n_layers, 1),
            ("offload", offload, False),
        ):
            if value != known:
                raise ValueError(f"{name} must be {known!r} for a {type(self).__name__}, got {value!r}")
        self.checkpoint = True

    def activation_checkpointing_disable(self) -> None:
        """Clear `checkpoint`."""
        self.checkpoint = False

    @property
    def is_activation_checkpointing(self) -> bool:
        """Return `checkpoint`."""
        return self.checkpoint

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Call `activation_checkpointing_enable`, whose name this was before transformers 5."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Call `activation_checkpointing_disable`, whose name this was before transformers 5."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Return `checkpoint`."""
        return self.checkpoint
