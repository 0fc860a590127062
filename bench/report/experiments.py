"""Tables of trained models and of plans, from the JSON that their commands keep in the folder of results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..planner.units import in_bytes, in_seconds, in_units

VARIANTS = {"full": "full attention", "local": "local", "linear": "linear memory", "delta": "delta memory"}
SCHEMES = {"full": "full attention", "rmt": "RMT", "infini": "Infini-attention, {update}", "armt": "ARMT"}
TASKS = ("memorize", "detect", "reasoning")
READERS = {
    "full": "full attention",
    "delta": "Infini-attention, delta",
    "rmt": "RMT",
    "armt": "ARMT",
}
PRETRAINED = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
BENCHMARKS = {"ruler": "RULER", "babilong": "BABILong"}
# folder of a pretrained model's scores → how it reads
ANSWERING = {
    "smollm2": "SmolLM2-135M-Instruct, full attention",
    "smollm2-window": "segments of 256, lookback=1, sinks=4",
}
# folder of a pretrained model's passkeys → how it reads; longer texts are in folders of their own
RECALLING = {
    "smollm2-passkeys-window": "window alone",
    "smollm2-passkeys": "fitted alone, linear",
    "smollm2-passkeys-no-maps-linear": "trained without maps, linear",
    "smollm2-passkeys-trained": "trained, linear, seed 0",
    "smollm2-passkeys-trained-linear-1": "trained, linear, seed 1",
    "smollm2-passkeys-trained-linear-2": "trained, linear, seed 2",
    "smollm2-passkeys-trained-delta-0": "trained, delta, seed 0",
}
OF_LENGTHS = ("", "-long", "-128k", "-1m")
# of its training's rounds
SHOWN_ROUNDS = (1, 2, 3, 4, 6, 8, 10, 12, 14)
# how SmolLM2 reads a text, each in a folder; what is trained further is in another, as `TRAINING` has it
READINGS = {
    "full": "full attention",
    "window": "window alone",
    "linear": "memory fitted, linear",
    "delta": "memory fitted, delta",
}
TRAINING = {"": "", "-rounds": ", then trained in rounds", "-lora": ", then LoRA"}
# the least share of values recalled for a number of pairs to count as held
HELD = 0.95


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in lines)


def figures_in(path: Path) -> Any:
    """Return a JSON's figures; None where there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def spread(values: Sequence[float], how: str) -> str:
    """Return mean and standard deviation, as many digits of both."""
    return f"{values[0]:{how}} ± {values[1]:{how.removeprefix('+')}}"


def baselines(figures: Any) -> str:
    """Return a row for each model of `python -m segattn.bench.experiments.baselines`."""
    lengths = sorted(map(int, next(iter(figures["kept"].values()))["counted"]))
    shortest, longest = lengths[0], lengths[-1]
    head = ["", f"bytes kept of {shortest:,}", f"of {longest:,}", "perplexity per byte", "nats, against local"]
    # what was trained at one rate has none
    rates = figures.get("rates")
    rows = []
    for name, kept in figures["kept"].items():
        found = figures["summary"][name]
        speeds = [f"{figures['speed'][kind][name]['ratio']:.2f}" for kind in ("train", "evaluate")]
        counted = [f"{kept['counted'][length]:,}" for length in (str(shortest), str(longest))]
        learnt = [spread(found["perplexity"], ".3f"), spread(found["nats_less_local"], "+.3f")]
        rows.append([name, *([f"{rates[name]:g}"] if rates else []), *counted, *learnt, *speeds])
    head[1:1] = ["learning rate"] if rates else []
    return markdown([*head, "training speed", "reading speed"], rows)


def book(figures: Any) -> str:
    """Return a column for each model of `python -m segattn.bench.experiments.book`."""
    found = [figures["summary"][name] for name in VARIANTS]
    less = ["0" if x["nats_less_local"][0] == 0 else spread(x["nats_less_local"], "+.3f") for x in found]
    rows = [
        ["perplexity", *(spread(x["perplexity"], ".2f") for x in found)],
        ["nats per byte, against local", *less],
    ]
    return markdown(["", *VARIANTS.values()], rows)


def conversions(folder: Path) -> str | None:
    """Return a table for each pretrained model that `segattn convert-report` has read a text with."""
    return _pretrained(folder, "convert-report.json")


def adaptations(folder: Path) -> str | None:
    """Return a table for each pretrained model and rule that `segattn adapt` has fitted to running text alone."""
    others = ("prompts", "rounds")
    return _pretrained(folder, "adapt.json", lambda figures: not any(figures["settings"].get(x) for x in others))


