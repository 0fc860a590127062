"""Numbers as people read them."""

from __future__ import annotations


def in_bytes(count: float | None) -> str:
    """Write bytes in three digits, with the binary prefix that leaves less than 1000 before the point."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1000 or unit == "PiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def in_flops(count: float) -> str:
    """Write a number of operations in three digits, such as 12.3 TFLOP."""
    return in_units(count, "FLOP")


def in_seconds(count: float | None) -> str:
    """Write seconds in three digits, such as 12.3 ms; whole ones from 1000 on."""
    return "–" if count is None else in_units(count, "s") if count < 1000 else f"{count:,.0f} s"


def in_times(ratio: float) -> str:
    """Write a ratio, such as 1.25 ×."""
    return f"{ratio:.2f} ×"


def in_units(count: float, unit: str) -> str:
    """Write a number in three digits, with the decimal prefix that leaves one to three before the point."""
    prefixes = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E", 21: "Z"}
    if not count:
        return f"0 {unit}"
    exponent = max((e for e in prefixes if float(f"{count:.3g}") >= 10.0**e), default=-9)
    return f"{count / 10.0**exponent:.3g} {prefixes[exponent]}{unit}"
