"""The calls that `segattn check` compares: one table, in a small and in a full size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from .calls import Call

# for a CPU, and for the interpreter, which takes 10 to 50 milliseconds for every tile of 16 x 16
SMALL = Call(B=1, H=1, G=1, Tq=21, Tk=21, K=16, V=16, segment_len=16, remembered=40)
FULL = Call(B=2, H=4, G=2, Tq=1111, Tk=1111, K=64, V=64, segment_len=128, remembered=400)

Changes = dict[str, Any]
# a call's name → its changes in both sizes, in the small one (None: the small table is without it), in the full one
TABLE: dict[str, tuple[Changes, Changes | None, Changes]] = {
    "rows": ({}, {"H": 2}, {}),
    "whole segments": ({}, None, {"Tk": 1024}),
    "no state": ({"with_state": False}, {"Tk": 32}, {}),
    "gated when empty": ({"with_state": False, "empty_memory": "gated"}, {}, {}),
    "linear": ({"update": "linear"}, {}, {}),
    "linear, no state": ({"update": "linear", "with_state": False}, None, {"Tk": 1024}),
    "shared memory inputs": ({"own_memory_inputs": False}, {"Tk": 16}, {}),
    "shared, linear": ({"own_memory_inputs": False, "update": "linear"}, None, {}),
    "token major": ({"token_major": True}, {"Tk": 9}, {}),
    "scale 1": ({"scale": 1.0}, {"Tk": 9}, {}),
    "capped": ({"scale": 1.0, "softcap": 5.0}, {"Tk": 17}, {}),
    # the delta rule overshoots where a memory of few tokens meets a long segment
    "young memory": ({}, {"remembered": 4, "Tk": 16}, {"remembered": 32}),
    "equal heads": ({}, {"H": 2, "G": 2, "Tk": 9}, {"G": 4}),
    "four heads to one": ({}, None, {"H": 8}),
    "eight heads to one": ({}, None, {"H": 16, "G": 2, "B": 1}),
    "prefill in pieces": ({}, {"Tq": 9}, {"Tk": 1500, "Tq": 777}),
    "one token": ({"Tk": 1}, {}, {}),
    "decode": ({"Tq": 1}, {"Tk": 13}, {"Tk": 1531, "segment_len": 2048, "H": 8}),
    "decode over an edge": ({}, {"Tq": 3, "Tk": 18}, {"Tq": 5, "Tk": 131}),
    "decode, linear": ({"Tq": 1, "update": "linear"}, {"Tk": 9}, {"Tk": 127, "B": 3}),
    "packed": (
        {"B": 1},
        {"Tk": 18, "cu_seqlens": (0, 1, 1, 18)},
        {"Tk": 2100, "cu_seqlens": (0, 37, 37, 38, 900, 2100)},
    ),
    "packed, linear, no state": (
        {"B": 1, "update": "linear", "with_state": False},
        {"Tk": 22, "cu_seqlens": (0, 17, 22)},
        {"cu_seqlens": (0, 129, 512, 1111)},
    ),
    "packed, last queries": (
        {"B": 1},
        None,
        {"Tq": 300, "cu_seqlens": (0, 300, 900, 1111)},
    ),
    "packed, shorter than a segment": (
        {"B": 1},
        {"segment_len": 30, "Tk": 12, "cu_seqlens": (0, 4, 4, 12)},
        {"segment_len": 700, "cu_seqlens": (0, 5, 600, 1111)},
    ),
    "padding": ({"B": 2}, {"Tk": 11, "segment_len": 8, "spans": ((3, 11), (0, 5))}, {"spans": ((130, 1111), (0, 600))}),
    "padding, last queries": (
        {"B": 2},
        None,
        {"Tq": 200, "spans": ((3, 1111), (999, 1111))},
    ),
    "bidirectional": ({"causal": False}, {"Tk": 16}, {}),
    "bidirectional, packed": ({"B": 1, "causal": False}, None, {"cu_seqlens": (0, 333, 1111)}),
    "lookback": ({"lookback": 1}, {"Tk": 28, "segment_len": 12}, {}),
    "lookback, linear, no state": ({"lookback": 1, "update": "linear", "with_state": False}, None, {"Tk": 1024}),
    "lookback, local": ({"lookback": 1, "gated": False}, None, {}),
    "sinks": ({"sinks": 4}, None, {}),
    "window": ({"lookback": 1, "sinks": 4}, {"Tk": 29, "segment_len": 9}, {}),
    "window, capped": ({"lookback": 1, "sinks": 4, "scale": 1.0, "softcap": 5.0}, None, {}),
    "window, bidirectional": ({"lookback": 1, "sinks": 4, "causal": False}, None, {}),
    "window, prefill in pieces": (
        {"lookback": 1, "sinks": 4, "own_sinks": "segment"},
        {"Tk": 23, "Tq": 9, "segment_len": 9, "past": 9},
        {"Tk": 1500, "Tq": 777, "past": 1280},
    ),
    "window, decode": (
        {"lookback": 1, "sinks": 4, "own_sinks": "sequence", "Tq": 1},
        {"Tk": 13, "segment_len": 9, "past": 18},
        {"Tk": 200, "past": 1280, "H": 8},
    ),
    "window, packed": (
        {"B": 1, "lookback": 1, "sinks": 4},
        {"Tk": 25, "segment_len": 8, "cu_seqlens": (0, 3, 3, 25)},
        {"Tk": 2100, "cu_seqlens": (0, 37, 37, 38, 900, 2100)},
    ),
    "window, padding": (
        {"B": 2, "lookback": 1, "sinks": 4},
        None,
        {"spans": ((130, 1111), (0, 600))},
    ),
    "sink logits": ({"sink_logits": True}, {"H": 2, "Tk": 17}, {}),
    "sink logits, local, decode": ({"sink_logits": True, "gated": False, "Tq": 1}, {"Tk": 9}, {"Tk": 100}),
    "alibi": ({"alibi": True}, {"H": 2, "Tk": 17}, {}),
    "alibi, bidirectional": ({"alibi": True, "causal": False}, None, {}),
    "alibi, window": ({"alibi": True, "lookback": 1, "sinks": 4}, {"Tk": 21, "segment_len": 8}, {}),
    "alibi, packed": ({"alibi": True, "B": 1}, None, {"cu_seqlens": (0, 37, 37, 38, 900, 1111)}),
    "alibi, sink logits, decode": (
        {"alibi": True, "sink_logits": True, "Tq": 1},
        {"H": 2, "Tk": 13},
        {"Tk": 1531, "segment_len": 2048, "H": 8},
    ),
    "alibi, sink logits, capped": ({"alibi": True, "sink_logits": True, "scale": 1.0, "softcap": 5.0}, None, {}),
    "local": ({"gated": False}, {}, {}),
    "local, decode": ({"gated": False}, {"Tq": 2, "Tk": 18}, {"Tq": 1, "Tk": 1000}),
    "local, bidirectional": ({"gated": False, "causal": False}, None, {}),
    "block mask": (
        {"gated": False},
        {"segment_len": 40, "Tk": 15, "num_read": 3, "num_write": 5},
        {"Tk": 600, "segment_len": 700, "num_read": 16, "num_write": 20},
    ),
    "block mask, padded": (
        {"B": 2, "gated": False},
        {"Tk": 12, "segment_len": 12, "num_read": 2, "num_write": 3, "spans": ((0, 12), (3, 10))},
        {"Tk": 600, "segment_len": 600, "num_read": 16, "num_write": 16, "spans": ((0, 600), (100, 500))},
    ),
    "block mask, packed": (
        {"B": 1, "gated": False},
        None,
        {"Tk": 1111, "segment_len": 700, "num_read": 16, "num_write": 16, "cu_seqlens": (0, 600, 1111)},
    ),
    "odd segments": ({}, {"segment_len": 11, "Tk": 11}, {"segment_len": 37, "Tk": 500}),
    "short segments": ({}, None, {"segment_len": 16}),
    "long segments": ({}, {"segment_len": 20, "Tk": 20}, {"segment_len": 2048, "Tk": 4099, "B": 1, "K": 128, "V": 128}),
    "long rows": ({}, None, {"Tk": 8192, "segment_len": 512, "B": 1, "K": 128, "V": 128}),
    "uneven widths": ({"K": 24}, {"Tk": 8, "segment_len": 8}, {"V": 80}),
    "wide keys": ({"V": 16}, None, {"K": 96}),
    "wide": ({}, None, {"K": 192, "V": 192}),
    "widest": ({}, None, {"K": 256, "V": 256}),
    "widest, linear": ({"update": "linear"}, None, {"K": 256, "V": 256}),
    "widest, local": ({"gated": False}, None, {"K": 256, "V": 256}),
    "narrowest": ({"K": 16, "V": 16}, None, {}),
}


def calls_of(size: str) -> dict[str, Call]:
    """Return the table's calls by name, in one size, "small" or "full"; as many queries as keys where none are said."""
    base, column = (SMALL, 1) if size == "small" else (FULL, 2)
    chosen = {name: (row[0], row[column]) for name, row in TABLE.items()}
    return {name: _changed(base, both | own) for name, (both, own) in chosen.items() if own is not None}


