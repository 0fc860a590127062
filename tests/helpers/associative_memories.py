"""Small associative memories, and what the tests compare of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import models
import torch

from segattn.rmt.associative.memory import AssociativeMemory

DOUBLE = torch.float64
L, M = 7, 3
FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen3")
SCHEDULED = ("vertical", "horizontal", "diagonal")


def wrapped(name: str = "llama", dtype: torch.dtype = DOUBLE, depth: int = 3, **options: Any) -> AssociativeMemory:
    """Make a tiny model with memories that return something."""
    layers: dict[str, Any] = {"n_layer" if name == "gpt2" else "num_hidden_layers": depth}
    if name == "gemma3_text":
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        layers |= {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 4}
    model = models.make(name, **layers).to(dtype)
    torch.manual_seed(1)
    memory = AssociativeMemory(model, M, L, **({"d_mem": 5} | options))
    for layer in memory.memories.values():
        torch.nn.init.normal_(layer.value.weight, std=0.2)
    return memory


def as_scheduled(memory: AssociativeMemory, schedule: str) -> AssociativeMemory:
    other = copy.deepcopy(memory)
    other.settings = replace(memory.settings, schedule=schedule)
    return other


def padded(lengths: tuple[int, ...], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    time = max(lengths)
    at = torch.arange(time)
    real = [at < n if side == "right" else at >= time - n for n in lengths]
    return models.tokens(len(lengths), time), torch.stack(real).long()


def results(memory: AssociativeMemory, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Return the loss, logits, state, and the gradient of every parameter."""
    memory.zero_grad()
    out = memory(*args, output_logits=True, **kwargs)
    last = [x for state in out.state.memories for x in state]
    (out.loss + sum(x.square().mean() for x in last)).backward()
    found = {"loss": out.loss, "logits": out.logits} | {f"state {i}": x for i, x in enumerate(last)}
    return found | {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}


def checkpointed(memory: AssociativeMemory) -> None:
    # its name before transformers 5
    enable = getattr(memory.model, "activation_checkpointing_enable", memory.model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
