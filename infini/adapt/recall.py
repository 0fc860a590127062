"""Fit of a layer's maps and gates to what its full attention looks up far back, all else frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..huggingface.settings import GATE, MAP_K, MAP_Q
from .fit import LARGEST_SHARE, memory_parameters, trained
from .lookups import Lookups, Prompts
from .schedule import cosine

# a gate whose memory is not read, though a later training can still open it
CLOSED = -20.0
# biases move so much faster than matrices: features of filler have to become small
BIAS_FACTOR = 10.0
# of the squared error in rows that ask, which are few
ASKING_WEIGHT = 3.0
# prompts of one step
BATCH = 8
WARM_UP = 50
# logarithm of the least weight that counts: that of a feature that has died
LEAST = 1e-20


class RecallFit(NamedTuple):
    """The figures of a layer, a list of one for each head in `heads`; all but `attended` on prompts not fitted to.

    attended: share of full attention that is on the statement, in the rows that ask, over all prompts.
    missed: loss in these rows: Σ (out − full)² / Σ (window − full)².
    disturbed: loss in the other rows, over the same.
    found: share of what the memory recalls that comes from the statement, in the rows that ask.
    found_stretched: the same with the filler counted `stretch` times.
    gates: sigmoid(β) after all steps of this fit; rounds of training end to end change them further.
    """

    layer: int
    heads: list[int]
    attended: list[float]
    missed: list[float]
    disturbed: list[float]
    found: list[float]
    found_stretched: list[float]
    gates: list[float]


class RecallRecipe(NamedTuple):
    """Hold the settings of a fit.

    segment_len, lookback: of the converted model.
    steps: of Adam, each on a few prompts.
    map_lr, gate_lr: largest learning rates, of the maps' matrices and of the gates; that of the maps' biases is
        `BIAS_FACTOR` times `map_lr`. All rise over the first `WARM_UP` steps, and fall to 0 as a cosine.
    stretch: the filler of a prompt is counted up to so many times, as a text so much longer would hold it.
    """

    segment_len: int
    lookback: int
    steps: int
    map_lr: float
    gate_lr: float
    stretch: float
    seed: int


class Losses(NamedTuple):
    """Losses and shares of each head, [A]: cross-entropy to what is wanted, and as in `RecallFit`."""

    entropy: Tensor
    missed: Tensor
    disturbed: Tensor
    found: Tensor


def fit_recall(
    attention: Any,
    lookups: Lookups,
    prompts: Prompts,
    recipe: RecallRecipe,
    on_step: Callable[[], None] = lambda: None,
) -> RecallFit:
    """Fit the maps and gates of the heads that look something up, and close the gates of the others.

    The loss of a head is the cross-entropy of the weights by which its memory recalls each token to those of full
    attention on the statement, and the squared error of its output, in rows that ask and in others, over that of the
    window alone in rows that ask. The weights are those of the linear rule; a last fifth of the prompts is held out.

    Args:
        attention: of a converted layer with a memory, with maps or without.
        on_step: called after each step.
    """
    parameters = memory_parameters(attention)
    gate, maps = parameters[f"{GATE}.bias"], [x for name, x in parameters.items() if not name.startswith(GATE)]
    layer = Heads(parameters, lookups, prompts, recipe)
    count = len(prompts.tokens)
    held_out = torch.arange(count - max(1, count // 5), count, device="cpu")
    fitted = count - len(held_out)
    attended = lookups.wanted.sum(-1).mean((0, 2))
    with torch.no_grad():
        gate.fill_(CLOSED)
        gate[lookups.heads] = attended.clamp(0.01, LARGEST_SHARE).logit().to(gate)
    optimizer = torch.optim.Adam(
        [
            {"params": [x for x in maps if x.ndim > 1], "lr": recipe.map_lr},
            {"params": [x for x in maps if x.ndim == 1], "lr": BIAS_FACTOR * recipe.map_lr},
            {"params": [gate], "lr": recipe.gate_lr},
        ],
        betas=(0.9, 0.98),
    )
    schedule = cosine(optimizer, recipe.steps, warm_up=WARM_UP)
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.enable_grad(), trained([gate, *maps]):
        for _ in range(recipe.steps):
            batch = torch.randperm(fitted, generator=generator, device="cpu")[:BATCH]
            times = torch.rand(len(batch), generator=generator, dtype=torch.float32, device="cpu")
            losses = layer.losses(batch, recipe.stretch**times)
            optimizer.zero_grad()
            (losses.entropy + ASKING_WEIGHT * losses.missed + losses.disturbed).sum().backward()
            optimizer.step()
            schedule.step()
            on_step()
        optimizer.zero_grad()
    with torch.no_grad():
        plain, stretched = (layer.losses(held_out, torch.full((len(held_out),), x)) for x in (1.0, recipe.stretch))
        figures = (attended, *plain[1:], stretched.found, gate[lookups.heads].sigmoid())
    return RecallFit(int(attention.layer_idx), lookups.heads, *(x.tolist() for x in figures))


class Heads:
    """Compute what the heads of a layer that look something up put out, and lose, with the present maps and gates."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], lookups: Lookups, prompts: Prompts, recipe: RecallRecipe
    ) -> None:
        self.parameters, self.lookups, self.prompts = parameters, lookups, prompts
        positions = torch.arange(prompts.tokens.shape[1], device=lookups.rows.device)
        folded = (lookups.rows // recipe.segment_len - recipe.lookback) * recipe.segment_len
        # [N, 1, R, T]: what the memory holds when a row reads it
        self.held = (positions < folded.unsqueeze(-1)).unsqueeze(1)
        self.width = lookups.k.shape[3]
        self.maps = f"{MAP_Q}.weight" in parameters
        if self.maps:
            # of all key/value heads, those that the heads above read
            share = parameters[f"{MAP_Q}.weight"].shape[0] // parameters[f"{MAP_K}.weight"].shape[0]
            self.key_heads = sorted({head // share for head in lookups.heads})

    def outputs(self, batch: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs [B, A, R, V] of prompts [B], and the weights [B, A, R, T] that the memory recalls by.

        Args:
            batch: indices of the prompts.
            times: the filler of each is counted so many times, [B].
        """
        of = self.lookups
        counts = torch.where(self.prompts.filler[batch], times[:, None], 1.0).to(of.k.device)
        batch = batch.to(of.k.device)
        q, k = of.q[batch], of.k[batch]
        if self.maps:
            q, k = self._mapped(MAP_Q, of.heads, q), self._mapped(MAP_K, self.key_heads, k)
        q, k = F.elu(q) + 1, (F.elu(k) + 1)[:, of.groups]
        weights = (q @ k.mT) * counts[:, None, None] * self.held[batch]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        share = self.parameters[f"{GATE}.bias"][of.heads].sigmoid().view(-1, 1, 1)
        return share * (weights @ of.v[batch][:, of.groups]) + (1 - share) * of.window[batch], weights

    def losses(self, batch: Tensor, times: Tensor) -> Losses:
        """Return the losses on a batch; arguments as of `outputs`."""
        of, asking = self.lookups, self.prompts.asking
        out, weights = self.outputs(batch, times)
        index = batch.to(out.device)
        error, alone = ((x - of.full[index]).square().sum(-1) for x in (out, of.window[index]))
        alone = alone[:, :, :asking].mean((0, 2)).clamp(min=torch.finfo(torch.float32).tiny)
        asked = weights[:, :, :asking]
        entropy = -(of.wanted[index] * asked.clamp(min=LEAST).log()).sum(-1).mean((0, 2))
        stated = self.prompts.stated[batch, None, None].to(asked.device)
        found = (asked * stated).sum(-1).mean((0, 2))
        missed, disturbed = error[:, :, :asking].mean((0, 2)) / alone, error[:, :, asking:].mean((0, 2)) / alone
        return Losses(entropy, missed, disturbed, found)

    def _mapped(self, name: str, heads: list[int], x: Tensor) -> Tensor:
        weight = self.parameters[f"{name}.weight"][heads]
        bias = self.parameters[f"{name}.bias"].view(-1, 1, self.width)[heads]
        return x + x @ weight + bias
