"""Tests of writing a memory to disk and reading it back, and of what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import models
from safetensors.torch import load_file, load_model, save_file

from segattn.rmt.associative.memory import AssociativeMemory
from segattn.rmt.recurrent.memory import RecurrentMemory
from segattn.rmt.saving import load_memory, own_parameters, read_settings, save_memory
from segattn.runs.checkpoint import save_weights

WRITERS = (save_memory, save_weights)


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


@pytest.mark.parametrize(
    "wrap", [torch.compile, torch.nn.DataParallel, lambda x: torch.nn.DataParallel(torch.compile(x))]
)
def test_what_was_wrapped_is_written(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    path, module, other = tmp_path / "memory.safetensors", made(), made()
    with torch.no_grad():
        module.memory.add_(1)
    save_memory(wrap(module), path)
    assert read_settings(path)["class"] == "RecurrentMemory"
    load_memory(wrap(other), path)
    assert torch.equal(other.memory, module.memory)


@pytest.mark.parametrize("kind", [RecurrentMemory, AssociativeMemory])
def test_offloaded_weights_are_refused_by_name(kind: type[Any], tmp_path: Path) -> None:
    """accelerate brings them for the call of the module that has them, and a memory reads some without one."""
    accelerate, cpu = pytest.importorskip("accelerate"), torch.device("cpu")
    path, ids, plain = tmp_path / "memory.safetensors", models.tokens(1, 20), kind(models.make(), 2, 7).eval()
    save_memory(plain, path)
    model = models.make()
    accelerate.cpu_offload(model, execution_device=cpu)
    said = r"must have its weights, got a \w+ that accelerate offloads: call .*accelerate\.cpu_offload\(memory\.model\)"
    with pytest.raises(ValueError, match=f"model {said}"):
        kind(model, 2, 7)
    memory = kind(models.make(), 2, 7)
    accelerate.cpu_offload(memory, execution_device=cpu)
    before = path.read_bytes()
    for call in (
        lambda: memory.initial_state(1),
        lambda: memory.generate(ids, max_new_tokens=2),
        lambda: save_memory(memory, path),
        lambda: load_memory(memory, path),
    ):
        with pytest.raises(ValueError, match=f"memory {said}"):
            call()
    assert path.read_bytes() == before
    # as the error says
    accelerate.hooks.remove_hook_from_submodules(memory)
    load_memory(memory, path)
    memory.eval().model.requires_grad_(False)
    expected = memory(ids).logits, memory.generate(ids, max_new_tokens=2)
    accelerate.cpu_offload(memory.model, execution_device=cpu)
    assert all(x.is_meta for x in memory.model.parameters())
    assert torch.equal(memory(ids).logits, expected[0])
    assert torch.equal(memory.generate(ids, max_new_tokens=2), expected[1])
    save_memory(memory, path)


def test_layers_side_by_side_cannot_be_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    memory = AssociativeMemory(models.make(), 2, 7, schedule="diagonal")
    accelerate.cpu_offload(memory.model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model must have its weights, .* offloads: pass schedule='vertical'"):
        memory(models.tokens(1, 20))


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
    with pytest.raises(ValueError, match=r"epsilon must be that of the memory in .*, 0.0, got 1e-05"):
        load_memory(AssociativeMemory(models.make(), 3, 7, d_mem=4, epsilon=1e-5), path)
    # a file that is older than the setting
    entry = {name: value for name, value in read_settings(path).items() if name != "epsilon"}
    save_file(load_file(path), path, metadata={"segattn": json.dumps(entry)})
    load_memory(other, path)


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


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_are_readable_as_the_umask_says(
    write: Callable[[Any, Path], None], umask: int, mode: int, tmp_path: Path
) -> None:
    path = tmp_path / "memory.safetensors"
    before = os.umask(umask)
    try:
        write(made(), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_replaced_once_the_new_one_is_whole(
    write: Callable[[Any, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, module = tmp_path / "memory.safetensors", made()
    write(module, path)
    kept = path.read_bytes()

    def cut_short(tensors: Any, file: Any, **options: Any) -> None:
        Path(file).write_bytes(kept[:20])
        raise KeyboardInterrupt

    with torch.no_grad():
        module.memory.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr("segattn.rmt.saving.save_file", cut_short)
        patch.setattr("safetensors.torch.save_file", cut_short)
        with pytest.raises(KeyboardInterrupt):
            write(module, path)
    assert path.read_bytes() == kept
    assert os.listdir(tmp_path) == [path.name]
    write(module, path)
    assert torch.equal(load_file(path)["memory"], module.memory)


def test_weights_come_back_with_those_that_are_shared(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    module, other = (RecurrentMemory(models.make(tie_word_embeddings=True), 3, 7) for _ in range(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_weights(module, path)
    load_model(other, path)
    ids = models.tokens(1, 20)
    assert torch.equal(module(ids).logits, other(ids).logits)