def beside_passkeys(folder: Path) -> str | None:
    """Return a row for each model that `segattn adapt` has fitted to passkeys: its perplexity of running text."""
    found = {title: figures_in(folder / "pretrained" / name / "adapt.json") for name, title in RECALLING.items()}
    fitted = {title: figures for title, figures in found.items() if figures}
    if not fitted:
        return None
    # of the same text, so that what is without a memory reads it alike in all runs
    first = next(iter(fitted.values()))["rows"]
    read = [row for row in first if row["conversion"] in ("full attention", "window alone")]
    for title, figures in fitted.items():
        read += [row | {"conversion": title} for row in figures["rows"] if row["conversion"] == "adapted"]
    head, *rows = _quarters("SmolLM2-135M-Instruct, perplexity", read)
    return markdown(head, rows)


def passkeys(folder: Path) -> str | None:
    """Return a row for each reader and length of `segattn evaluate passkey`: whole keys and digits recalled."""
    found: dict[tuple[str, int], dict[float, str]] = {}
    for name, title in RECALLING.items():
        files = [figures_in(folder / "pretrained" / f"{name}{lengths}" / "passkey.json") for lengths in OF_LENGTHS]
        for cell in (cell for figures in files if figures for cell in figures["cells"]):
            said = f"{round(cell['exact'] * cell['samples'])} of {cell['samples']}; {100 * cell['tokens']:.0f} %"
            found.setdefault((title, cell["length"]), {})[cell["depth"]] = said
    if not found:
        return None
    depths = sorted({depth for cells in found.values() for depth in cells})
    rows = [
        [title, f"{length:,}", *(cells.get(depth, "") for depth in depths)] for (title, length), cells in found.items()
    ]
    return markdown(["whole keys; digits", "tokens", *(f"at {100 * depth:g} %" for depth in depths)], rows)


def readings(folder: Path) -> str | None:
    """Return a row for each way of reading a text, before and after training: perplexity by position, and what is won.

    Won: the share of what a token costs more in the window alone than in full attention that the memory takes off.
    """
    head: list[str] = []
    rows = []
    for suffix, when in TRAINING.items():
        found = _read(folder, suffix)
        # rounds change nothing but the memory, so that the readings without one are those before
        against = _read(folder, "") if suffix == "-rounds" else found
        for name, figures in found.items():
            won = ""
            if name not in ("full", "window") and {"full", "window"} <= against.keys():
                nats, full, window = (x["mean"]["nats"] for x in (figures, against["full"], against["window"]))
                won = f"{(window - nats) / (window - full):.0%}"
            head, row = _by_position(f"{READINGS[name]}{when}", figures)
            rows.append([*row, won])
    return markdown([*head, "won"], rows) if rows else None


def far_readings(folder: Path) -> str | None:
    """Return a row for each way of reading a text beyond the model's positions: perplexity by position."""
    found = [
        _by_position(f"{READINGS[name]}{TRAINING[suffix]}", figures)
        for suffix in ("", "-rounds")
        for name, figures in _read(folder, f"{suffix}-32k").items()
    ]
    return markdown(found[0][0], [row for _, row in found]) if found else None


def _read(folder: Path, suffix: str) -> dict[str, Any]:
    """Return the figures of each way in which SmolLM2 has read a text, of the folders with this suffix."""
    files = {name: folder / "pretrained" / f"smollm2-text-{name}{suffix}" / "perplexity.json" for name in READINGS}
    return {name: figures for name, path in files.items() if (figures := figures_in(path))}


def _by_position(title: str, figures: Any) -> tuple[list[str], list[str]]:
    """Return a head, and a row of the perplexity of each part of a text and of all of it."""
    parts = figures["by_position"]
    head = ["perplexity", *(f"to {part['end']:,}" for part in parts), "all"]
    return head, [title, *(f"{x['perplexity']:.1f}" for x in (*parts, figures["mean"]))]


def rounds(folder: Path) -> str | None:
    """Return a row for each training on passkeys by `segattn adapt --rounds`: loss, and whole keys, of some rounds."""
    rows = []
    for name, title in RECALLING.items():
        figures = figures_in(folder / "pretrained" / name / "adapt.json") or {}
        if found := figures.get("rounds"):
            shown = [found[number - 1] for number in SHOWN_ROUNDS if number <= len(found)]
            rows.append([title, *(f"{x['loss']:.2f}; {100 * x['keys']:.0f} %" for x in shown)])
    if not rows:
        return None
    return markdown(["nats a digit; whole keys", *(f"round {number}" for number in SHOWN_ROUNDS)], rows)


