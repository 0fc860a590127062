"""Rows of tokens, read from the disk as they are needed, from any row on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...runs.checkpoint import SettingError
from ..evaluate.loading import Tokenizer
from ..finetune.text import dataset_of
from .processes import is_first
from .settings import LongSettings

# of a file, tokenised at once: whole lines of so many bytes together
STRETCH = 2**18


class Position(NamedTuple):
    """Where a row begins: how often the text was read before, in which piece of it, and at which of its tokens."""

    epoch: int = 0
    place: int = 0
    token: int = 0


START = Position()

# from a place on, the pieces of a text, each with its own place
Pieces = Callable[[int], Iterator[tuple[int, Tensor]]]


def pieces_of_file(path: str | os.PathLike[str], tokenizer: Tokenizer) -> Pieces:
    """Tokens of a file in UTF-8, some lines at a time, begun as the tokenizer begins a text; places are bytes.

    Raises:
        SettingError: of `text`; that it is no UTF-8, when the pieces are read.
    """
    if not os.path.isfile(path):
        raise SettingError("text", f"must be a file that can be read, got {str(path)!r}")

    def read(place: int) -> Iterator[tuple[int, Tensor]]:
        with open(path, "rb") as file:
            file.seek(place)
            while lines := file.readlines(STRETCH):
                try:
                    tokens = tokenizer.encode(b"".join(lines).decode())
                except UnicodeDecodeError:
                    raise SettingError("text", f"must be a file of UTF-8 text, got {str(path)!r}") from None
                prefix = [] if place else tokenizer.prefix
                yield place, torch.tensor(prefix + tokens, dtype=torch.long)
                place = file.tell()

    return read


def pieces_of_dataset(name: str, tokenizer: Tokenizer, split: str, column: str) -> Pieces:
    """Tokens of the texts of a data set, each begun as the tokenizer begins a text; places count texts.

    Raises:
        SettingError: naming the option.
    """
    data = dataset_of(name, split)
    if column not in data.column_names:
        raise SettingError("column", f"must be one of {', '.join(data.column_names)}, got {column!r}")

    def read(place: int) -> Iterator[tuple[int, Tensor]]:
        for index in range(place, len(data)):
            text = data[index][column]
            if not isinstance(text, str):
                raise SettingError("column", f"must hold text, got {column!r}, which holds {type(text).__name__}")
            yield index, torch.tensor(tokenizer.prefix + tokenizer.encode(text), dtype=torch.long)

    return read


def rows(pieces: Pieces, length: int, begin: Position = START) -> Iterator[tuple[Tensor, Position]]:
    """Without end: int64 [length] cut without overlap, and where the next one begins.

    What fills no row at the text's end is left out, and the text begins anew.

    Raises:
        SettingError: of `length`, where the whole text fills none.
    """
    epoch, place, skipped = begin
    while True:
        held: list[Tensor] = []
        count, found = 0, place > 0 or skipped > 0
        for where, tokens in pieces(place):
            first, skipped = skipped, 0
            while count + len(tokens) - first >= length:
                last = first + length - count
                yield torch.cat([*held, tokens[first:last]]), Position(epoch, where, last)
                held, count, first, found = [], 0, last, True
            held.append(tokens[first:])
            count += len(tokens) - first
        if not found:
            raise SettingError("length", f"must be at most the {count} tokens of the text, got {length}")
        epoch, place, skipped = epoch + 1, 0, 0


class Rows:
    """The same rows for every rank, of which the first one reads them.

    Args:
        begin: where the first row begins.

    Attributes:
        fingerprint: of the text's first row; empty on other ranks.
        position: where the next row begins.

    Raises:
        SettingError: of the text, on the first rank.
    """

    def __init__(self, settings: LongSettings, tokenizer: Tokenizer, begin: Position = START) -> None:
        self.length, self.position, self.fingerprint = settings.length, begin, ""
        if is_first():
            if settings.text is not None:
                pieces = pieces_of_file(settings.text, tokenizer)
            else:
                pieces = pieces_of_dataset(str(settings.dataset), tokenizer, settings.split, settings.column)
            row, _ = next(rows(pieces, self.length))
            self.fingerprint = hashlib.sha256(row.numpy().tobytes()).hexdigest()
            self._rows = rows(pieces, self.length, begin)

    def read(self, count: int) -> Tensor:
        """int64 [count, length], the next ones, on the CPU.

        Raises:
            SettingError: on every rank, of the text.
        """
        told = torch.zeros(count * self.length + len(self.position) + 1, dtype=torch.long)
        problem: list[tuple[str, str] | None] = [None]
        if is_first():
            try:
                found = [next(self._rows) for _ in range(count)]
                torch.cat([*(row for row, _ in found), torch.tensor([*found[-1][1], 1])], out=told)
            except SettingError as error:
                problem = [(error.name, error.problem)]
        dist.broadcast(told, 0)
        read, (*position, is_read) = told[: count * self.length], told[count * self.length :].tolist()
        if not is_read:
            dist.broadcast_object_list(problem, 0)
            raise SettingError(*(problem[0] or ("text", "cannot be read")))
        self.position = Position(*position)
        return read.view(count, self.length)
