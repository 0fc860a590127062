"""The paper's passkey prompt, learnt by a small model on short texts and asked for in long ones.

A Llama model of bytes, converted before its first step. The question begins beside the statement and moves away from it
as long as the model keeps answering; then what the memory holds is made to count for up to thousands of times as much,
as it would after so much more text. The texts it is asked in afterwards are read in pieces:

    python -m segattn.bench.experiments.passkey_experiment --out results

Stopped by Ctrl-C, the same command goes on: from the last checkpoint of the training, or after the last whole cell.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ...infini.evaluate.loading import ByteTokenizer, Source
from ...infini.evaluate.passkey import PasskeyText
from ...infini.evaluate.runs import Grid, run_passkey
from ...infini.gate import parameter_groups
from ...infini.huggingface.cache import InfiniCache
from ...infini.huggingface.cache_layer import LayerState
from ...infini.huggingface.conversion import convert
from ...infini.huggingface.saving import save_pretrained
from ...kernels.state import MemoryState
from ...runs.checkpoint import deferred_interrupt, load_checkpoint, save_checkpoint
from ...runs.figures import write_figures

CHECKPOINT_EVERY = 100


@dataclass(frozen=True)
class Setup:
    """Sizes and recipe.

    goal: bytes between statement and question that the curriculum grows to.
    stretch: with the goal reached, in three steps of four the memory counts for up to 2 to this power times as much.
    others: weight of the bytes that are not the answer's.
    """

    update: str = "delta"
    segment_len: int = 128
    goal: int = 512
    stretch: float = 14.0
    steps: int = 3000
    batch: int = 24
    width: int = 96
    layers: int = 3
    heads: int = 2
    lr: float = 2e-3
    gate_lr: float = 1e-2
    others: float = 0.05
    seed: int = 0


def build(setup: Setup) -> LlamaForCausalLM:
    """An untrained model."""
    torch.manual_seed(setup.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setup.width,
        intermediate_size=2 * setup.width,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
    )
    return convert(LlamaForCausalLM(config), setup.segment_len, setup.update, quiet=True)


class Trainer:
    """A model on its way; `filler` is how far the question has come, in bytes."""

    def __init__(self, model: LlamaForCausalLM, setup: Setup) -> None:
        self.model, self.setup = model.train(), setup
        self.task = PasskeyText(ByteTokenizer())
        self.optimizer = torch.optim.AdamW(parameter_groups(model, setup.lr, setup.gate_lr), betas=(0.9, 0.98))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(setup.seed)
        self.step, self.filler = 0, 0
        self.recent: deque[float] = deque(maxlen=50)
        self.log: list[dict[str, float]] = []

    def advance(self) -> None:
        """One step."""
        setup = self.setup
        ids, answer = self._batch()
        stretched = self.filler >= setup.goal and self._integer(4) > 0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, (self.step + 1) / 50, 2 * (1 - self.step / setup.steps) + 0.02)
        logits = self._stretched(ids[:, :-1]) if stretched else self.model(ids[:, :-1], use_cache=False).logits
        nats = F.cross_entropy(logits.transpose(1, 2), ids[:, -logits.shape[1] :], reduction="none")
        weights = torch.full_like(nats, setup.others)
        weights[:, -answer:] = 1.0
        self.optimizer.zero_grad()
        ((nats * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        right = (logits[:, -answer:].argmax(-1) == ids[:, -answer:]).float().mean().item()
        self._record(right, nats[:, -answer:].mean().item())

    def _record(self, right: float, nats: float) -> None:
        self.step += 1
        self.recent.append(right)
        share = sum(self.recent) / len(self.recent)
        if self.step % CHECKPOINT_EVERY == 0:
            self.log.append(
                {"step": self.step, "filler": self.filler, "recall": round(share, 4), "nats": round(nats, 4)}
            )
        if len(self.recent) == 50 and share > 0.9 and self.filler < self.setup.goal:
            self.filler = min(self.setup.goal, self.filler + max(16, self.filler // 3))
            self.recent.clear()

    def _stretched(self, ids: Tensor) -> Tensor:
        """Logits after the first segments, which count for more than they are."""
        length = self.setup.segment_len
        # the question is in what is left
        first = length * (1 + self._integer(min(2, (ids.shape[1] - 64) // length)))
        cache = InfiniCache(self.model)
        self.model(ids[:, :first], past_key_values=cache, use_cache=True, logits_to_keep=1)
        factor = 2 ** (self.setup.stretch * torch.rand((), generator=self.generator).item())
        states = {layer: _times(state, factor) for layer, state in cache.states.items() if state is not None}
        cache.commit(cache.rows, states)
        return self.model(ids[:, first:], past_key_values=cache, use_cache=True).logits

    def _batch(self) -> tuple[Tensor, int]:
        """Prompts of one length with their answers [B, T], and the answers' length."""
        # the question stands inside a segment: at its beginning a model has nothing to go by but the memory
        inside = self.setup.segment_len // 2 + self._integer(self.setup.segment_len // 3)
        least = 1 + (self.task.shortest + self.filler) // self.setup.segment_len
        length = (least + self._integer(2)) * self.setup.segment_len + inside
        room = length - self.task.shortest
        rows = []
        for _ in range(self.setup.batch):
            depth = 1 - self._integer(self.filler + 1) / room
            prompt = self.task.prompt(length, depth, self.generator)
            rows.append([*prompt.tokens, *prompt.answer])
        return torch.tensor(rows), len(prompt.answer)

    def _integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        """All that decides how training goes on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "progress": [self.step, self.filler, list(self.recent), self.log],
            "setup": asdict(self.setup),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: it is of another setup.
        """
        if saved["setup"] != asdict(self.setup):
            raise ValueError(f"out must not hold a training of another setup, got {saved['setup']}")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.step, self.filler, recent, self.log = saved["progress"]
        self.recent.extend(recent)


