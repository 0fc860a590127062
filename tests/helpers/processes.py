"""Run Python in a process of its own, and keep what it prints."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python with the arguments; options are those of `subprocess.run`, such as `cwd` and `env`."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
