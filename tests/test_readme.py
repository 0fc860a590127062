"""What the README shows runs, and what it says of sizes is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def sizes(text: str) -> list[str]:
    return [re.sub(r"\s", "", size) for size in re.findall(r"\[[\d, ]+\]", text)]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs_and_prints_what_it_says(number: int) -> None:
    code = BLOCKS[number]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in code.splitlines() if line.startswith("print(")]
    assert len(said) == 1
    assert sizes(done.stdout) == sizes(said[0].split("#")[1])


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 2


def test_links_lead_somewhere() -> None:
    for path in ROOT.rglob("*.md"):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path}: {target}"
