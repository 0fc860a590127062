"""What a token costs in texts of 8 to 4096 segments: seconds, and bytes held, of RMT, ARMT and full attention.

Each text is read from its beginning, a piece at a time, the state of one piece going into the next; short ones are
begun again until as much is read as of longer ones. A round reads every length; what is reported is the median of the
rounds, and of each round's ratio to its shortest text. A reading is kept in the JSON as it ends, and is not run again:

    python -m segattn.bench.experiments.recurrent_lengths --out lengths.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ...rmt.recurrent.memory import RecurrentMemory
from ...runs.figures import write_figures
from ..planner.units import in_bytes
from ..speed.machine import commit, device_facts, versions
from ..speed.measure import peak_bytes, synchronize
from ..speed.recurrent_models import SIZES, VOCABULARY, Sizes, associative, first_memory, llama
from .recurrent_lengths_plot import plot_lengths

LENGTHS = (8, 64, 512, 4096)
# segments that are read by one call
PIECE = 8

# (ids of a piece [B, n], what was kept of those before or None) → what is kept now
Reader = Callable[[Tensor, Any], Any]
Reading = dict[str, Any]


def recurrent(sizes: Sizes, device: torch.device, longest: int) -> Reader:
    module = RecurrentMemory(llama(sizes, device), sizes.m, sizes.L).to(device).eval()
    with torch.no_grad():
        module.memory.copy_(first_memory(sizes, device))
    return lambda ids, state: module(ids, state=state, output_logits=False).state


def armt(sizes: Sizes, device: torch.device, longest: int) -> Reader:
    module = associative(sizes, device, "vertical").eval()
    return lambda ids, state: module(ids, state=state, output_logits=False).state


def full(sizes: Sizes, device: torch.device, longest: int) -> Reader:
    """The same Llama with the keys and values of the whole text."""
    from transformers import DynamicCache

    model: Any = llama(sizes, device, positions=longest * sizes.L).eval()

    def read(ids: Tensor, cache: Any) -> Any:
        cache = DynamicCache(config=model.config) if cache is None else cache
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    return read


READERS: dict[str, Callable[[Sizes, torch.device, int], Reader]] = {
    "RMT": recurrent,
    "ARMT": armt,
    "full attention": full,
}


@dataclass(frozen=True)
class Setup:
    """What is the same for all rounds.

    full_up_to: segments that full attention is measured to, whose time grows with their square.
    least: segments of every length that are read in a round.
    """

    sizes: Sizes
    device: str
    lengths: tuple[int, ...] = LENGTHS
    full_up_to: int = 64
    least: int = 512

    def __post_init__(self) -> None:
        _check_device(self.device)
        if not self.lengths or min(self.lengths) < 1 or sorted(set(self.lengths)) != list(self.lengths):
            raise ValueError(f"lengths must be positive and go up, got {list(self.lengths)}")
        if self.least < 1:
            raise ValueError(f"least must be at least 1, got {self.least}")

    def cells(self) -> Iterator[tuple[str, int]]:
        """(reader, segments)"""
        return ((x, n) for n in self.lengths for x in READERS if x != "full attention" or n <= self.full_up_to)


def _check_device(name: str) -> None:
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu where PyTorch finds no GPU, got {name!r}")


def kept_bytes(kept: Any) -> int:
    """Of all tensors in a state or a cache, each storage once."""
    found: dict[int, int] = {}

    def walk(x: Any) -> None:
        if isinstance(x, Tensor):
            found[x.data_ptr()] = x.numel() * x.element_size()
        elif isinstance(x, (tuple, list)):
            for part in x:
                walk(part)
        elif hasattr(x, "layers"):
            walk([(layer.keys, layer.values) for layer in x.layers])

    walk(kept)
    return sum(found.values())


@torch.no_grad()
def read_text(reader: Reader, setup: Setup, segments: int, on_piece: Callable[[int], None]) -> Reading:
    """Seconds per token of texts of random tokens, what is kept at the end of one, and the peak in one more piece.

    That piece is not timed: watching memory takes time.
    """
    sizes, device = setup.sizes, torch.device(setup.device)
    generator = torch.Generator().manual_seed(3)
    times, spent = max(1, setup.least // segments), 0.0
    for _ in range(times):
        kept = None
        for begin in range(0, segments, PIECE):
            tokens = min(PIECE, segments - begin) * sizes.L
            ids = torch.randint(VOCABULARY, (sizes.B, tokens), generator=generator).to(device)
            synchronize(device)
            start = time.perf_counter()
            kept = reader(ids, kept)
            synchronize(device)
            spent += time.perf_counter() - start
            on_piece(tokens // sizes.L)
    held = kept_bytes(kept)
    peak = peak_bytes(lambda: reader(ids, kept), device)
    tokens = times * segments * sizes.L * sizes.B
    return {"seconds_per_token": spent / tokens, "kept_bytes": held, "peak_bytes": held + peak}


def summary(setup: Setup, readings: Sequence[Reading]) -> list[Reading]:
    """Of each reader and length the medians over rounds, and of the ratio to the shortest text of the same round."""
    found = {(x["reader"], x["segments"], x["round"]): x for x in readings}
    table = []
    for name, segments in setup.cells():
        rounds = [x for x in readings if (x["reader"], x["segments"]) == (name, segments)]
        shortest = (found.get((name, setup.lengths[0], x["round"])) for x in rounds)
        ratios = [x["seconds_per_token"] / y["seconds_per_token"] for x, y in zip(rounds, shortest, strict=True) if y]
        if rounds and ratios:
            table.append(
                {
                    "reader": name,
                    "segments": segments,
                    "tokens": segments * setup.sizes.L,
                    "rounds": len(rounds),
                    "ratio_to_shortest": statistics.median(ratios),
                }
                | {
                    key: statistics.median(x[key] for x in rounds)
                    for key in ("seconds_per_token", "kept_bytes", "peak_bytes")
                }
            )
    return table


def earlier(path: Path, about: Reading) -> Reading:
    """The figures to go on with.

    Raises:
        ValueError: they are of another setup.
    """
    if not path.is_file():
        return about | {"readings": []}
    others = ValueError(f"out must hold figures of this command or none, {path} has others: choose another file")
    try:
        figures: Reading = json.loads(path.read_text(encoding="utf-8"))
        before, _ = figures["setup"], figures["readings"]
        if before.keys() != about["setup"].keys():
            raise others
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise others from None
    for name, value in about["setup"].items():
        if before[name] != value:
            raise ValueError(f"{name} must be {before[name]} as in {path}, got {value}: or choose another file")
    return figures


def measure(setup: Setup, rounds: int, out: Path) -> Reading:
    """Every reading that `out` does not hold yet.

    Raises:
        ValueError: `rounds` is below 1, or `out` holds figures of another setup.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    device = torch.device(setup.device)
    about = json.loads(json.dumps({"setup": asdict(setup)}))
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = earlier(out, about)
    done = {(x["reader"], x["segments"], x["round"]) for x in figures["readings"]}
    jobs = [(*cell, number) for number in range(rounds) for cell in setup.cells() if (*cell, number) not in done]
    readers = {name: READERS[name](setup.sizes, device, setup.full_up_to + PIECE) for name, _, _ in jobs}
    with torch.no_grad():
        for reader in readers.values():
            # what is first may compile, allocate, and load
            reader(setup.sizes.ids(device, PIECE * setup.sizes.L), None)
    console = Console(soft_wrap=True, highlight=False)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(max(1, setup.least // n) * n for _, n, _ in jobs))
        for name, segments, number in jobs:
            progress.update(task, description=f"{name}, {segments} segments, round {number + 1}")
            found = read_text(readers[name], setup, segments, lambda n: progress.advance(task, n))
            figures["readings"].append({"reader": name, "segments": segments, "round": number} | found)
            figures |= {"machine": device_facts(device), "versions": versions(), "commit": commit()}
            figures["summary"] = summary(setup, figures["readings"])
            write_figures(out, figures)
            console.print(
                f"{name:15} {segments:5} segments, round {number + 1}: {found['seconds_per_token'] * 1e6:9.2f} µs a "
                f"token, {in_bytes(found['kept_bytes']):>9} kept, {in_bytes(found['peak_bytes']):>9} at most"
            )
            console.file.flush()
    plot_lengths(out.with_suffix(".png"), figures)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 where a setting cannot be, or the file holds other figures, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON; its picture gets the same name")
    parser.add_argument("--sizes", help="B,S,L,m,layers,heads,width; S does not matter here")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="segments; default: %(default)s")
    parser.add_argument("--full-up-to", type=int, default=64, help="segments of full attention; default: %(default)s")
    parser.add_argument("--least", type=int, default=512, help="segments read of every length; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    given = parser.parse_args(arguments)
    # the profiler that watches memory says each time that it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        sizes = SIZES if given.sizes is None else Sizes.parse(given.sizes)
        setup = Setup(sizes, given.device, tuple(given.lengths), given.full_up_to, given.least)
        measure(setup, given.rounds, given.out)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"recurrent_lengths: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("recurrent_lengths: stopped; the same command goes on after the last whole reading\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
