"""The tree's promises: arrows one way, one place for Triton, no name taken from others, a configuration to show."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import segattn

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "infini", "rmt", "bench")
# room → rooms that it may import, itself among them
ALLOWED = {
    "runs": {"runs"},
    "kernels": {"kernels"},
    "infini": {"kernels", "runs", "infini"},
    "rmt": {"kernels", "runs", "rmt"},
    "bench": {"kernels", "runs", "infini", "rmt", "bench"},
    "cli": {"kernels", "runs", "infini", "rmt", "bench", "cli"},
}


def modules() -> dict[str, Path]:
    """Every module of the package, by its name."""
    links = {room: ROOT / room for room in LINKED}
    folders = links | {room: ROOT / "src" / "segattn" / room for room in ("runs", "cli")}
    return {
        ".".join(("segattn", room, *path.relative_to(folder).with_suffix("").parts)): path
        for room, folder in folders.items()
        for path in folder.rglob("*.py")
    }


def imports(path: Path, module: str) -> set[str]:
    """Modules that a file imports, relative ones resolved to `segattn.…`; functions count as modules of a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names} | {name}
    return found


def test_arrows_go_one_way() -> None:
    assert len(modules()) > 100
    for module, path in modules().items():
        room = module.split(".")[1]
        rooms = {name.split(".")[1] for name in imports(path, module) if name.startswith("segattn.")}
        assert rooms & ALLOWED.keys() <= ALLOWED[room], module


def test_backends_do_not_import_each_other() -> None:
    for module, path in modules().items():
        for one, other in (("triton", "torch"), ("torch", "triton")):
            if module.startswith(f"segattn.kernels.{one}."):
                assert not any(name.startswith(f"segattn.kernels.{other}") for name in imports(path, module)), module


def test_modules_do_not_import_in_circles() -> None:
    graph = {module: imports(path, module) & modules().keys() for module, path in modules().items()}
    while leaves := {module for module, targets in graph.items() if not targets}:
        graph = {module: targets - leaves for module, targets in graph.items() if module not in leaves}
    assert not graph


def test_triton_is_imported_in_two_rooms() -> None:
    for module, path in modules().items():
        if not module.startswith(("segattn.kernels.triton.", "segattn.bench.compiled.")):
            assert not any(name.split(".")[0] == "triton" for name in imports(path, module)), module


def test_the_reference_stands_alone() -> None:
    imported = imports(ROOT / "kernels" / "reference.py", "segattn.kernels.reference")
    own = {name for name in imported if name.startswith("segattn")}
    assert {name.split(".")[2] for name in own if name.count(".") >= 2} == {"state"}


def test_every_room_is_in_the_wheel() -> None:
    # Python 3.10 has no reader of its own
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    packages = re.findall(r'"([\w.]+)"', listed[1]) if listed else []
    assert set(packages) == {"segattn", *(module.rpartition(".")[0] for module in modules())}


def test_no_name_is_taken_from_others(tmp_path: Path) -> None:
    """Folders at the top of the tree must not answer to `import kernels`, which belongs to another package."""
    code = "import importlib.util, sys; s = importlib.util.find_spec('kernels'); print(s.origin if s else None)"
    for folder in (tmp_path, ROOT):
        origin = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        assert not origin.startswith(str(ROOT)) or "site-packages" in origin
    assert not any((ROOT / room / "__init__.py").exists() for room in LINKED)
    spec = importlib.util.find_spec("kernels")
    origin = str(spec.origin if spec else None)
    assert not origin.startswith(str(ROOT)) or "site-packages" in origin


def test_a_checkout_without_symbolic_links_says_how_to_mend_it(tmp_path: Path) -> None:
    """Where git may not make links, it writes files that hold their targets."""
    package = tmp_path / "segattn"
    shutil.copytree(ROOT / "src" / "segattn", package, ignore=shutil.ignore_patterns(*LINKED))
    for room in LINKED:
        (package / room).write_text(f"../../{room}")
    code = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import segattn", str(tmp_path)]
    said = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False).stderr
    assert "ImportError: src/segattn/kernels must be a symbolic link to the folder kernels, got a file" in said
    assert "git config core.symlinks true; git checkout -- src/segattn" in said


def test_public_names() -> None:
    assert sorted(segattn.__all__) == segattn.__all__
    for name in segattn.__all__:
        assert getattr(segattn, name).__doc__
    assert (Path(segattn.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("segattn", ("torch", "numpy", "matplotlib", "rich", "typer", "pytest")),
        ("segattn.segment_attention", ("transformers", "matplotlib", "rich", "typer", "pytest")),
        ("segattn.cli.main", ("torch", "numpy", "transformers", "matplotlib")),
    ],
)
def test_importing_stays_light(module: str, heavy: tuple[str, ...]) -> None:
    """`import segattn` loads no library, an operation none that draws, and the command line's help not even PyTorch."""
    code = f"import pkgutil, sys; pkgutil.resolve_name('{module}'); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_show_config_says_what_would_run_and_why() -> None:
    config = segattn.show_config("cpu")
    assert (config.backend, config.reason) == ("torch", "the default on cpu")
    text = str(config)
    for expected in (torch.__version__, segattn.__version__, "torch (the default on cpu)"):
        assert expected in text
    assert repr(config) == text
    absent = segattn.show_config("mps" if torch.cuda.is_available() else "cuda")
    assert "is not available here" in absent.reason
    with pytest.raises(ValueError, match=r"device must be a torch\.device or its name, .* got 'foo'"):
        segattn.show_config("foo")
    with pytest.raises(TypeError, match=r"device must be a torch\.device, its name or None, got int"):
        segattn.show_config(0)  # type: ignore[arg-type]
    assert segattn.show_config().device.startswith("cuda" if torch.cuda.is_available() else ("cpu", "mps"))


def test_changelog_knows_the_version() -> None:
    assert re.search(rf"^## {re.escape(segattn.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
