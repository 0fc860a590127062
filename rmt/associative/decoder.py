"""A Hugging Face decoder whose layers other code takes over, without a change to the model.

A shallow copy of the module that runs the layers gets stand-ins for them. It makes masks and positions as always, the
stand-ins record what each layer would be called with, and the last one lets the caller run all layers in its own order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..backbone import check_model
from ..twins import replaced


class Layer(NamedTuple):
    """A decoder layer and the arguments that the model calls it with, besides hidden states."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the layer: [B, T, d] → [B, T, d]."""
        return only_hidden(self.module(hidden, *self.args, **self.kwargs))


def only_hidden(output: Any) -> Tensor:
    """Return a layer's hidden states; before transformers 5, some layers return a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Decoder(NamedTuple):
    """The place of a model's layers.

    trunk: path of the module that runs them.
    layers: name of their list in it.
    """

    trunk: str
    layers: str

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """Find the first module in a model that has a list of layers with causal attention.

        Raises:
            TypeError: the model is no module.
            ValueError: it has no such list, no head, an encoder too, or segattn.convert has changed it, or it is
                compiled or wrapped for data parallelism.
        """
        check_model(model)
        for path, module in model.named_modules():
            config = getattr(module, "config", None)
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) and _has_causal_attention(child[0], config):
                    if not path:
                        raise ValueError(
                            f"model must have a language model's head, got a {type(model).__name__} alone: pass the "
                            "causal language model that it belongs to"
                        )
                    if "inputs_embeds" not in inspect.signature(module.forward).parameters:
                        raise ValueError(
                            f"model must embed its tokens in the module that runs its layers, got a "
                            f"{type(model).__name__}, whose {type(module).__name__} takes no inputs_embeds"
                        )
                    _refuse_wrapped(model, path)
                    return cls(path, name)
        raise ValueError(
            f"model must be a Hugging Face decoder with causal layers, got a {type(model).__name__}, whose layers have "
            "no attention with is_causal, layer_idx and its configuration: segattn.RecurrentMemory(mask='causal') does "
            "without"
        )

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the layers, in order."""
        return list(getattr(model.get_submodule(self.trunk), self.layers))

    def run(
        self, model: nn.Module, embeds: Tensor, over: Callable[[list[Layer], Tensor], Tensor], **kwargs: Any
    ) -> Tensor:
        """Run a model with `over(layers, hidden)` in place of its layers, and return its last hidden states [N, T, d].

        Args:
            embeds: [N, T, d], all rows alike in positions and mask: layers may be called with any number of them.
            kwargs: for the module that runs the layers.

        Raises:
            RuntimeError: the model did not call all of its layers.
        """
        modules = self.modules(model)
        call = _Call(len(modules), over)
        stand_ins = nn.ModuleList([_StandIn(call, module) for module in modules])
        trunk = replaced(model.get_submodule(self.trunk), self.layers, stand_ins)
        output = trunk(inputs_embeds=embeds, **({"use_cache": False} | kwargs))[0]
        if len(call.layers) != call.depth:
            raise RuntimeError(
                f"the model called {len(call.layers)} of its {call.depth} layers: turn layer dropping off, and let "
                "nothing else take the place of its forward"
            )
        return output

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of last hidden states [..., d], by whatever the model does behind its layers."""
        known = _Known(hidden.reshape(1, -1, hidden.shape[-1]))
        output = replaced(model, self.trunk, known)(inputs_embeds=known.hidden, use_cache=False)
        return output.logits.reshape(*hidden.shape[:-1], output.logits.shape[-1])


@dataclass
class _Call:
    """One pass of a model over stand-ins.

    depth: number of layers.
    over: runs them.
    layers: those that were called so far.
    hidden: what the first of them was called with.
    firsts: a tensor's identity → the tensor and its first row.
    """

    depth: int
    over: Callable[[list[Layer], Tensor], Tensor]
    layers: list[Layer] = field(default_factory=list)
    hidden: Tensor | None = None
    firsts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def arrive(self, module: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of a layer, and return the output of its stand-in."""
        if self.hidden is None:
            self.hidden = hidden
        self.layers.append(Layer(module, self.first(args), self.first(kwargs)))
        if len(self.layers) < self.depth:
            return self.hidden
        output = self.over(self.layers, self.hidden)
        # where layers return a tuple, its first was taken, which a tensor has too
        return output if hidden.ndim == self.hidden.ndim else (output,)

    def first(self, argument: Any) -> Any:
        """Return an argument's part for the first row, since all rows are alike; one object for each tensor."""
        if isinstance(argument, Tensor):
            rows = None if self.hidden is None else self.hidden.shape[0]
            one = argument[:1] if argument.ndim > 1 and argument.shape[0] == rows else argument
            return self.firsts.setdefault(id(argument), (argument, one))[1]
        if type(argument) in (tuple, list):
            return type(argument)(self.first(x) for x in argument)
        if type(argument) is dict:
            return {name: self.first(x) for name, x in argument.items()}
        return argument


class _StandIn(nn.Module):
    """A layer's place holder, which records how the layer is called and has its attributes."""

    def __init__(self, call: _Call, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["call"], self.__dict__["module"] = call, module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.call.arrive(self.module, hidden_states, args, kwargs)


class _Known(nn.Module):
    """A model's trunk whose last hidden states are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return _Output(last_hidden_state=self.hidden)


class _Output(BaseModelOutputWithPastAndCrossAttentions):
    """An output that a model of experts can read, too."""

    router_logits = None


def _refuse_wrapped(model: nn.Module, path: str) -> None:
    """Check that a shallow copy of each module down to the trunk runs by itself.

    Raises:
        ValueError: one of them is compiled or wrapped.
    """
    names = path.split(".")
    for module in (model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)):
        if "_orig_mod" in module._modules or isinstance(module, (DataParallel, DistributedDataParallel)):
            raise ValueError(
                f"model must be neither compiled nor wrapped for data parallelism, got a {type(module).__name__}: wrap "
                "the AssociativeMemory, and compile layers in place (layer.compile())"
            )


def _has_causal_attention(layer: nn.Module, config: Any) -> bool:
    """Return whether a part of a layer has `is_causal`, an index of the layer, and the model's configuration."""
    return any(
        getattr(part, "is_causal", False) and hasattr(part, "layer_idx") and getattr(part, "config", None) is config
        for part in layer.modules()
    )
