"""Tests of memories on several processes: data parallelism is exact, and a pipeline takes the time README.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import recurrent_ranks as ranks
from forks import fork
from models import tokens

README = Path(__file__).resolve().parents[2] / "rmt" / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, dict[str, torch.Tensor]]]:
    for rank in fork(2, ranks.main, folder, folder=folder, timeout=200):
        assert rank.code == 0, rank.said[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("way", ranks.WAYS)
@pytest.mark.parametrize("kind", ranks.KINDS)
def test_a_text_per_rank_gives_the_batchs_gradient(seen, kind, way):
    wanted = ranks.gradients(ranks.memory(kind), tokens(2, ranks.TIME))
    for part in seen:
        found = part[f"{kind} {way}"]
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert (found[name] - grad).abs().max() < 2e-6 * grad.abs().max() + 1e-9, name


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_a_memory_that_is_spread_is_saved_whole_and_loaded_in_parts(seen, folder, kind):
    wanted, other = ranks.own(ranks.memory(kind)), ranks.memory(kind)
    with torch.no_grad():
        for parameter in ranks.own_parameters(other).values():
            parameter.fill_(0.5)
    ranks.load_memory(other, folder / f"{kind}.safetensors")
    for found in (ranks.own(other), *(part[f"{kind} loaded"] for part in seen)):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_a_memory_that_is_spread_generates(seen, kind):
    for rank, part in enumerate(seen):
        wanted = ranks.generated(ranks.memory(kind), tokens(2, ranks.TIME)[rank : rank + 1])
        assert torch.equal(part[f"{kind} generated"]["tokens"], wanted["tokens"])


def busy(texts: int, size: int) -> float:
    """Return the share of the time that a rank of a pipeline works, each of a text's parts as early as possible."""
    ends = dict.fromkeys(((text, -1) for text in range(texts)), 0)
    for text in range(texts):
        for rank in range(size):
            ends[text, rank] = 1 + max(ends[text, rank - 1], ends.get((text - 1, rank), 0))
    return texts / max(ends.values())


def test_the_table_of_pipelines_is_what_a_schedule_comes_to():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) % \| (\d+) % \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 4
    for texts, size, pipeline, parallel in (map(int, row) for row in rows):
        assert busy(texts, size) == pytest.approx(texts / (texts + size - 1))
        assert pipeline == round(100 * busy(texts, size))
        assert parallel == round(100 * texts / (size * -(-texts // size)))
