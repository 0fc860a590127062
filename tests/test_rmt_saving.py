"""A memory written to disk and read back, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import models  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from segattn.rmt.associative_memory import AssociativeMemory  # noqa: E402
from segattn.rmt.recurrent_memory import RecurrentMemory  # noqa: E402
from segattn.rmt.saving import load_memory, own_parameters, read_settings, save_memory  # noqa: E402


def made(**options: Any) -> RecurrentMemory:
    return RecurrentMemory(models.make(), **{"num_memory_tokens": 3, "segment_len": 7, **options})


def test_a_memory_comes_back_as_it_was(tmp_path: Path) -> None:
    path, ids = tmp_path / "memory.safetensors", models.tokens(1, 20)
    module, other = made(head=torch.nn.Linear(32, 5)), made(head=torch.nn.Linear(32, 5), bptt=2, loss="last")
    # the same seed makes them equal
    with torch.no_grad():
        for parameter in own_parameters(module).values():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(module.memory, other.memory)
    save_memory(module, path)
    load_memory(other, path)
    assert torch.equal(module(ids).logits, other(ids).logits)
    assert sorted(own_parameters(module)) == ["head.bias", "head.weight", "memory"]
    assert read_settings(path)["num_memory_tokens"] == 3
    assert read_settings(path)["mask"] == "paper"


def test_an_associative_memory_comes_back_as_it_was(tmp_path: Path) -> None:
    path, ids = tmp_path / "memory.safetensors", models.tokens(1, 20)
    module, other = (AssociativeMemory(models.make(), 3, 7, d_mem=4, schedule=x) for x in ("vertical", "diagonal"))
    with torch.no_grad():
        for parameter in own_parameters(module).values():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.allclose(module(ids).logits, other(ids).logits)
    save_memory(module, path)
    load_memory(other, path)
    torch.testing.assert_close(module(ids).logits, other(ids).logits)
    with pytest.raises(ValueError, match=r"d_mem must be that of the memory in .*, 4, got 5"):
        load_memory(AssociativeMemory(models.make(), 3, 7, d_mem=5), path)
    with pytest.raises(
        ValueError, match=r"class must be that of the memory in .*, 'AssociativeMemory', got 'Recurrent"
    ):
        load_memory(made(), path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_memory_tokens": 4}, "num_memory_tokens must be that of the memory in .*, 3, got 4: make the module"),
        ({"mask": "causal"}, "mask must be that of the memory in .*, 'paper', got 'causal'"),
        ({"head": torch.nn.Linear(32, 5)}, r"must hold the parameters .*differs in \['head.bias', 'head.weight'\]"),
    ],
)
def test_a_memory_of_another_kind_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_memory(made(), tmp_path / "memory")
    other = made(**options)
    before = other.memory.detach().clone()
    with pytest.raises(ValueError, match=message):
        load_memory(other, tmp_path / "memory")
    assert torch.equal(other.memory, before)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="path must be a file that save_memory wrote"):
        load_memory(made(), path)
    save_file({"memory": torch.zeros(3, 32)}, path)
    with pytest.raises(ValueError, match="path must be a file that save_memory wrote"):
        load_memory(made(), path)
    save_memory(made(), path)
    wider = RecurrentMemory(models.make(hidden_size=40), 3, 7)
    with pytest.raises(ValueError, match=r"memory must have shape \[3, 40\] as this model's, got \[3, 32\]"):
        load_memory(wider, path)
    with pytest.raises(FileNotFoundError):
        load_memory(made(), tmp_path / "none")
