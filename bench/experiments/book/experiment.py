"""What a memory is worth on a book: perplexity by position of small models that differ only in their attention.

Llama models of bytes, trained from scratch on the same windows, from the same weights. `full` attends to the whole row.
The others are converted before their first step: `local` has its gates held at β = -30, which leaves the memory a share
of 1e-13; `linear` and `delta` learn theirs. Each run is kept in the JSON as it ends, and is not run again:

    python -m segattn.bench.experiments.book --text book.txt --out results
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ....infini.gate import Gate, split_parameters
from ....infini.huggingface.conversion import convert
from ....runs.figures import versions
from ..harness import Advance, Figures, Job, Runs, command, earlier, made_by, run_all
from .plot import plot_book
from .setup import Setup, text_of

AnySetup = TypeVar("AnySetup", bound=Setup)
VARIANTS = ("full", "local", "linear", "delta")
BYTES = 256
# the memory's share is then 1e-13, nothing beside 1 in float32
SHUT = -30.0
EVALUATED_TOKENS = 16384

Run = dict[str, Any]


def build(setup: Setup, variant: str, seed: int) -> LlamaForCausalLM:
    """Return an untrained model; of one seed all variants have the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=setup.width,
        intermediate_size=setup.hidden,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        max_position_embeddings=setup.row * setup.reach,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if variant == "full":
        return model
    update = "delta" if variant == "local" else variant
    convert(model, setup.segment_len, update, SHUT if variant == "local" else 0.0, quiet=True)
    for gate in gates_of(model):
        gate.bias.requires_grad_(variant != "local")
    return model


def gates_of(model: nn.Module) -> list[Gate]:
    """Return the gates by layer; none of a model that is not converted."""
    return [module for module in model.modules() if isinstance(module, Gate)]


