"""Tests of the build for Hugging Face's kernels hub: as its package loads it, alone and in plain models."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import models
from calls import error
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import hub_kernels
from transformers.masking_utils import flash_attention_mask

import segattn
from kernels import get_local_kernel
from segattn.kernels.model_attention import model_attention

ROOT = Path(__file__).resolve().parents[2]
L = 16
# a name that no build has
NAME = "segattn_of_the_hub"
PLAIN = ("llama", "qwen3", "gpt2", "opt", "phi3", "gpt_oss")


def builder() -> Any:
    spec = spec_from_file_location("hub_build", ROOT / "ci" / "hub_kernel" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    command = [str(ROOT / "ci" / "hub"), "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Any:
    return get_local_kernel(folder, backend="cpu")


@pytest.fixture
def by_name(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The build's attention under a name of its own, as transformers registers it."""
    AttentionInterface.register(NAME, kernel.model_attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return NAME


def inputs(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3 * L + 5, 16), (2, 2, 3 * L + 5, 16), (2, 2, 3 * L + 5, 16), (4,)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def results(operation: Any, update: str, backend: str, device: torch.device) -> list[Tensor]:
    q, k, v, gate = inputs(device)
    out, state = operation(q, k, v, segment_len=L, gate=gate, update=update, backend=backend)
    (out.square().sum() + state.memory.sum()).backward()
    return [out, *state, *(x.grad for x in (q, k, v, gate))]


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_build_computes_what_the_package_does(kernel: Any, backend: str, device: torch.device) -> None:
    for update in ("delta", "linear"):
        theirs = results(segattn.segment_attention, update, backend, device)
        for mine, other in zip(results(kernel.segment_attention, update, backend, device), theirs, strict=True):
            assert torch.equal(mine, other)


def test_a_build_stands_beside_the_package(folder: Path, kernel: Any) -> None:
    identity = json.loads((folder / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
    assert kernel.segment_attention.__module__ == f"{identity}.attention"
    assert kernel.MemoryState is not segattn.MemoryState
    with torch.profiler.profile() as profile:
        results(kernel.segment_attention, "delta", "torch", torch.device("cpu"))
    called = {event.key.partition("::")[0] for event in profile.key_averages()}
    assert identity in called
    assert "segattn" not in called


def test_variants_hold_one_source_and_import_nothing_of_their_own_by_name(folder: Path) -> None:
    texts = {}
    for backend in ("cpu", "cuda", "rocm"):
        variant = folder / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert re.fullmatch(r"_segattn_\w+_[0-9a-f]{12}", metadata["id"])
        files = {path.relative_to(variant): path.read_text() for path in variant.rglob("*.py")}
        texts[backend] = {path: text.replace(metadata["id"], "id") for path, text in files.items()}
        assert not any(re.search(r"segattn::|ops\.segattn\b", text) for text in files.values())
        for text in files.values():
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
            assert not any((node.module or "").startswith(("segattn", "kernels")) for node in nodes if not node.level)
    assert texts["cpu"] == texts["cuda"] == texts["rocm"]
    assert len(texts["cpu"]) > 15


def test_the_same_source_makes_the_same_build(folder: Path, tmp_path: Path) -> None:
    again = builder().build(tmp_path)
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.read_text() == (again / path.relative_to(folder)).read_text()


def test_a_kernel_that_needs_another_package_is_not_built(tmp_path: Path) -> None:
    entry = tmp_path / "hub.py"
    entry.write_text("from .other import x\n")
    (tmp_path / "other.py").write_text("import json\nimport numpy.linalg\n")
    with pytest.raises(ValueError, match=r"may import PyTorch, Triton and itself, got numpy in .*other\.py"):
        builder().reached(entry)


def test_a_build_is_checked_by_the_package_that_loads_it(folder: Path, tmp_path: Path) -> None:
    said = builder().check(folder).splitlines()
    assert re.fullmatch(r"_segattn_\w+_[0-9a-f]{12}", said[0])
    assert said[1].startswith("backend ")
    # a package of that name which loads nothing from a folder
    old = tmp_path / "kernels"
    old.mkdir()
    (old / "__init__.py").write_text("")
    (tmp_path / "kernels-0.1.dist-info").mkdir()
    (tmp_path / "kernels-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n")
    script = str(ROOT / "ci" / "hub_kernel" / "build.py")
    command = [sys.executable, script, "--check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "ci/hub --check: kernels must be a version with get_local_kernel, got 0.1: pip install 'kernels>=0.17'"
    )


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_model_computes_by_name_what_it_did(name: str, by_name: str) -> None:
    """Logits of padded texts, and every parameter's gradient."""
    found = []
    for implementation in (None, by_name):
        model = models.double(models.make(name))
        if implementation:
            model.set_attn_implementation(implementation)
        ids, mask = models.tokens(3, 37), torch.ones(3, 37).long()
        mask[0, :9], mask[1, 30:] = 0, 0
        logits = model(ids, attention_mask=mask).logits.masked_fill(mask[..., None] == 0, 0)
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    assert all(error(mine, theirs) < 1e-10 for theirs, mine in zip(*found, strict=True))


def test_a_soft_cap_is_the_models_own(by_name: str) -> None:
    model, ids = models.make("gemma2").double(), models.tokens(2, 37)
    own = model(ids).logits
    model.set_attn_implementation(by_name)
    # its own attention, which is eager, takes the softmax in float32
    assert error(model(ids).logits, own) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_plain_model_generates_by_name_what_it_did(name: str, by_name: str) -> None:
    model, ids, mask = models.make(name).double(), models.tokens(2, 9), torch.ones(2, 9).long()
    mask[1, :4] = 0
    for options in ({}, {"attention_mask": mask}, {"num_beams": 3}):
        model.set_attn_implementation("sdpa")
        before = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
        model.set_attn_implementation(by_name)
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **options), before)


def test_segments_are_those_of_the_configuration(by_name: str) -> None:
    model, ids = models.make().double(), models.tokens(2, 3 * L + 5)
    segment = torch.arange(3 * L + 5) // L
    visible = (segment[:, None] == segment) & torch.ones(len(segment), len(segment)).tril().bool()
    theirs = model(ids, attention_mask=visible.expand(2, 1, -1, -1))
    model.set_attn_implementation(by_name)
    model.config.segment_len = L
    assert error(model(ids).logits, theirs.logits) < 1e-10
    model.config.segment_len = 0
    with pytest.raises(ValueError, match=r"config\.segment_len must be at least 1, got 0"):
        model(ids)


def test_packed_texts_are_apart(by_name: str) -> None:
    model = models.make().double()
    model.set_attn_implementation(by_name)
    ids, offsets = models.tokens(1, 30), torch.tensor([0, 11, 30], dtype=torch.int32)
    positions = torch.cat((torch.arange(11), torch.arange(19)))[None]
    packed = model(ids, position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, use_cache=False).logits
    assert error(packed[:, 11:], model(ids[:, 11:]).logits) < 1e-10
    with pytest.raises(ValueError, match="position_ids must end with 29, the last key's, got 18: pass cu_seq_lens_q"):
        model(ids, position_ids=positions, use_cache=False)


def test_transformers_loads_a_build_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the download, since there is no network, and the check of versions."""
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *a, **k: get_local_kernel(folder, backend="cpu"))
    model, ids, mask = models.make().double(), models.tokens(2, 20), torch.ones(2, 20).long()
    mask[1, :7] = 0
    own, new = model(ids).logits, model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    model.set_attn_implementation("segattn/segattn", allow_all_kernels=True)
    assert model.config._attn_implementation == "segattn/segattn"
    assert error(model(ids).logits, own) < 1e-10
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False), new)
    packed = torch.cat((torch.arange(11), torch.arange(9)))[None]
    with pytest.raises(ValueError, match=r"attention_mask must hide padding .* alone: pass cu_seq_lens_q with packed"):
        model(ids[:1], position_ids=packed, use_cache=False)


def test_what_attention_cannot_honour_is_refused(by_name: str) -> None:
    model, ids = models.make(), models.tokens(2, 12)
    model.set_attn_implementation(by_name)
    mask = torch.ones(2, 12).long()
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="attention_mask must hide padding before and after a row's tokens"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"position_ids must end with \d+, the last key's, got 11: .* a DynamicCache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=4)
    q, k, v, gate = inputs(torch.device("cpu"))
    module = model.model.layers[0].self_attn
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": torch.ones(2, 4)}, r"must be None, .* = \[2, 53\] or bool .*, got torch.float32 \[2, 4\]"),
        ({"attention_mask": torch.ones(2, 1, 53, 53)}, r"= \[2, 1, 53, 53\], got torch.float32 \[2, 1, 53, 53\]"),
        ({"dropout": 0.1}, "attention dropout must be 0 in training, got 0.1"),
        ({"sliding_window": 20}, "sliding_window must be at least a segment, 53 tokens, got 20"),
        ({"position_bias": gate}, "for a model whose LlamaAttention passes position_bias to its attention"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            model_attention(module, q, k, v, **{"attention_mask": None, **options})


def test_the_card_runs_and_has_the_results(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("LOCAL_KERNELS", f"segattn/segattn={folder}")
    card = (folder / "README.md").read_text()
    assert not re.search(r"^\{|<!--", card, re.MULTILINE)
    front = (ROOT / "README.md").read_text()
    for heading in ("Results", "Limits"):
        assert re.search(rf"^## {heading}\n(.*?)(?=^## )", front, re.DOTALL | re.MULTILINE)
        assert builder().section(front, heading) in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(compile(code, "the card", "exec"), {"__name__": "__main__"})
        said = code.strip().splitlines()[-1].partition("#")[2]
        assert re.findall(r"\[[\d, ]+\]", capsys.readouterr().out) == re.findall(r"\[[\d, ]+\]", said)
