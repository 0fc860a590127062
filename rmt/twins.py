"""Shallow copies of modules: a call changes how a copy runs, never the model, which may be running in other threads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial, wraps
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def twin(module: nn.Module, children: Mapping[str, nn.Module | None] | None = None) -> Any:
    """Return a shallow copy of `module` that shares all with it but the children that are replaced."""
    # some classes return another object from their copying or their __new__
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = {**module._modules, **(children or {})}
    # compiled in place, it would run the original
    copied.__dict__.pop("_compiled_call_impl", None)
    return copied


def replaced(module: nn.Module, path: str, child: nn.Module) -> Any:
    """Return a twin of `module` that has `child` at `path`, with twins of the modules between."""
    name, _, rest = path.partition(".")
    copied = twin(module, {name: replaced(getattr(module, name), rest, child) if rest else child})
    # set on the instance, it would be bound to the original
    copied.__dict__.pop("forward", None)
    return copied


def with_tensors(module: nn.Module, tensors: Mapping[int, Tensor]) -> Any:
    """Return a twin of `module`, and of all in it, that has other parameters and buffers: identity of one → another."""
    copied = twin(module, {name: child and with_tensors(child, tensors) for name, child in module._modules.items()})
    copied.__dict__.pop("forward", None)
    for kind in ("_parameters", "_buffers"):
        own = module.__dict__[kind]
        copied.__dict__[kind] = {name: x if x is None else tensors.get(id(x), x) for name, x in own.items()}
    return copied


def evaluating(module: nn.Module, twins: dict[nn.Module, Any] | None = None) -> Any:
    """Return a twin of `module`, and of all in it, in evaluation mode; hooks that are set on it are not the module's.

    Args:
        twins: those made so far, since a module may stand in several places.
    """
    twins = {} if twins is None else twins
    if module not in twins:
        twins[module] = copied = twin(module)
        for name, value in module.__dict__.items():
            copied.__dict__[name] = value.copy() if isinstance(value, OrderedDict) else _rebound(value, module, copied)
        children = {name: child and evaluating(child, twins) for name, child in module._modules.items()}
        copied.__dict__.update(training=False, _modules=children, _compiled_call_impl=None)
    return twins[module]


def _rebound(value: Any, module: nn.Module, other: nn.Module) -> Any:
    """Return a method or partial call of `module`, such as a forward that was set on it, as one of `other`."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, other)
    if isinstance(value, partial) and any(x is module for x in value.args):
        return partial(value.func, *(other if x is module else x for x in value.args), **value.keywords)
    return value


class Shown(NamedTuple):
    """A module, and the arguments with which it returns the last layer's rows."""

    module: nn.Module
    asked: dict[str, Any]


# of a Hugging Face model; since version 5 of transformers, hooks stay on a model that is asked for hidden states
HIDDEN_STATES: dict[str, Any] = {"output_hidden_states": True, "return_dict": True}

# names of the children that are or hold Hugging Face models → the same of each child
Branches = dict[str, "Branches"]
# of a Hugging Face model → of its twins
_showing_classes: dict[type, Any] = {}


def is_huggingface(module: nn.Module) -> bool:
    """Return whether `module` is a Hugging Face model, told by its classes' names: others need no transformers."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def branches_of(module: nn.Module) -> Branches | None:
    """Return where Hugging Face models are in `module`; None where there is none and `module` is none."""
    children = {name: branches_of(child) for name, child in module._modules.items() if child is not None}
    found = {name: branches for name, branches in children.items() if branches is not None}
    if is_huggingface(module):
        # torch.compile makes no classes
        _showing_class(type(module))
        return found
    return found or None


def shown(model: nn.Module, branches: Branches | None) -> Shown:
    """Return a twin of a model that returns the last layer's rows without being asked for those of every layer.

    A model that does not run as a twin (compiled, parallel, with another forward on it) is returned itself, and asked
    for all of them.

    Args:
        branches: where Hugging Face models are in it.
    """
    if branches is None:
        return Shown(model, {})
    copied = _showing(model, branches)
    return Shown(model, HIDDEN_STATES) if copied is None else Shown(copied, {"return_dict": True})


def _showing(module: nn.Module, branches: Branches) -> Any:
    """Return a twin of `module` and of the modules on the branches; None where one does not run as a twin."""
    children = {name: _showing(getattr(module, name), inner) for name, inner in branches.items()}
    parallel = isinstance(module, (DataParallel, DistributedDataParallel))
    compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
    if None in children.values() or parallel or compiled or "forward" in module.__dict__:
        return None
    copied = twin(module, children)
    if is_huggingface(module):
        copied.__dict__["_segattn_original"] = module
        copied.__class__ = _showing_class(type(module))
    return copied


def _showing_class(kind: Any) -> Any:
    """Return a class whose outputs have their last rows as hidden states, too, which a head on it hands on."""
    if kind in _showing_classes:
        return _showing_classes[kind]

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.forward(self, *args, **kwargs)
        last = getattr(output, "last_hidden_state", None)
        if last is not None and getattr(output, "hidden_states", None) is None:
            output["hidden_states"] = (last,)
        return output

    def assign(self: Any, name: str, value: Any) -> None:
        # what a forward leaves on its model is there in the next call
        for module in (self.__dict__["_segattn_original"], self):
            kind.__setattr__(module, name, value)

    # transformers looks classes up by their full names
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made = type(kind.__name__, (kind,), {"forward": forward, "__setattr__": assign, **names})
    return _showing_classes.setdefault(kind, made)
