"""The tree's promises: arrows one way, one place for Triton, no name taken from others, a configuration to show."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch

import segattn

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "infini", "rmt", "bench")
ALLOWED = {"kernels": {"kernels"}, "infini": {"kernels", "infini"}, "rmt": {"kernels", "rmt"}, "bench": set(ROOMS)}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, relative ones resolved to `segattn.…`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = ["segattn", *path.relative_to(ROOT).parts[:-1]]
            base = [] if node.level == 0 else inside[: len(inside) + 1 - node.level]
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def test_arrows_go_one_way() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 10
    for path in files:
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("segattn.") and name.count(".") >= 1}
        assert rooms & set(ROOMS) <= ALLOWED[path.relative_to(ROOT).parts[0]], path


def test_triton_is_imported_in_kernels_alone() -> None:
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        if path.relative_to(ROOT).parts[0] != "kernels":
            assert not any(name.split(".")[0] == "triton" for name in imports(path)), path


def test_the_reference_stands_alone() -> None:
    own = {name for name in imports(ROOT / "kernels" / "reference.py") if name.startswith("segattn")}
    assert {name.split(".")[2] for name in own if name.count(".") >= 2} == {"state"}


def test_every_room_is_in_the_wheel() -> None:
    # Python 3.10 has no reader of its own
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    packages = re.findall(r'"([\w.]+)"', listed[1]) if listed else []
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert set(packages) == {"segattn", *(".".join(["segattn", *folder.parts]) for folder in folders)}


def test_no_name_is_taken_from_others(tmp_path: Path) -> None:
    """Folders at the top of the tree must not answer to `import kernels`, which belongs to another package."""
    code = "import importlib.util, sys; s = importlib.util.find_spec('kernels'); print(s.origin if s else None)"
    for folder in (tmp_path, ROOT):
        origin = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        assert not origin.startswith(str(ROOT))
    assert not any((ROOT / room / "__init__.py").exists() for room in ROOMS)
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not spec.origin.startswith(str(ROOT))


def test_public_names() -> None:
    assert sorted(segattn.__all__) == segattn.__all__
    for name in segattn.__all__:
        assert getattr(segattn, name).__doc__
    assert (Path(segattn.__file__).parent / "py.typed").exists()


def test_importing_stays_light() -> None:
    """Neither what draws nor what talks to a terminal is loaded by `import segattn`."""
    heavy = ("matplotlib", "rich", "typer", "pytest")
    code = f"import sys, segattn; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_show_config_says_what_would_run_and_why() -> None:
    config = segattn.show_config("cpu")
    assert (config.backend, config.reason) == ("torch", "the default on cpu")
    text = str(config)
    for expected in (torch.__version__, segattn.__version__, "torch (the default on cpu)"):
        assert expected in text
    assert repr(config) == text
    assert segattn.show_config().device.startswith("cuda" if torch.cuda.is_available() else ("cpu", "mps"))


def test_changelog_knows_the_version() -> None:
    assert re.search(rf"^## {re.escape(segattn.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
