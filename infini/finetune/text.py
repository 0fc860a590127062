"""A text file, or a data set of the `datasets` library, as rows of tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...runs.checkpoint import SettingError
from ...runs.figures import read_text

if TYPE_CHECKING:
    from ..evaluate.loading import Tokenizer


def tokens_of_file(path: str | Path, tokenizer: Tokenizer) -> Tensor:
    """int64 [N]: the text of a file in UTF-8, begun as the tokenizer begins a text.

    Raises:
        SettingError: of `text`.
    """
    return torch.tensor(tokenizer.prefix + tokenizer.encode(read_text(path)))


def tokens_of_dataset(name: str, tokenizer: Tokenizer, split: str = "train", column: str = "text") -> Tensor:
    """int64 [N]: the texts of a data set, laid end to end, each begun as the tokenizer begins a text.

    Args:
        name: of the hub, a folder of data files, or one that `save_to_disk` wrote.
        split: "train", or a slice as "train[:10%]" where it is not from `save_to_disk`.
        column: the one that holds the text.

    Raises:
        SettingError: naming the option.
    """
    data = dataset_of(name, split)
    if column not in data.column_names:
        raise SettingError("column", f"must be one of {', '.join(data.column_names)}, got {column!r}")
    parts = []
    for text in data[column]:
        if not isinstance(text, str):
            raise SettingError("column", f"must hold text, got {column!r}, which holds {type(text).__name__}")
        parts.append(torch.tensor(tokenizer.prefix + tokenizer.encode(text), dtype=torch.long))
    return torch.cat([torch.zeros(0, dtype=torch.long), *parts])


def rows_of(tokens: Tensor, length: int) -> Tensor:
    """[R, length]: tokens [N] cut without overlap; what fills no row is left out.

    Raises:
        SettingError: of `length`, where they fill none.
    """
    if len(tokens) < length:
        raise SettingError("length", f"must be at most the {len(tokens)} tokens of the text, got {length}")
    return tokens[: len(tokens) // length * length].view(-1, length)


def dataset_of(name: str, split: str) -> Any:
    """A split of a data set, by its name on the hub or its folder."""
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        option = "split" if "split" in reason.lower() else "dataset"
        given = split if option == "split" else name
        raise SettingError(option, f"must lead to a data set, got {given!r}: {reason}") from None
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise SettingError("split", f"must be one of {', '.join(map(str, data))}, got {split!r}")
    return data[split]
