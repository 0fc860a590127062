"""Write a build of the kernels in the layout that Hugging Face's `kernels` package loads, and its card."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "kernels"
ENTRY = ROOM / "hub.py"
# of the build: a number that rises where a new one breaks its callers
VERSION = 1
# devices whose builds hold the same files, under operations of different names
BACKENDS = ("cpu", "cuda", "rocm")
# what a kernel may import beside the standard library and itself
PACKAGES = {"torch", "triton"}
# the operations' namespace, which must be of one build alone
NAMESPACE = re.compile(r'\bsegattn(?=::|\.MemoryState)|(?<=torch\.ops\.)segattn\b|(?<=NAMESPACE = ")segattn\b')


def reached(entry: Path) -> list[Path]:
    """Return the files that a module imports, and itself.

    Raises:
        ValueError: one of them imports what a kernel may not.
    """
    found: set[Path] = set()
    waiting = [entry]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(path)
    return sorted(found)


def imported(path: Path) -> list[Path]:
    """Return the files that one imports by a relative name."""
    files = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            packages = {(node.module or "").split(".")[0]}
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            files += [folder.joinpath(*name.split(".")).with_suffix(".py") for name in names]
            continue
        else:
            continue
        if others := packages - PACKAGES - sys.stdlib_module_names:
            raise ValueError(f"a kernel may import PyTorch, Triton and itself, got {', '.join(others)} in {path}")
    return files


def build(out: Path) -> Path:
    """Write the card and a variant for each backend into a folder, which must not hold another build."""
    shutil.rmtree(out / "build", ignore_errors=True)
    files = reached(ENTRY)
    sources = {path.relative_to(ROOM): path.read_text(encoding="utf-8") for path in files}
    digest = hashlib.sha256("".join(f"{path}\n{text}" for path, text in sources.items()).encode()).hexdigest()
    for backend in BACKENDS:
        identity = f"_segattn_{backend}_{digest[:12]}"
        folder = out / "build" / f"torch-{backend}"
        for path, text in sources.items():
            name = "__init__.py" if ROOM / path == ENTRY else path
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(NAMESPACE.sub(identity, text), encoding="utf-8")
        (folder / "metadata.json").write_text(json.dumps(metadata(identity, backend), indent=2) + "\n")
    (out / "README.md").write_text(card(), encoding="utf-8")
    return out


def metadata(identity: str, backend: str) -> dict[str, object]:
    """Return what a loader reads of a variant before it imports it."""
    return {
        "id": identity,
        "name": "segattn",
        "version": VERSION,
        "license": "apache-2.0",
        "upstream": "https://github.com/segattn/segattn",
        "python-depends": [],
        "backend": {"type": backend},
    }


def card() -> str:
    """Return the card, with what README.md says of results and limits."""
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    text = Path(__file__).with_name("CARD.md").read_text(encoding="utf-8")
    for heading in ("Results", "Limits"):
        text = text.replace(f"{{{heading}}}", section(front, heading))
    status = re.search(r"^\*\*Status:\*\* .*$", front, re.MULTILINE)
    return text.replace("{Status}", status[0] if status else "")


def section(text: str, heading: str) -> str:
    """Return the text beneath a heading of the second level."""
    _, _, rest = text.partition(f"\n## {heading}\n")
    return re.sub(r"<!--.*?-->\n*", "", rest.partition("\n## ")[0]).strip()


def check(folder: Path) -> str:
    """Load a build as its users do, run it once, and return what runs here.

    Raises:
        SystemExit: `kernels` is missing, or too old to load a folder.
    """
    try:
        from kernels import get_local_kernel
    except ImportError as error:
        found = importlib.metadata.version("kernels") if find_spec("kernels") else "none"
        raise SystemExit(
            f"ci/hub --check: kernels must be a version with get_local_kernel, got {found}: pip install 'kernels>=0.17'"
        ) from error
    import torch

    segattn = get_local_kernel(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, gate = torch.randn(1, 2, 100, 16, device=device), torch.zeros(2, device=device)
    out, state = segattn.segment_attention(q, q, q, segment_len=32, gate=gate)
    if not (out.isfinite().all() and state.memory.any()):
        raise SystemExit("ci/hub --check: the build does not compute what it should: run segattn check")
    return f"{segattn.__name__}\n{segattn.show_config()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub", help="default: build/hub in the checkout")
    parser.add_argument("--check", action="store_true", help="load the build by Hugging Face's kernels, and run it")
    options = parser.parse_args()
    print(build(options.out))  # noqa: T201
    if options.check:
        print(check(options.out))  # noqa: T201
