"""Build the API reference by pdoc, from the docstrings of the public names, into the git-ignored `build/reference`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import segattn

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "build" / "reference"


def build(folder: Path) -> Path:
    """Write the pages into a folder, which is made where there is none, and return the first one's path."""
    # pdoc reads a module's dictionary, in which names that need transformers stand only once they have been loaded
    vars(segattn).update({name: getattr(segattn, name) for name in segattn.__all__})
    # it reads a named tuple's types in the module of `NamedTuple`, and then shows them as they are written
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    footer = f"segattn {segattn.__version__}"
    pdoc.render.configure(docformat="google", footer_text=footer, template_directory=HERE / "template")
    pdoc.pdoc("segattn", output_directory=folder)
    return folder / "segattn.html"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: build/reference in the checkout")
    print(build(parser.parse_args().out))  # noqa: T201
