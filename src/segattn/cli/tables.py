"""Tables of figures, which fit a narrow terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table


def figures_by_name(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """Return a table whose names fold where the terminal is too narrow, and whose figures and heads stay whole.

    Args:
        heads: of the names, and of each figure; of one line or more.
        rows: name → figures.
    """
    # without vertical lines, and with one blank between columns, so that names fold late
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0)
    name, *columns = heads
    table.add_column(name, overflow="fold", min_width=len(name))
    for number, head in enumerate(columns):
        cells = (*head.splitlines(), *(figures[number] for figures in rows.values()))
        table.add_column(head, justify="right", no_wrap=True, min_width=max(map(len, cells)))
    for name, figures in rows.items():
        table.add_row(name, *figures)
    return table