def _changed(base: Call, changes: Changes) -> Call:
    return replace(base, **({"Tq": changes.get("Tk", base.Tk)} | changes))


def call_of(text: str) -> Call:
    """Return the call that a text such as "H=8,G=2,T=300,K=96,update=linear" describes.

    What it does not name is as in the small table; T stands for Tq and Tk, and tuples are numbers with colons between
    them: cu_seqlens=0:37:150, spans=3:101:0:60.

    Raises:
        ValueError: a name that calls do not have, or a value that is none of its kind.
    """
    changes: Changes = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in _KINDS:
            raise ValueError(f"must name {', '.join(_KINDS)}, got {name!r}")
        read, wanted = _KINDS[name]
        try:
            changes |= dict.fromkeys(("Tq", "Tk") if name == "T" else (name,), read(value))
        except (ValueError, KeyError):
            raise ValueError(f"must have {wanted} as {name}, got {value!r}") from None
    return _changed(SMALL, changes)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(":"))


def _number_or_numbers(text: str) -> int | tuple[int, ...]:
    return _numbers(text) if ":" in text else int(text)


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    numbers = _numbers(text)
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


# the type of a call's field → how it is read, and what it must be
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "bool": ({"true": True, "false": False}.__getitem__, "true or false"),
    "str": (str, "a word"),
    "str | None": (str, "a word"),
    "float | None": (float, "a number"),
    "int | tuple[int, ...]": (_number_or_numbers, "a whole number, or several with colons between them"),
    "tuple[int, ...] | None": (_numbers, "numbers with colons between them"),
    "tuple[tuple[int, int], ...] | None": (_pairs, "pairs of numbers with colons between them"),
}
_KINDS = {"T": _READERS["int"]} | {field.name: _READERS[str(field.type)] for field in fields(Call)}
