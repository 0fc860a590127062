"""Tests of `AssociativeMemory` against the paper's formulas, and of its three schedules against each other."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from calls import error
from torch.nn import functional as F

pytest.importorskip("transformers")

import models
from associative_memories import DOUBLE, FAMILIES, SCHEDULED, L, M, as_scheduled, checkpointed, padded, results, wrapped

from segattn.kernels.state import MemoryState
from segattn.rmt.associative.layer import DPFP, AssociativeLayer, Projections, memorize, recall
from segattn.rmt.associative.memory import AssociativeMemory
from segattn.rmt.associative.schedules import SCHEDULES
from segattn.rmt.associative.settings import AssociativeSettings


def plain_features(x: list[float], nu: int, normalize: bool) -> list[float]:
    halves = [max(v, 0.0) for v in x] + [max(-v, 0.0) for v in x]
    features = [halves[i] * halves[i - shift] for shift in range(1, nu + 1) for i in range(len(halves))]
    length = math.sqrt(sum(f * f for f in features)) if normalize else 1.0
    return [f / length for f in features]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("nu", [1, 3])
def test_features_are_the_formula(nu: int, normalize: bool) -> None:
    x = torch.randn(2, 4, 5, dtype=DOUBLE)
    expected = [plain_features(row.tolist(), nu, normalize) for row in x.view(-1, 5)]
    assert error(DPFP(nu, normalize)(x), torch.tensor(expected, dtype=DOUBLE).view(2, 4, -1)) < 1e-15


def plain_read(
    x: torch.Tensor, layer: AssociativeLayer, A: torch.Tensor, z: torch.Tensor, settings: AssociativeSettings
) -> torch.Tensor:
    rows = []
    for row in x:
        q = features_of(layer.query.weight @ row, settings.normalize)
        weight = q @ z
        rows.append(row + q @ A / (weight + settings.epsilon) if weight > 0 else row)
    return torch.stack(rows)


def plain_write(
    u: torch.Tensor, layer: AssociativeLayer, A: torch.Tensor, z: torch.Tensor, settings: AssociativeSettings
) -> Any:
    new_A, new_z, epsilon = A, z, settings.epsilon
    for row in u:
        k = features_of(layer.key.weight @ row, settings.normalize)
        beta = torch.sigmoid(layer.strength.weight @ row + layer.strength.bias)
        known = k @ z
        returned = k @ A / (known + epsilon) if known > 0 else 0.0
        gamma = (1 - (known + epsilon) / (k @ k + epsilon)).clamp(0, 1).detach() if known > 0 else 1.0
        new_A = new_A + beta * torch.outer(k, layer.value.weight @ row - returned)
        new_z = new_z + gamma * k
    return new_A, new_z


def features_of(x: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Return DPFP-3, differentiable."""
    halves = torch.cat((x.clamp(min=0), (-x).clamp(min=0)))
    f = torch.cat([halves * torch.stack([halves[i - j] for i in range(len(halves))]) for j in (1, 2, 3)])
    return f / f.square().sum().sqrt() if normalize else f


