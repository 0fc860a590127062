"""Keep what launches wrote, so that the same code is not executed again from the same memory."""

from __future__ import annotations

import ast
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .executor import Executable
from .memory import bytes_of

ROOM = Path(__file__).parent
# what says how code is executed, beside the code
EXECUTOR = (
    "arithmetic", "asynchronous", "executor", "formats", "instructions", "machine", "matrix", "mbarriers", "memory",
    "ptx", "races", "registers", "tensor", "tiles",
)  # fmt: skip


class Kept:
    """A folder with a file for each launch that was executed without a fault: what it wrote, and the seconds it took.

    A file's name is a hash of the instructions, the arguments, the memory behind them, and the executor's own code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def place(self, launch: Executable) -> Path:
        """Return where a launch is kept."""
        seen = hashlib.blake2b(f"{executor()} {launch.program.digest} {launch.programs} {launch.shared}".encode())
        storages = [x.untyped_storage().data_ptr() for x in launch.arguments if isinstance(x, Tensor)]
        seen.update(repr([storages.index(x) for x in storages]).encode())  # which tensors share one
        for x in (*launch.arguments, "outputs", *launch.outputs):
            if isinstance(x, Tensor):
                seen.update(repr((x.shape, x.stride(), x.dtype, x.storage_offset())).encode())
                seen.update(bytes_of(x).data)
            else:
                seen.update(repr(x).encode())
        return self.folder / f"{seen.hexdigest()[:32]}.npz"

    def take(self, place: Path, launch: Executable) -> float | None:
        """Write what a launch wrote into its tensors again, and return the seconds; None: it is not kept."""
        if not place.exists():
            return None
        with np.load(place) as made:
            for i, storage in enumerate(_storages(launch)):
                if (name := str(i)) in made:
                    storage[:] = made[name]
            return float(made["seconds"])

    def add(self, place: Path, launch: Executable, before: list[np.ndarray], seconds: float) -> None:
        """Keep a launch; before: copies of its storages, as `copies` made them."""
        now = enumerate(zip(_storages(launch), before, strict=True))
        changed: dict[str, Any] = {str(i): new for i, (new, old) in now if not np.array_equal(new, old)}
        cut = place.with_suffix(f".{os.getpid()}.npz")
        np.savez(cut, **changed, seconds=np.array(seconds))
        cut.replace(place)


def copies(launch: Executable) -> list[np.ndarray]:
    """Return copies of the storages of a launch's tensors."""
    return [storage.copy() for storage in _storages(launch)]


def _storages(launch: Executable) -> list[np.ndarray]:
    """Return the bytes of the storages of a launch's tensors, each once."""
    tensors = [x for x in launch.arguments if isinstance(x, Tensor)]
    return [bytes_of(x) for x in {x.untyped_storage().data_ptr(): x for x in tensors}.values()]


@cache
def executor(*more: str) -> str:
    """Return a hash of the executor's code, and of `more` modules', without comments; and of what it computes with."""
    trees = [ast.parse((ROOM / f"{name}.py").read_text(encoding="utf-8")) for name in (*EXECUTOR, *more)]
    for node in (node for tree in trees for node in ast.walk(tree)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    text = " ".join([np.__version__, str(torch.__version__), *map(ast.dump, trees)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
