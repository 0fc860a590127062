"""Argument lists stay short enough to follow. `python tests/kernels/test_signatures.py` counts them."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOM = Path(__file__).resolve().parents[2] / "kernels"
MOST_PARAMETERS = 24
MOST_SHARE = 0.14


def is_jitted(node: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def parameters(room: Path = ROOM) -> dict[str, int]:
    """Return how many parameters each function has that Triton compiles."""
    found = [node for path in room.rglob("*.py") for node in functions(ast.parse(path.read_text(encoding="utf-8")))]
    return {node.name: len(node.args.args) for node in found if is_jitted(node)}


def share(room: Path = ROOM) -> float:
    """Return the share of lines with a signature: headers of functions, and calls over several lines.

    A header reaches from `def` to the line before the docstring or the first statement. Calls count where they call a
    function that Triton compiles, or `launch`.
    """
    called = {*parameters(room), "launch"}
    lines = signatures = 0
    for path in room.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        counted = {line for node in functions(tree) for line in range(node.lineno, node.body[0].lineno)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in called:
                last = node.end_lineno or node.lineno
                counted |= set(range(node.lineno, last + 1)) if last > node.lineno else set()
        lines += len(text.splitlines())
        signatures += len(counted)
    return signatures / lines


def test_no_kernel_takes_too_many_arguments() -> None:
    found = parameters()
    assert len(found) > 40
    assert {name: count for name, count in found.items() if count > MOST_PARAMETERS} == {}


def test_signatures_are_a_small_part_of_the_room() -> None:
    assert share() <= MOST_SHARE


if __name__ == "__main__":
    longest = sorted(parameters().items(), key=lambda item: -item[1])[:5]
    counts = ", ".join(f"{name} {count}" for name, count in longest)
    sys.stdout.write(f"most parameters: {counts}\nlines in signatures: {share():.1%}\n")
