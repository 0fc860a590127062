"""What a token costs in texts of 8 to 4096 segments: seconds, and bytes held, of RMT, ARMT and full attention.

Each text is read from its beginning, a piece at a time, the state of one piece going into the next; short texts are
begun again until as much is read as of longer ones. A round reads every length; reported are the medians of the rounds,
and of each round's ratio to its shortest text. A reading is kept in the JSON as it ends, and is not run again:

    python -m segattn.bench.experiments.lengths --out lengths.json
"""

from __future__ import annotations

import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....runs.errors import SettingError
from ...planner.settings import check_size
from ...planner.units import in_bytes
from ...speed.machine import commit, device_facts, versions
from ...speed.measure import kept_bytes, peak_bytes
from ...speed.recurrent_models import SIZES, VOCABULARY, Sizes, associative, llama, recurrent
from ...speed.timing import time_once
from ..harness import Advance, Figures, Job, Runs, command, earlier, run_all
from .plot import plot_lengths

LENGTHS = (8, 64, 512, 4096)
# segments read by one call
PIECE = 8

# from a piece's ids [B, n], and the state before it or None, to the state after it
Reader = Callable[[Tensor, Any], Any]


def _with_memory(make: Callable[[Sizes, torch.device], Any]) -> Callable[[Sizes, torch.device], Reader]:
    def reader(sizes: Sizes, device: torch.device) -> Reader:
        module = make(sizes, device).eval()
        return lambda ids, state: module(ids, state=state, output_logits=False).state

    return reader


def full(sizes: Sizes, device: torch.device) -> Reader:
    """Return a reader by the same Llama with the keys and values of the whole text."""
    from transformers import DynamicCache

    model: Any = llama(sizes, device).eval()

    def read(ids: Tensor, cache: Any) -> Any:
        cache = DynamicCache(config=model.config) if cache is None else cache
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    return read


READERS: dict[str, Callable[[Sizes, torch.device], Reader]] = {
    "RMT": _with_memory(recurrent),
    "ARMT": _with_memory(associative),
    "full attention": full,
}


@dataclass(frozen=True)
class Setup:
    """The settings of the command; all but the rounds are the same for all readings.

    sizes: Of the models; S does not matter here.
    lengths: Of the texts, in segments.
    full_up_to: Segments that full attention is measured to, whose time grows with their square.
    least: Segments of every length that are read in a round.
    """

    sizes: Sizes = field(default=SIZES, metadata={"parse": Sizes.parse, "help": "B,S,L,m,layers,heads,width"})
    device: str = "cpu"
    lengths: tuple[int, ...] = LENGTHS
    full_up_to: int = 64
    least: int = 512
    rounds: int = 3

    def __post_init__(self) -> None:
        check_device(self.device)
        if not self.lengths or min(self.lengths) < 1 or sorted(set(self.lengths)) != list(self.lengths):
            raise SettingError("lengths", f"must be positive and go up, got {list(self.lengths)}")
        for name in ("least", "rounds"):
            check_size(name, getattr(self, name))

    def cells(self) -> Iterator[tuple[str, int]]:
        """Return every reader with the segments of every text that it reads."""
        return ((x, n) for n in self.lengths for x in READERS if x != "full attention" or n <= self.full_up_to)


def check_device(name: str) -> None:
    """Check that the device can be measured.

    Raises:
        SettingError: Of `device`: it is no device, no CPU or GPU, or not there.
    """
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise SettingError("device", f"must be cpu or cuda, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SettingError("device", f"must be cpu where PyTorch finds no GPU, got {name!r}")


@torch.no_grad()
def read_text(reader: Reader, setup: Setup, segments: int, on_piece: Callable[[int], None]) -> Figures:
    """Return seconds per token of texts of random tokens, the bytes kept at the end of one, and the peak of a piece.

    The piece whose peak is measured comes behind a text, and is not timed: watching memory takes time.
    """
    sizes, device = setup.sizes, torch.device(setup.device)
    generator = torch.Generator().manual_seed(3)
    times, milliseconds = max(1, setup.least // segments), 0.0
    for _ in range(times):
        kept = None
        for begin in range(0, segments, PIECE):
            tokens = min(PIECE, segments - begin) * sizes.L
            ids = torch.randint(VOCABULARY, (sizes.B, tokens), generator=generator, device="cpu").to(device)
            spent, kept = time_once(lambda copy, ids=ids, kept=kept: lambda: reader(ids, kept), 0, device)  # type: ignore[misc]
            milliseconds += spent
            on_piece(tokens // sizes.L)
    held = kept_bytes(kept)
    peak = peak_bytes(lambda: reader(ids, kept), device)
    tokens = times * segments * sizes.L * sizes.B
    return {"seconds_per_token": milliseconds / 1e3 / tokens, "kept_bytes": held, "peak_bytes": held + peak}


def summary(setup: Setup, readings: Sequence[Figures]) -> list[Figures]:
    """Return, for each reader and length, medians over rounds, and of the ratio to the same round's shortest text."""
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


def experiment(setup: Setup, out: Path) -> Figures:
    """Perform every reading that `out` does not hold yet, and draw the picture beside it.

    Raises:
        SettingError: `out` holds figures of another setup.
    """
    device = torch.device(setup.device)
    kept = {name: value for name, value in asdict(setup).items() if name != "rounds"}
    figures = earlier(out, {"setup": json.loads(json.dumps(kept))}, "readings")

    @functools.cache
    @torch.no_grad()
    def reader_of(name: str) -> Reader:
        reader = READERS[name](setup.sizes, device)
        # what is first may compile, allocate, and load
        reader(setup.sizes.ids(device, PIECE * setup.sizes.L), None)
        return reader

    def perform(job: Job, advance: Advance) -> Figures:
        name, segments, _ = job
        return read_text(reader_of(name), setup, segments, lambda amount: advance(amount, " segments"))

    def line(reading: Figures) -> str:
        name, segments, number = reading["reader"], reading["segments"], reading["round"]
        time = f"{reading['seconds_per_token'] * 1e6:9.2f} µs a token"
        kept, peak = in_bytes(reading["kept_bytes"]), in_bytes(reading["peak_bytes"])
        return f"{name:15} {segments:5} segments, round {number + 1}: {time}, {kept:>9} kept, {peak:>9} at most"

    def summarise(figures: Figures) -> Figures:
        made = {"machine": device_facts(device), "versions": versions(), "commit": commit()}
        return made | {"summary": summary(setup, figures["readings"])}

    cells = [(*cell, number) for number in range(setup.rounds) for cell in setup.cells()]
    jobs = {cell: max(1, setup.least // cell[1]) * cell[1] for cell in cells}
    run_all(out, figures, Runs("readings", ("reader", "segments", "round"), jobs, perform, line, summarise))
    plot_lengths(out.with_suffix(".png"), figures)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, as of `command`."""
    # the profiler that watches memory says each time that it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    about = (__doc__ or "").splitlines()[0]
    return command(Setup, experiment, "lengths", about, arguments, out="the JSON; its picture gets the same name")
