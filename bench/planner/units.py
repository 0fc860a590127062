"""Figures as people read them."""

from __future__ import annotations


def in_bytes(count: float | None) -> str:
    """In units of 1024."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1000 or unit == "PiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def in_flops(count: float) -> str:
    return in_units(count, "FLOP")


def in_seconds(count: float | None) -> str:
    return "–" if count is None else in_units(count, "s") if count < 1000 else f"{count:,.0f} s"


def in_times(ratio: float) -> str:
    return f"{ratio:.2f} ×"


def in_units(count: float, unit: str) -> str:
    """Three digits, with the prefix that leaves one to three before the point."""
    prefixes = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E", 21: "Z"}
    if not count:
        return f"0 {unit}"
    exponent = max((e for e in prefixes if float(f"{count:.3g}") >= 10.0**e), default=-9)
    return f"{count / 10.0**exponent:.3g} {prefixes[exponent]}{unit}"
