"""Rows of tokens, read from a text in its order as they are needed, or shuffled; both from any row on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...runs.errors import SettingError, first_line
from ..evaluate.loading import Tokenizer
from .processes import is_first, shared
from .settings import TrainSettings

# bytes of a file that are tokenized at once, in whole lines
STRETCH = 2**18


class Position(NamedTuple):
    """The place where a row begins: how often the text was read before, the piece of it, the token in the piece."""

    epoch: int = 0
    place: int = 0
    token: int = 0


START = Position()

# yields the pieces of a text from a place on, each with its place
Pieces = Callable[[int], Iterator[tuple[int, Tensor]]]
# yields without end a row, int64 [length], and where the next one begins
Stream = Iterator[tuple[Tensor, Position]]


def pieces_of_file(path: str | Path, tokenizer: Tokenizer) -> Pieces:
    """Return a reader of a file in UTF-8, some lines at a time, begun as the tokenizer begins a text.

    Every end of a line is read as "\\n". Places are bytes of the file.

    Raises:
        SettingError: of `text`, also by the reader.
    """
    if not Path(path).is_file():
        raise SettingError("text", f"must be a file that can be read, got {str(path)!r}")

    def read(place: int) -> Iterator[tuple[int, Tensor]]:
        try:
            with open(path, "rb") as file:
                file.seek(place)
                while lines := file.readlines(STRETCH):
                    text = b"".join(lines).decode().replace("\r\n", "\n").replace("\r", "\n")
                    prefix = [] if place else tokenizer.prefix
                    yield place, torch.tensor(prefix + tokenizer.encode(text), dtype=torch.long, device="cpu")
                    place = file.tell()
        except UnicodeDecodeError:
            raise SettingError("text", f"must be a file of UTF-8 text, got {str(path)!r}") from None
        except OSError as error:
            reason = f"got {str(path)!r} ({error.strerror})"
            raise SettingError("text", f"must be a file that can be read, {reason}") from None

    return read


def pieces_of_dataset(name: str, tokenizer: Tokenizer, split: str, column: str) -> Pieces:
    """Return a reader of the texts of a data set, each begun as the tokenizer begins a text; places count texts.

    Args:
        name: of the hub, a folder of data files, or one that `save_to_disk` wrote.
        split: "train", or a slice as "train[:10%]" where it is not from `save_to_disk`.
        column: of the data set, with the text.

    Raises:
        SettingError: naming the option.
    """
    data = _dataset(name, split)
    if column not in data.column_names:
        raise SettingError("column", f"must be one of {', '.join(data.column_names)}, got {column!r}")

    def read(place: int) -> Iterator[tuple[int, Tensor]]:
        for index in range(place, len(data)):
            text = data[index][column]
            if not isinstance(text, str):
                raise SettingError("column", f"must hold text, got {column!r}, which holds {type(text).__name__}")
            yield index, torch.tensor(tokenizer.prefix + tokenizer.encode(text), dtype=torch.long, device="cpu")

    return read


def _dataset(name: str, split: str) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise SettingError("dataset", f"needs {error.name}: pip install 'segattn[data]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if not any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(name, split=split)
        data: Any = datasets.load_from_disk(name)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        option = "split" if "split" in reason.lower() else "dataset"
        given = split if option == "split" else name
        raise SettingError(option, f"must lead to a data set, got {given!r}: {reason}") from None
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise SettingError("split", f"must be one of {', '.join(map(str, data))}, got {split!r}")
    return data[split]


def in_order(pieces: Pieces, length: int, begin: Position = START, first: Position = START) -> Stream:
    """Yield the rows of a text without end, cut without overlap; tokens at its end that fill no row are left out.

    Args:
        begin: where the first row begins.
        first: where the text begins anew.

    Raises:
        SettingError: of `length`, where the whole text fills no row.
    """
    epoch, place, skipped = begin
    while True:
        held: list[Tensor] = []
        count, fills = 0, place > 0 or skipped > 0
        for where, tokens in pieces(place):
            start, skipped = skipped, 0
            while count + len(tokens) - start >= length:
                last = start + length - count
                yield torch.cat([*held, tokens[start:last]]), Position(epoch, where, last)
                held, count, start, fills = [], 0, last, True
            held.append(tokens[start:])
            count += len(tokens) - start
        if not fills:
            raise SettingError("length", f"must be at most the {count} tokens of the text, got {length}")
        epoch, place, skipped = epoch + 1, first.place, first.token


def shuffled(table: Tensor, seed: int, begin: Position = START) -> Stream:
    """Yield the rows of a table [R, length] without end, shuffled anew whenever each was there once."""
    epoch, place, _ = begin
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(table))
        for row in range(place, len(table)):
            yield table[order[row]], Position(epoch, row + 1)
        epoch, place = epoch + 1, 0


class Rows:
    """The rows of a run: the first rank reads them, and every rank gets the same.

    Args:
        begin: where the first row to train on begins; None: after the rows that are held out.

    Attributes:
        fingerprint: of the text, or of the first rows of one that is streamed; empty on other ranks.
        position: where the next row begins; None before any was read.

    Raises:
        SettingError: of the text, on the first rank.
    """

    def __init__(self, settings: TrainSettings, tokenizer: Tokenizer, begin: Position | None = None) -> None:
        held, self.position, self.fingerprint = settings.eval_rows, begin, ""
        if not is_first():
            return
        if settings.text is not None:
            pieces = pieces_of_file(settings.text, tokenizer)
        else:
            pieces = pieces_of_dataset(str(settings.dataset), tokenizer, settings.split, settings.column)
        once = takewhile(lambda row: row[1].epoch == 0, in_order(pieces, settings.length))
        taken = list(islice(once, held + 1) if settings.stream else once)
        if len(taken) <= held:
            raise SettingError("eval_rows", f"must be below the {len(taken)} rows of the text, got {held}")
        table = torch.stack([row for row, _ in taken])
        self.fingerprint = hashlib.sha256(table.numpy().tobytes()).hexdigest()
        self._held_out = table[:held].clone()
        if settings.stream:
            first = taken[held - 1][1] if held else START
            self._rows = in_order(pieces, settings.length, begin or first, first)
        else:
            self._rows = shuffled(table[held:], settings.seed, begin or START)

    def read(self, count: int) -> Tensor:
        """Return the next rows to train on, int64 [count, length] on the CPU, on every rank.

        Raises:
            SettingError: of the text.
        """

        def take() -> tuple[Tensor, Position]:
            taken = list(islice(self._rows, count))
            # a copy, since a view is sent with all that it is a view of
            return torch.stack([row for row, _ in taken]), taken[-1][1]

        rows, self.position = shared(take)
        return rows

    def held_out(self) -> Tensor:
        """Return the rows to evaluate on, int64 [eval_rows, length] on the CPU, on every rank."""
        return shared(lambda: self._held_out)