def _pretrained(folder: Path, file: str, shown: Callable[[Any], bool] = lambda figures: True) -> str | None:
    """Return a table for each model and way in which it has read a text, of those that are shown."""
    tables = []
    for name, title in PRETRAINED.items():
        for path in sorted((folder / "pretrained").glob(f"{name}*/{file}")):
            figures = figures_in(path)
            if not shown(figures):
                continue
            rule = path.parent.name.removeprefix(name).removeprefix("-").replace("-", ", ")
            heading = f"{title}, perplexity" if not rule else f"{title}, {rule}, perplexity"
            head, *rows = _quarters(heading, figures["rows"])
            tables.append(markdown(head, rows))
    return "\n\n".join(tables) or None


def _quarters(title: str, found: Sequence[Any]) -> list[list[str]]:
    """Return a head, and a row for each way of reading a text: its perplexity by quarters, and what is kept."""
    ends = [bucket["end"] for bucket in found[0]["by_position"]]
    quarters = [f"to {ends[min(i + 3, len(ends) - 1)]:,}" for i in range(0, len(ends), 4)]
    rows = [
        [x["conversion"], *(f"{p:.1f}" for p in x["quarters"]), f"{x['perplexity']:.2f}", in_bytes(x["cache_bytes"])]
        for x in found
    ]
    return [[title, *quarters, "all", "kept"], *rows]


def plan(figures: Any) -> str:
    """Return a row for each scheme of `segattn plan llama-3-8b`, at the longest of its lengths."""
    longest = max(row["length"] for row in figures["estimates"])
    found = {row["scheme"]: row for row in figures["estimates"] if row["length"] == longest}
    rows = []
    for name, title in SCHEMES.items():
        row = found[name]
        times = [in_seconds(row[key]) for key in ("prefill_floor_s", "decode_floor_s_per_token")]
        kept = [in_bytes(row[key]) if row[key] else "0" for key in ("state_bytes", "cache_bytes")]
        flops = [in_units(row["forward_flops"], ""), f"{row['flops_saving']:.2f}"]
        rows.append([title.format(update=figures["update"]), *flops, *times, *kept])
    return markdown(["", "forward FLOPs", "full ÷", "prefill", "decode, a token", "state", "cache"], rows)


def memory_tasks(folder: Path) -> str | None:
    """Return two rows for each task that `segattn rmt` has trained and evaluated: its share right, and the paper's.

    Raises:
        ValueError: Two tasks are of unlike lengths.
    """
    lengths: list[int] = []
    rows = []
    for task in TASKS:
        files = [folder / "rmt" / task / f"{name}.json" for name in ("figures", "evaluation")]
        if not all(path.is_file() for path in files):
            continue
        evaluation = figures_in(files[1])
        cells, paper = evaluation["lengths"], evaluation["published"]
        segments = [cell["segments"] for cell in cells]
        lengths = lengths or segments
        if segments != lengths:
            raise ValueError(f"{task} must be of {lengths} segments as the others, got {segments}")
        rows.append([task, *(f"{100 * cell['right'] / cell['samples']:.1f} ({cell['samples']})" for cell in cells)])
        rows.append(["the paper's", *(f"{100 * paper[str(n)]:.1f}" for n in segments)])
    if not rows:
        return None
    first, *others = map(str, lengths)
    return markdown(["right, % (of samples)", f"{first} segments", *others], rows)


def retrieval(folder: Path) -> str | None:
    """Return a row for each size of ARMT's memory: the share of values that are recalled, and the pairs held."""
    found = [figures_in(path) for path in (folder / "rmt" / "retrieval").glob("*/evaluation.json")]
    if not found:
        return None
    found.sort(key=lambda evaluation: evaluation["lengths"][0]["state_bytes"])
    # the last segment asks
    pairs = [cell["segments"] - 1 for cell in found[0]["lengths"]]
    rows = []
    for evaluation in found:
        shares = [cell["accuracy"] for cell in evaluation["lengths"]]
        held = [n for n, share in zip(pairs, accumulate(shares, min), strict=True) if share >= HELD]
        cells = [f"{100 * share:.1f}" for share in shares]
        rows.append([f"{evaluation['lengths'][0]['state_bytes']:,}", *cells, str(max(held, default=0))])
    first, *others = map(str, pairs)
    return markdown(["state, bytes", f"{first} pairs", *others, "held at 95 %"], rows)


def recurrent_lengths(figures: Any) -> str:
    """Return a row for each reader of `python -m segattn.bench.experiments.lengths`: a token's time, the bytes kept."""
    lengths = sorted({row["segments"] for row in figures["summary"]})
    found = {(row["reader"], row["segments"]): row for row in figures["summary"]}
    rows = []
    for reader in dict.fromkeys(row["reader"] for row in figures["summary"]):
        cells = [found.get((reader, segments)) for segments in lengths]
        rows.append(
            [reader, *(f"{x['ratio_to_shortest']:.2f}; {in_bytes(x['kept_bytes'])}" if x else "" for x in cells)]
        )
    first, *others = map(str, lengths)
    return markdown([f"time of a token, ÷ that of {first} segments; kept", f"{first} segments", *others], rows)