def nats(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the nats [B, T] of every byte but the first of rows [B, T + 1]."""
    logits = model(rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)


def train(
    model: nn.Module, text: Tensor, setup: Setup, seed: int, on_step: Callable[[float], None] = lambda loss: None
) -> list[float]:
    """Train for all steps, and return the losses. The windows depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    # of the variants, full has no gate, and local trains none
    groups = split_parameters(model, setup.lr, setup.gate_lr, setup.weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimiser.param_groups]
    offsets = torch.arange(setup.row + 1)
    losses = []
    model.train()
    for step in range(setup.steps):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = setup.rate(step) * rate
        starts = torch.randint(len(text) - setup.row, (setup.batch, 1), generator=generator, device="cpu")
        loss = nats(model, text[starts + offsets].long()).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
        optimiser.step()
        losses.append(loss.item())
        on_step(losses[-1])
    return losses


@torch.no_grad()
def by_position(model: nn.Module, text: Tensor, row: int) -> Tensor:
    """Return the mean nats [row] of the bytes at each position of rows; two rows begin in the length of one."""
    model.eval()
    # no divisor of a row, so that no two positions have the same text
    rows = text.long().unfold(0, row + 1, row // 2 + 1)
    parts = rows.split(max(1, EVALUATED_TOKENS // row))
    return sum(nats(model, part).double().sum(0) for part in parts) / len(rows)  # type: ignore[return-value]


def run(
    setup: AnySetup,
    variant: str,
    seed: int,
    text: Tensor,
    on_step: Callable[[float], None],
    make: Callable[[AnySetup, str, int], nn.Module] = build,
) -> Run:
    """Train and evaluate the model that `make` builds, and return its figures."""
    begin = time.perf_counter()
    cut = setup.cut(text)
    model = make(setup, variant, seed)
    losses = train(model, text[:cut], setup, seed, on_step)
    trained = time.perf_counter()
    positions = by_position(model, text[cut:], setup.row)
    longer = by_position(model, text[cut:], setup.row * setup.reach)
    in_segments = positions.view(-1, setup.segment_len)
    every = max(1, setup.steps // 20)
    return {
        "nats": rounded(positions.mean()),
        "by_segment": rounded(in_segments.mean(1)),
        "by_place_in_segment": rounded(in_segments[1:].mean(0)),
        "longer_by_position": rounded(longer.view(len(in_segments), -1).mean(1)),
        "gates": [rounded(gate.bias.detach().sigmoid()) for gate in gates_of(model)],
        "loss": [round(statistics.fmean(losses[i : i + every]), 4) for i in range(0, setup.steps, every)],
        "seconds": {"train": round(trained - begin, 1), "evaluate": round(time.perf_counter() - trained, 1)},
    }


def rounded(x: Tensor) -> Any:
    """Return numbers as they stand in the JSON."""
    values = x.tolist()
    return [round(value, 5) for value in values] if isinstance(values, list) else round(values, 5)


def summary(runs: Iterable[Run], variants: Iterable[str] = VARIANTS) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds, of the perplexity, and of the nats less those of `local`."""
    known = {(run["variant"], run["seed"]): run["nats"] for run in runs}
    table = {}
    for variant in variants:
        values = [value for (name, _), value in known.items() if name == variant]
        less = [
            value - known["local", seed]
            for (name, seed), value in known.items()
            if name == variant and ("local", seed) in known
        ]
        if values:
            table[variant] = {
                "seeds": len(values),
                "perplexity": spread([math.exp(value) for value in values]),
                "nats_less_local": spread(less),
            }
    return table


def spread(values: Sequence[float]) -> list[float] | None:
    """Return mean and standard deviation; None of no values."""
    if not values:
        return None
    return [round(statistics.fmean(values), 5), round(statistics.stdev(values), 5) if len(values) > 1 else 0.0]


def experiment(setup: Setup, text: Path, out: Path) -> Figures:
    """Perform every run that `out` does not hold yet, and draw the picture.

    Raises:
        SettingError: The runs there are of another setup, or of another text, or the text is too short.
    """
    kept = out / "book.json"
    book, figures = begin(setup, text, kept)
    figures = all_runs(dict.fromkeys(VARIANTS, setup), book, kept, figures, build)
    plot_book(out / "book.png", figures)
    return figures


def begin(setup: Setup, path: Path, kept: Path) -> tuple[Tensor, Figures]:
    """Return the text at `path`, and the figures in `kept` to go on with.

    Raises:
        SettingError: The runs there are of another setup, or of another text, or the text is too short.
    """
    text, about = text_of(path)
    setup.check(text)
    # as it is read back: tuples are lists
    plain = json.loads(json.dumps(asdict(setup)))
    return text, earlier(kept, {"setup": plain, "text": about}, "runs", free=("seeds",))


def all_runs(
    setups: Mapping[str, AnySetup],
    text: Tensor,
    kept: Path,
    figures: Figures,
    make: Callable[[AnySetup, str, int], nn.Module],
) -> Figures:
    """Return the figures with all runs of the variants, each by its setup; those that they lack are performed."""
    width, made = max(map(len, setups)), made_by()

    def perform(job: Job, advance: Advance) -> Figures:
        variant, seed = job
        on_step = functools.partial(tell, advance)
        return run(setups[variant], variant, seed, text, on_step, make) | {"made": made}

    def line(one: Run) -> str:
        perplexity, seconds = math.exp(one["nats"]), sum(one["seconds"].values())
        return f"{one['variant']:{width}} seed {one['seed']}: perplexity {perplexity:.3f} per byte, {seconds:.0f} s"

    def summarise(figures: Figures) -> Figures:
        return {"versions": versions(), "summary": summary(figures["runs"], setups)}

    seeds = range(max(setup.seeds for setup in setups.values()))
    jobs = {(variant, seed): setup.steps for seed in seeds for variant, setup in setups.items()}
    return run_all(kept, figures, Runs("runs", ("variant", "seed"), jobs, perform, line, summarise))


def tell(advance: Advance, loss: float) -> None:
    """Take note of a step of training and its loss."""
    advance(1, f": loss {loss:.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, as of `command`."""
    about, book = (__doc__ or "").splitlines()[0], "a book, any encoding: it is read as bytes"
    return command(Setup, experiment, "book", about, arguments, text=book, out="folder of the figures and the picture")
