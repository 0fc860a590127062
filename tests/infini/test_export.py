"""Tests of `torch.export` of a converted model: one program for texts of many lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

pytest.importorskip("transformers")

import models

import segattn

L = 16


fixed = pytest.mark.skipif(models.VERSION <= (5, 0), reason="older transformers exports one length alone")


def model_of(backend: str, device: torch.device, name: str = "llama") -> Any:
    # a width of heads that the kernels take
    model = models.make(name, hidden_size=64).to(device)
    segattn.convert(model, L, quiet=True, backend=backend)
    models.open_gates(model)
    return model


def exported(model: Any, time: int, dim: Any, device: torch.device) -> Any:
    shapes = {"input_ids": {1: dim}, "use_cache": None}
    inputs = {"input_ids": models.tokens(1, time).to(device), "use_cache": False}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes)


def assert_serves(program: Any, model: Any, lengths: tuple[int, ...], device: torch.device) -> None:
    for time in lengths:
        ids = models.tokens(1, time, seed=time).to(device)
        assert torch.equal(program(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@fixed
def test_a_program_of_the_kernels_serves_every_length_beyond_a_segment(device: torch.device) -> None:
    pytest.importorskip("triton")
    model = model_of("triton", device)
    program = exported(model, 2 * L + 3, Dim("time", min=L + 1, max=4096), device)
    assert_serves(program.module(), model, (L + 1, 2 * L, 2 * L + 3, 3 * L + 5), device)


@fixed
def test_a_program_of_the_torch_backend_serves_whole_segments(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    model = model_of("torch", cpu)
    program = exported(model, 5 * L, L * Dim("segments", min=2, max=256), cpu)
    assert_serves(program.module(), model, (2 * L, 5 * L, 11 * L), cpu)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    assert_serves(again, model, (2 * L, 7 * L), cpu)
    # a text that ends within a segment, padded on its right
    ids = models.tokens(1, 3 * L)
    mine = again(input_ids=ids, use_cache=False).logits[:, : 2 * L + 5]
    torch.testing.assert_close(mine, model(ids[:, : 2 * L + 5]).logits, rtol=1e-4, atol=1e-4)