def million(figures: Any) -> str:
    """Return a row for each rule and length of `python -m segattn.bench.experiments.million`: the passkeys recalled."""
    found = {(x["update"], x["length"], x["depth"]): x for x in figures["summary"]}
    rows = []
    for update in dict.fromkeys(x["update"] for x in figures["summary"]):
        for length in figures["setup"]["lengths"]:
            cells = [found[update, length, depth] for depth in figures["setup"]["depths"]]
            rows.append([update, f"{length:,}", *(f"{x['right']} of {x['samples']}; {x['seeds']}" for x in cells)])
    depths = [f"at {100 * depth:g} %" for depth in figures["setup"]["depths"]]
    return markdown(["passkeys recalled whole; seeds", "tokens", *depths], rows)


def questions(figures: Any) -> str:
    """Return a row for each model of `python -m segattn.bench.experiments.questions`: what it answers, and keeps."""
    lengths = figures["setup"]["lengths"]
    asked = figures["setup"]["books"] * figures["setup"]["people"]
    rows = []
    by_model = {run["model"]: run for run in figures["runs"]}
    for run in (by_model[name] for name in READERS if name in by_model):
        found = {cell["length"]: cell for cell in run["lengths"]}
        cells = [f"{100 * found[n]['right']:.1f}" if n in found else "" for n in lengths]
        kept = [in_bytes(found[n]["kept_bytes"]) for n in lengths if n in found]
        rows.append([READERS[run["model"]], *cells, kept[0] if len(set(kept)) == 1 else f"{kept[0]} to {kept[-1]}"])
    rows.append(["guessing", *[f"{100 * figures['chance']:.1f}"] * len(lengths), ""])
    first, *others = (f"{n:,}" for n in lengths)
    return markdown([f"right, % of {asked} answers", f"{first} tokens", *others, "kept of a book"], rows)


def benchmarks(folder: Path) -> str | None:
    """Return two rows for each benchmark that `segattn evaluate` has run by lm-eval: memory held and time by length.

    Raises:
        ValueError: Two benchmarks are of unlike lengths.
    """
    lengths: list[int] = []
    rows = []
    for name, title in BENCHMARKS.items():
        figures = figures_in(folder / "lm_eval" / f"{name}.json")
        if figures is None:
            continue
        cells = figures["cells"]
        found = sorted({cell["length"] for cell in cells})
        lengths = lengths or found
        if found != lengths:
            raise ValueError(f"{name} must be of {lengths} tokens as the other, got {found}")
        of_length = [[cell for cell in cells if cell["length"] == n] for n in lengths]
        held = [max(cell["peak_bytes"] for cell in of_n) / 2**20 for of_n in of_length]
        seconds = [sum(cell["seconds"] for cell in of_n) / sum(cell["samples"] for cell in of_n) for of_n in of_length]
        right = [sum(cell["score"] for cell in of_n) / len(of_n) for of_n in of_length]
        tasks = ", ".join(dict.fromkeys(cell["task"] for cell in cells))
        rows.append([f"{title} ({tasks}): most memory held, MiB", *(f"{x:,.0f}" for x in held)])
        rows.append(["seconds a text, its making included", *(f"{x:.1f}" for x in seconds)])
        rows.append(["right, %", *(f"{100 * x:.1f}" for x in right)])
    if not rows:
        return None
    first, *others = (f"{n:,}" for n in lengths)
    return markdown(["", f"{first} tokens", *others], rows)


def scores(folder: Path) -> str | None:
    """Return a row for each task that `segattn evaluate` has asked of a pretrained model by lm-eval, and each model."""
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    lengths: set[int] = set()
    for benchmark, title in BENCHMARKS.items():
        for name, model in ANSWERING.items():
            figures = figures_in(folder / "lm_eval" / name / f"{benchmark}.json") or {"cells": []}
            for cell in figures["cells"]:
                row = rows.setdefault((f"{title} {cell['task']}", f"{cell['samples']} texts", model), {})
                row[cell["length"]] = f"{100 * cell['score']:.0f}"
                lengths.add(cell["length"])
    if not rows:
        return None
    head = ["right, %", "", *(f"{length:,}" for length in sorted(lengths))]
    return markdown(
        head,
        [
            [f"{task}, {texts}", model, *(row.get(length, "") for length in sorted(lengths))]
            for (task, texts, model), row in rows.items()
        ],
    )