def _times(state: LayerState, factor: float) -> LayerState:
    """The memory as if everything in it had been written so many times more."""
    return state._replace(memory=MemoryState(state.memory.memory * factor, state.memory.normalizer * factor))


def train(trainer: Trainer, checkpoint: Path, bar: Progress) -> None:
    """The steps that are left, with a checkpoint now and then, and one at Ctrl-C."""
    task = bar.add_task("train", total=trainer.setup.steps, completed=trainer.step)
    with deferred_interrupt() as interrupted:
        while trainer.step < trainer.setup.steps:
            trainer.advance()
            bar.update(task, completed=trainer.step, description=f"train, {trainer.filler} bytes of filler")
            if interrupted or trainer.step % CHECKPOINT_EVERY == 0 or trainer.step == trainer.setup.steps:
                save_checkpoint(checkpoint, trainer.state_dict())
                print_line(trainer)
            if interrupted:
                raise KeyboardInterrupt


def print_line(trainer: Trainer) -> None:
    """How far the training has come, for a log."""
    if not sys.stderr.isatty() and trainer.log:
        sys.stderr.write(f"{trainer.log[-1]}\n")
        sys.stderr.flush()


class Silent:
    """Watches an evaluation and says only what is finished."""

    def begin(self, tokens: int) -> None:
        """Nothing is shown."""

    def read(self, tokens: int) -> None:
        """Nothing is shown."""

    def finished(self, what: str) -> None:
        """A line for every cell."""
        sys.stderr.write(f"{what}\n")
        sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, unless that is done, and evaluate what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for figures, picture and checkpoint")
    parser.add_argument("--lengths", default="4028,32700,131004,1048508", help="tokens of the prompts")
    parser.add_argument("--depths", default="0,0.5,1", help="of the passkey, 0 the beginning, 1 the end")
    parser.add_argument("--samples", type=int, default=5, help="prompts per cell")
    for name in ("update", "steps", "goal", "seed"):
        default = getattr(Setup, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args(arguments)
    setup = Setup(update=given.update, steps=given.steps, goal=given.goal, seed=given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    checkpoint, folder = given.out / "checkpoint.pt", given.out / "model"
    trainer = Trainer(build(setup), setup)
    if checkpoint.is_file():
        trainer.load_state_dict(load_checkpoint(checkpoint))
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        train(trainer, checkpoint, bar)
    save_pretrained(trainer.model, folder)
    write_figures(given.out / "training.json", {"setup": asdict(setup), "log": trainer.log})
    grid = Grid(
        tuple(int(length) for length in given.lengths.split(",")),
        tuple(float(depth) for depth in given.depths.split(",")),
        given.samples,
    )
    run_passkey(Source(str(folder), "bytes"), grid, given.out, Silent(), resume=True)


if __name__ == "__main__":
    main()