def plain_llama(memory: AssociativeMemory, ids: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Return the logits [T, V] of one row and each layer's (A, z), segment after segment through Llama's layers."""
    model = memory.model
    width, keys = model.config.hidden_size, memory.settings.key_width
    states = [(torch.zeros(keys, width, dtype=DOUBLE), torch.zeros(keys, dtype=DOUBLE)) for _ in model.model.layers]
    logits = []
    for start in range(0, len(ids), L):
        tokens = model.model.embed_tokens(ids[start : start + L])
        x = torch.cat((tokens, memory.memory_tokens))
        rotary = model.model.rotary_emb(x[None], torch.arange(len(x))[None])
        unseen = torch.full((len(x), len(x)), -torch.inf, dtype=DOUBLE).triu(1)
        for index, layer in enumerate(model.model.layers):
            own = memory.memories[str(index)]
            x = plain_read(x, own, *states[index], memory.settings)
            x = layer(x[None], attention_mask=unseen[None, None], position_embeddings=rotary)[0]
            states[index] = plain_write(x[len(tokens) :], own, *states[index], memory.settings)
        logits.append(model.lm_head(model.model.norm(x[: len(tokens)])))
    return torch.cat(logits), states


@pytest.mark.parametrize("schedule", ["vertical", "diagonal"])
@pytest.mark.parametrize("normalize", [True, False])
def test_denominators_of_the_authors_code_have_an_epsilon(normalize: bool, schedule: str) -> None:
    """Compare with the formulas where features are as small as the epsilon, and with none, from which it differs."""
    ids, found = models.tokens(1, 3 * L), []
    for epsilon in (1e-5, 0.0):
        memory = wrapped(depth=2, epsilon=epsilon, normalize=normalize, schedule=schedule)
        with torch.no_grad():
            for layer in memory.memories.values():
                for projection in (layer.query, layer.key):
                    projection.weight.mul_(1e-2)
            out = memory(ids)
            logits, states = plain_llama(memory, ids[0])
        assert error(out.logits[0], logits) < 1e-10
        for (A, z), state in zip(states, out.state.memories, strict=True):
            assert error(state.memory[0, 0], A) < 1e-10
            assert error(state.normalizer[0, 0], z) < 1e-10
        found.append(out.logits)
    difference = error(found[0], found[1])
    assert difference < 1e-3 if normalize else difference > 0.1
    with pytest.raises(ValueError, match="epsilon must be a number of at least 0, got -1"):
        wrapped(epsilon=-1)


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
@pytest.mark.parametrize("time", [3 * L, 2 * L + 4, 5])
def test_the_module_is_a_plain_loop_over_llamas_own_layers(time: int, epsilon: float) -> None:
    """Compare logits, loss, state and all gradients, also with a short last segment."""
    memory, ids = wrapped(depth=2, epsilon=epsilon), models.tokens(2, time)
    found = results(memory, ids, labels=ids)
    memory.zero_grad()
    rows = [plain_llama(memory, row) for row in ids]
    logits = torch.stack([row[0] for row in rows])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    last = [torch.stack([row[1][i][j] for row in rows]).unsqueeze(1) for i in range(2) for j in range(2)]
    (loss + sum(x.square().mean() for x in last)).backward()
    expected = {"loss": loss, "logits": logits} | {f"state {i}": x for i, x in enumerate(last)}
    expected |= {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}
    assert {name for name, x in found.items() if x.any()} == {name for name, x in expected.items() if x.any()}
    for name, value in expected.items():
        assert error(found[name], value) < 1e-10, name


def test_a_wrapped_model_begins_as_itself_in_every_segment() -> None:
    model, ids = models.make("llama").double(), models.tokens(2, 2 * L + 3)
    before = {name: id(x) for module in model.modules() for name, x in vars(module).items()}
    out = AssociativeMemory(model, M, L, d_mem=5)(ids).logits
    expected = torch.cat([model(ids[:, start : start + L]).logits for start in range(0, ids.shape[1], L)], 1)
    assert error(out, expected) < 1e-12
    # and the model has not been touched
    assert {name: id(x) for module in model.modules() for name, x in vars(module).items()} == before


def test_a_key_written_again_keeps_its_value_and_a_new_value_replaces_it() -> None:
    layer = AssociativeLayer(6, 4, dtype=DOUBLE)
    torch.nn.init.normal_(layer.value.weight)
    torch.nn.init.constant_(layer.strength.bias, 60.0)
    layer.query.weight.data.copy_(layer.key.weight)
    weights, features = Projections.of([layer]), DPFP()
    row = torch.randn(1, 1, 1, 6, dtype=DOUBLE)
    state = MemoryState.zeros(1, 1, 24, 6, dtype=DOUBLE)
    for _ in range(3):
        state = memorize(row, weights, state, features)
        assert error(recall(row, weights, state, features), layer.value(row)) < 1e-12
    with torch.no_grad():
        layer.value.weight.neg_()
    state = memorize(row, Projections.of([layer]), state, features)
    assert error(recall(row, weights, state, features), layer.value(row)) < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("depth", "segments"), [(1, 1), (1, 4), (4, 1), (3, 5), (5, 3)])
def test_a_schedule_runs_every_cell_once_and_after_what_it_needs(schedule: str, depth: int, segments: int) -> None:
    done: set[tuple[int, int]] = set()
    waves = list(SCHEDULES[schedule](depth, segments))
    for wave in waves:
        for layer, segment in wave:
            assert layer == 0 or (layer - 1, segment) in done
            assert segment == 0 or (layer, segment - 1) in done
        assert done.isdisjoint(wave)
        done.update(wave)
    assert done == {(layer, segment) for layer in range(depth) for segment in range(segments)}
    assert len(waves) == (depth + segments - 1 if schedule == "diagonal" else depth * segments)


@pytest.mark.parametrize("name", [*FAMILIES, "gemma3_text"])
def test_schedules_are_equal_with_all_gradients(name: str) -> None:
    """Read rows of 5, 3 and 1 segments, the last ones short.

    Gemma's layers are of two kinds in turn, one of which has no memory. Results are equal to 1e-12 in float64. In
    float32 they are equal to 2e-6, with all gradients as one vector; each gradient is within 2e-6 of float64's, or
    twice the error of running segment by segment.
    """
    options = {"layers": (0, 1, 2)} if name == "gemma3_text" else {}
    memory = wrapped(name, torch.float32, **options)
    ids, mask = padded((4 * L + 2, 3 * L, 4))

    def by(schedule: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = results(as_scheduled(memory, schedule).to(dtype), ids, mask, ids)
        gradients = [x.flatten() for key, x in found.items() if "." in key]
        return found | {"logits": found["logits"][mask.bool()], "gradients": torch.cat(gradients)}

    exact, expected = by("vertical", DOUBLE), by("vertical", torch.float32)
    # of gradients that are 0 but for rounding, such as those of a key's bias
    least = 1e-6 * float(exact["gradients"].norm())
    for schedule in ("horizontal", "diagonal"):
        found, fine = by(schedule, torch.float32), by(schedule, DOUBLE)
        for key in ("loss", "logits", "gradients"):
            assert error(found[key], expected[key]) < 2e-6, (schedule, key)
        for key, value in exact.items():
            if value.detach().norm() > least:
                assert error(fine[key], value) < 1e-12, (schedule, key)
                gate = max(2e-6, 2 * error(expected[key], value))
                assert error(found[key], value) < gate, (schedule, key)


@pytest.mark.parametrize("name", [name for name in models.TAKEN if name != "bloom"])
def test_a_first_segment_is_the_models_own_and_the_diagonal_equals_the_vertical(name: str) -> None:
    """Read with every type of model: tokens do not see the memory tokens behind them, and an empty memory adds 0."""
    model, ids = models.double(models.make(name)), models.tokens(2, 3 * L + 2)
    found = []
    for schedule in ("vertical", "diagonal"):
        torch.manual_seed(1)
        memory = AssociativeMemory(model, M, L, d_mem=5, schedule=schedule)
        for layer in memory.memories.values():
            torch.nn.init.normal_(layer.value.weight, std=0.2)
        found.append(memory(ids).logits.detach())
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    # Gemma 2 caps its scores in float32
    tolerance = 2e-6 if name == "gemma2" else 1e-12
    assert error(found[0][:, :L], whole[:, :L]) < tolerance
    assert error(found[0][:, L:], whole[:, L:]) > 1e-3
    assert error(found[1], found[0]) < tolerance


def test_the_diagonal_calls_attention_once_for_all_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    attention = F.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(query.shape[0])
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    memory = wrapped(schedule="diagonal")
    memory(models.tokens(2, 4 * L), output_logits=False)
    assert calls == [2 * layers for layers in (1, 2, 3, 3, 2, 1)]


@pytest.mark.parametrize("schedule", SCHEDULED)
def test_gradient_checkpointing_changes_nothing(schedule: str) -> None:
    plain, ids = wrapped(schedule=schedule).train(), models.tokens(1, 3 * L + 2)
    cells, layers, both = (copy.deepcopy(plain) for _ in range(3))
    cells.gradient_checkpointing_enable()
    checkpointed(layers)
    both.gradient_checkpointing_enable()
    checkpointed(both)
    expected = results(plain, ids, labels=ids)
    for memory in (cells, layers, both):
        found = results(memory, ids, labels=ids)
        for name, value in expected.items():
            assert error(found[name], value) < 1e-12, name


@pytest.mark.parametrize("schedule", SCHEDULED)
def test_checkpointed_cells_keep_next_to_nothing_of_their_insides(schedule: str) -> None:
    def kept(checkpoint: bool) -> int:
        memory, sizes = wrapped(schedule=schedule, checkpoint=checkpoint), []

        def note(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            memory(models.tokens(2, 4 * L), output_logits=False)
        return sum(sizes)

    assert 10 * kept(True) < kept(False)


def test_the_diagonal_runs_adapters_of_unlike_strength() -> None:
    """Use PEFT's LoRA, whose scale is neither a tensor nor a plain number of a module."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, alpha_pattern={r".*layers\.1\..*": 30}
    )
    model = peft.get_peft_model(models.make("llama", num_hidden_layers=3).double(), config)
    memory, ids = AssociativeMemory(model, M, L, d_mem=5), models.tokens(2, 3 * L + 1)
    assert (
        len({part.scaling["default"] for part in model.modules() if hasattr(part, "scaling") and hasattr(part, "r")})
        == 2
    )
    expected = results(memory, ids, labels=ids)
    found = results(as_scheduled(memory, "diagonal"), ids, labels=ids)
    assert any("lora_A" in name for name in expected)
    for name, value in expected.items():
        assert error(found[name], value) < 1e-12, name


def test_the_diagonal_drops_out_each_layer_and_segment_apart() -> None:
    """Check that over many draws the mean of the logits is that of running segment by segment."""
    memory = wrapped("gpt2", torch.float32)
    for module in memory.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    memory.train()
    ids = models.tokens(1, 2 * L).expand(64, -1)
    rows = as_scheduled(memory, "diagonal")(ids).logits
    assert rows.std(0).min() > 0
    expected = as_scheduled(memory, "vertical")(ids).logits
    spread = (rows.var(0) + expected.var(0)).div(64).sqrt()
    assert ((rows.mean(0) - expected.mean(0)) / spread).square().mean() < 1.5
