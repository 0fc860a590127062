"""The source distribution holds the tests, what they read, and the packages that they import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
# none of these is in git
IGNORED = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info", "segattn-demo", "checkpoint.pt", "model")


def run(*arguments: str, folder: Path, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_an_unpacked_source_distribution_collects_every_test(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="needs segattn[test]")
    tree = shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=IGNORED)
    files = [path.relative_to(tree) for path in tree.rglob("*") if path.is_file()]
    assert len(files) > 200
    run("-c", BUILD, str(tmp_path), folder=tree)
    (archive,) = tmp_path.glob("segattn-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert [str(path) for path in files if not (unpacked / path).is_file()] == []
    found = run("-m", "pytest", "--collect-only", "-q", folder=unpacked, PYTHONPATH=str(unpacked / "src"))
    tests = {path.relative_to(tree).as_posix() for path in tree.glob("tests/**/test_*.py")}
    assert tests <= {line.partition("::")[0] for line in found.splitlines()}
