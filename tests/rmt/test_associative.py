"""Tests of `AssociativeMemory`: the paper's formulas, schedules, pieces, padding, gradients, generation, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from calls import error
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

import models

from segattn.kernels.state import MemoryState
from segattn.rmt.associative import layer as layer_module
from segattn.rmt.associative import memory as associative_memory
from segattn.rmt.associative.layer import DPFP, AssociativeLayer, Projections, memorize, recall
from segattn.rmt.associative.memory import AssociativeMemory
from segattn.rmt.associative.schedules import SCHEDULES
from segattn.rmt.associative.state import AssociativeState

DOUBLE = torch.float64
L, M = 7, 3
FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen3")
OTHERS = ("vertical", "horizontal", "diagonal")


def wrapped(name: str = "llama", dtype: torch.dtype = DOUBLE, depth: int = 3, **options: Any) -> AssociativeMemory:
    """Make a tiny model with memories that return something."""
    layers: dict[str, Any] = {"n_layer" if name == "gpt2" else "num_hidden_layers": depth}
    if name == "gemma3_text":
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        layers |= {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 4}
    model = models.make(name, **layers).to(dtype)
    torch.manual_seed(1)
    memory = AssociativeMemory(model, M, L, **({"d_mem": 5} | options))
    for layer in memory.memories.values():
        torch.nn.init.normal_(layer.value.weight, std=0.2)
    return memory


def as_scheduled(memory: AssociativeMemory, schedule: str) -> AssociativeMemory:
    other = copy.deepcopy(memory)
    other.settings = replace(memory.settings, schedule=schedule)
    return other


def padded(lengths: tuple[int, ...], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    time = max(lengths)
    at = torch.arange(time)
    real = [at < n if side == "right" else at >= time - n for n in lengths]
    return models.tokens(len(lengths), time), torch.stack(real).long()


def results(memory: AssociativeMemory, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Return the loss, logits, state, and the gradient of every parameter."""
    memory.zero_grad()
    out = memory(*args, output_logits=True, **kwargs)
    last = [x for state in out.state.memories for x in state]
    (out.loss + sum(x.square().mean() for x in last)).backward()
    found = {"loss": out.loss, "logits": out.logits} | {f"state {i}": x for i, x in enumerate(last)}
    return found | {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}


def checkpointed(memory: AssociativeMemory) -> None:
    # its name before transformers 5
    enable = getattr(memory.model, "activation_checkpointing_enable", memory.model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


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


def plain_read(x: torch.Tensor, layer: AssociativeLayer, A: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in x:
        q = features_of(layer.query.weight @ row)
        weight = q @ z
        rows.append(row + q @ A / weight if weight > 0 else row)
    return torch.stack(rows)


def plain_write(u: torch.Tensor, layer: AssociativeLayer, A: torch.Tensor, z: torch.Tensor) -> Any:
    new_A, new_z = A, z
    for row in u:
        k = features_of(layer.key.weight @ row)
        beta = torch.sigmoid(layer.strength.weight @ row + layer.strength.bias)
        known = k @ z
        returned = k @ A / known if known > 0 else 0.0
        gamma = (1 - known / (k @ k)).clamp(0, 1).detach()
        new_A = new_A + beta * torch.outer(k, layer.value.weight @ row - returned)
        new_z = new_z + gamma * k
    return new_A, new_z


def features_of(x: torch.Tensor) -> torch.Tensor:
    """Return DPFP-3 of length 1, differentiable."""
    halves = torch.cat((x.clamp(min=0), (-x).clamp(min=0)))
    f = torch.cat([halves * torch.stack([halves[i - j] for i in range(len(halves))]) for j in (1, 2, 3)])
    return f / f.square().sum().sqrt()


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
            x = plain_read(x, own, *states[index])
            x = layer(x[None], attention_mask=unseen[None, None], position_embeddings=rotary)[0]
            states[index] = plain_write(x[len(tokens) :], own, *states[index])
        logits.append(model.lm_head(model.model.norm(x[: len(tokens)])))
    return torch.cat(logits), states


@pytest.mark.parametrize("time", [3 * L, 2 * L + 4, 5])
def test_the_module_is_a_plain_loop_over_llamas_own_layers(time: int) -> None:
    """Compare logits, loss, state and all gradients, also with a short last segment."""
    memory, ids = wrapped(depth=2), models.tokens(2, time)
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


@pytest.mark.parametrize("schedule", OTHERS)
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


@pytest.mark.parametrize("schedule", OTHERS)
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


@pytest.mark.parametrize("schedule", OTHERS)
def test_pieces_of_whole_segments_equal_the_whole_with_all_gradients(schedule: str) -> None:
    memory, ids = wrapped(schedule=schedule), models.tokens(2, 5 * L + 3)
    memory.zero_grad()
    whole = memory(ids)
    (whole.logits.sin().sum() + whole.state.memories[1].memory.square().sum()).backward()
    expected = {name: p.grad.clone() for name, p in memory.named_parameters()}
    memory.zero_grad()
    state, logits = None, []
    for piece in ids.split([L, 3 * L, L + 3], 1):
        out = memory(piece, state=state)
        state = out.state
        logits.append(out.logits)
    (torch.cat(logits, 1).sin().sum() + state.memories[1].memory.square().sum()).backward()
    assert error(torch.cat(logits, 1), whole.logits) < 1e-12
    for name, value in expected.items():
        assert error(memory.get_parameter(name).grad, value) < 1e-12, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", ["vertical", "diagonal"])
def test_a_padded_row_equals_the_row_alone(schedule: str, side: str) -> None:
    memory, lengths = wrapped(schedule=schedule), (3 * L + 1, L, 2 * L - 1, 2)
    ids, mask = padded(lengths, side)
    start = memory(models.tokens(len(lengths), L, seed=5)).state
    out = memory(ids, mask, labels=ids, state=start, output_logits=True)
    losses = []
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        own = AssociativeState(tuple(MemoryState(*(x[row : row + 1] for x in m)) for m in start.memories))
        alone = memory(ids[row : row + 1, real], labels=ids[row : row + 1, real], state=own, output_logits=True)
        losses.append(alone.loss * (length - 1))
        assert error(out.logits[row, real], alone.logits[0]) < 1e-12
        for all_rows, one in zip(out.state.memories, alone.state.memories, strict=True):
            assert error(all_rows.memory[row], one.memory[0]) < 1e-12
            assert error(all_rows.normalizer[row], one.normalizer[0]) < 1e-12
    assert error(out.loss, sum(losses) / sum(length - 1 for length in lengths)) < 1e-12


@pytest.mark.parametrize("schedule", OTHERS)
def test_no_state_is_the_empty_state_and_a_first_segment_reads_nothing(schedule: str) -> None:
    memory, ids = wrapped(schedule=schedule), models.tokens(2, 2 * L)
    empty = AssociativeState(tuple(MemoryState.zeros(2, 1, 30, 32, dtype=DOUBLE) for _ in range(3)))
    one, other = memory(ids), memory(ids, state=empty)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.state.memories[0].memory, other.state.memories[0].memory)
    with torch.no_grad():
        for layer in memory.memories.values():
            layer.query.weight.normal_()
    changed = memory(ids).logits
    assert torch.equal(changed[:, :L], one.logits[:, :L])
    assert error(changed[:, L:], one.logits[:, L:]) > 1e-3


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_state_of_inference_mode_goes_on_in_training(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("memory_read", "memory_write"):
        monkeypatch.setattr(layer_module, name, partial(getattr(layer_module, name), backend=backend))
    memory = wrapped(dtype=torch.float32, d_mem=4, nu=2, layers=[1]).to(device)
    ids = models.tokens(1, L + 4).to(device)
    with torch.inference_mode():
        state = memory(ids[:, :L]).state
    plain = AssociativeState(tuple(MemoryState(*(x.clone() for x in part)) for part in state.memories))
    expected = results(memory, ids[:, L:], labels=ids[:, L:], state=plain)
    for name, value in results(memory, ids[:, L:], labels=ids[:, L:], state=state).items():
        assert error(value, expected[name]) < 1e-5, name


def test_nothing_is_kept_on_the_module() -> None:
    """Read two texts in turns, after which every attribute is the same object."""
    memory = wrapped()
    texts = [models.tokens(1, 3 * L, seed) for seed in (3, 4)]
    attributes = {(name, key): id(x) for name, part in memory.named_modules() for key, x in vars(part).items()}
    alone = [memory(text).logits for text in texts]
    states: list[Any] = [None, None]
    for segment in range(3):
        for i, text in enumerate(texts):
            out = memory(text[:, segment * L : segment * L + L], state=states[i])
            states[i] = out.state
            assert error(out.logits, alone[i][:, segment * L : segment * L + L]) < 1e-12
    assert attributes == {(name, key): id(x) for name, part in memory.named_modules() for key, x in vars(part).items()}


def test_a_half_precision_model_keeps_a_float32_state() -> None:
    memory, ids = wrapped(dtype=torch.bfloat16), models.tokens(1, 3 * L)
    exact = wrapped()
    exact.load_state_dict(memory.state_dict())
    out = memory(ids)
    assert out.logits.dtype == torch.bfloat16
    for found, expected in zip(out.state.memories, exact(ids).state.memories, strict=True):
        assert found.memory.dtype == found.normalizer.dtype == torch.float32
        assert error(found.memory, expected.memory) < 0.1


def test_parameters_load_into_a_fresh_wrapper() -> None:
    memory, ids = wrapped(layers=(0, -1)), models.tokens(1, 3 * L)
    own = {name for name, _ in memory.named_parameters() if not name.startswith("model.")}
    parts = ("query.weight", "key.weight", "value.weight", "strength.weight", "strength.bias")
    assert own == {"memory_tokens"} | {f"memories.{layer}.{part}" for layer in (0, 2) for part in parts}
    assert {name.removeprefix("model.") for name in memory.state_dict()} - own == set(memory.model.state_dict())
    fresh = AssociativeMemory(models.make("llama", num_hidden_layers=3).double(), M, L, d_mem=5, layers=(0, 2))
    with torch.no_grad():
        fresh.memory_tokens.zero_()
    fresh.load_state_dict(memory.state_dict())
    assert torch.equal(fresh(ids).logits, memory(ids).logits)


def test_memory_tokens_begin_unlike_one_another() -> None:
    tokens = wrapped().memory_tokens.detach()
    assert torch.pdist(tokens).min() > 0.1 * tokens.norm(dim=1).max()


def test_labels_are_the_next_tokens_also_over_a_border() -> None:
    memory, ids = wrapped(), models.tokens(2, 2 * L + 2)
    labels = ids.clone()
    # the border, a first token without a predecessor, and one in the middle
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0, L], keep[1, 0], keep[1, 3] = True, True, True
    labels[~keep] = -100
    out = memory(ids, labels=labels)
    assert out.logits is None
    logits = memory(ids).logits
    chances = logits.log_softmax(-1)
    assert error(out.loss, -(chances[0, L - 1, ids[0, L]] + chances[1, 2, ids[1, 3]]) / 2) < 1e-12
    nothing = memory(ids, labels=torch.full_like(ids, -100)).loss
    nothing.backward()
    assert nothing == 0


def test_no_more_logits_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, ids, seen = wrapped(), models.tokens(2, 3 * L), []
    memory.model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = 5
    memory(ids, labels=labels)
    memory(ids, output_logits=False)
    assert seen == [2]


@pytest.mark.parametrize("schedule", OTHERS)
def test_gradient_reaches_every_projection_of_every_layer_that_is_read(schedule: str) -> None:
    memory, ids = wrapped(schedule=schedule), models.tokens(1, 2 * L)
    labels = ids.clone()
    labels[:, : L + 1] = -100
    memory(ids, labels=labels).loss.backward()
    for name, parameter in memory.memories.named_parameters():
        assert parameter.grad.norm() > 1e-8, name
    memory.zero_grad()
    memory(ids[:, :L], labels=ids[:, :L]).loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in memory.memories.parameters())


@pytest.mark.parametrize("schedule", OTHERS)
@pytest.mark.parametrize("bptt", [1, 2, 3, None])
def test_gradient_reaches_back_so_many_real_segments_and_no_further(bptt: int | None, schedule: str) -> None:
    """Follow the gradient of the last segments of rows of 5 and 3, which is exactly 0 beyond `bptt`, to the state."""
    memory = wrapped(schedule=schedule, bptt=bptt)
    ids, mask = padded((5 * L, 2 * L + 4))
    x = memory.embed(ids).detach().requires_grad_()
    start = memory(models.tokens(2, L, seed=9)).state.detach()
    leaves = [part.requires_grad_() for state in start.memories for part in state]
    logits = memory(inputs_embeds=x, attention_mask=mask, state=start).logits
    (logits[0, 4 * L :].square().sum() + logits[1, 2 * L : 2 * L + 4].square().sum()).backward()
    for row, segments in enumerate((5, 3)):
        reached = [bool(x.grad[row, s * L : s * L + L].any()) for s in range(segments)]
        assert reached == [bptt is None or s >= segments - bptt for s in range(segments)]
        assert any(bool(leaf.grad is not None and leaf.grad[row].any()) for leaf in leaves) == (bptt is None)


def test_layers_of_experts() -> None:
    """Compare the first segment with the model alone, and the schedules, which must route tokens alike."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    # the default is not for float64
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    memory = AssociativeMemory(transformers.Qwen3MoeForCausalLM(config).double().eval(), M, L, d_mem=5)
    ids = models.tokens(2, 3 * L + 2)
    with torch.no_grad():
        own = memory.model(ids[:, :L], use_cache=False).logits
        assert error(memory(ids).logits[:, :L], own) < 1e-12
    for layer in memory.memories.values():
        torch.nn.init.normal_(layer.value.weight, std=0.2)
    expected = results(as_scheduled(memory, "vertical"), ids, labels=ids)
    for schedule in ("horizontal", "diagonal"):
        found = results(as_scheduled(memory, schedule), ids, labels=ids)
        assert found.keys() == expected.keys()
        assert all(error(found[key], expected[key]) < 1e-12 for key in expected if expected[key].any()), schedule


def test_the_loss_of_a_long_text_holds_few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = wrapped()
    ids = models.tokens(2, 3 * L + 2)
    whole = results(memory, ids, labels=ids)
    rows: list[int] = []
    logits = AssociativeMemory.logits
    noted = lambda self, hidden: rows.append(hidden.shape[:-1].numel()) or logits(self, hidden)  # noqa: E731
    monkeypatch.setattr(AssociativeMemory, "logits", noted)
    monkeypatch.setattr(associative_memory, "LOSS_ROWS", 7)
    parts = results(memory, ids, labels=ids)
    count = 2 * (3 * L + 1)
    last = [count % 7] if count % 7 else []
    # forward, those that the caller asked for, and once more backward, from the last part on
    forward = [7] * (count // 7) + last
    assert rows == [*forward, ids.numel(), *forward[::-1]]
    assert all(error(parts[key], whole[key]) < 1e-12 for key in whole if whole[key].any())


@pytest.mark.parametrize("name", FAMILIES)
def test_generated_text_is_the_likeliest_by_teacher_forcing(name: str) -> None:
    """Continue prompts that end inside a segment, at its end, and in the first one, over two borders."""
    memory = wrapped(name, schedule="diagonal")
    ids, mask = padded((2 * L + 3, 2 * L, 4), "left")
    new = memory.generate(ids, mask, max_new_tokens=2 * L + 2)
    for row in range(3):
        prompt = ids[row, mask[row].bool()]
        logits = memory(torch.cat((prompt, new[row]))[None]).logits[0, len(prompt) - 1 : -1]
        assert torch.equal(logits.argmax(-1), new[row])


def test_generation_goes_on_from_a_state_and_stops_at_the_end_token() -> None:
    memory = wrapped()
    ids = models.tokens(2, 3 * L)
    state = memory(ids[:, : 2 * L]).state
    kept = [x.clone() for part in state.memories for x in part]
    whole = memory.generate(ids, max_new_tokens=9)
    assert torch.equal(memory.generate(ids[:, 2 * L :], state=state, max_new_tokens=9), whole)
    assert all(torch.equal(x, y) for x, y in zip(kept, (x for part in state.memories for x in part), strict=True))
    ended = memory.generate(ids, max_new_tokens=9, eos_token_id=int(whole[0, 2]), pad_token_id=0)
    first = int((whole[0] == whole[0, 2]).nonzero()[0])
    assert torch.equal(ended[0, : first + 1], whole[0, : first + 1])
    assert not ended[0, first + 1 :].any()


def test_generation_that_cannot_cache_is_the_same() -> None:
    memory = wrapped()
    ids = models.tokens(1, L + 2)
    expected = memory.generate(ids, max_new_tokens=L + 3)
    checkpointed(memory)
    memory.train()
    assert torch.equal(memory.generate(ids, max_new_tokens=L + 3), expected)


BAD: dict[str, tuple[type[Exception], Callable[[AssociativeMemory], Any]]] = {
    "segment_len must be at least 1, got 0": (ValueError, lambda m: AssociativeMemory(m.model, 1, 0)),
    "segment_len must be at least num_memory_tokens = 3, got 2": (
        ValueError,
        lambda m: AssociativeMemory(m.model, 3, 2),
    ),
    "num_memory_tokens must be at least 1": (ValueError, lambda m: AssociativeMemory(m.model, 0, 4)),
    "d_mem must be an integer, got float": (TypeError, lambda m: AssociativeMemory(m.model, 1, 4, d_mem=2.5)),
    "nu must be at least 1": (ValueError, lambda m: AssociativeMemory(m.model, 1, 4, nu=0)),
    "bptt must be at least 1, got 0": (ValueError, lambda m: AssociativeMemory(m.model, 1, 4, bptt=0)),
    "schedule must be one of 'vertical', 'horizontal', 'diagonal', got 'spiral'": (
        ValueError,
        lambda m: AssociativeMemory(m.model, 1, 4, schedule="spiral"),
    ),
    "layers must be below the model's 3, got 3": (ValueError, lambda m: AssociativeMemory(m.model, 1, 4, layers=[3])),
    "layers must name at least one": (ValueError, lambda m: AssociativeMemory(m.model, 1, 4, layers=[])),
    "segment_len must be at most 61": (ValueError, lambda m: AssociativeMemory(models.make("gpt2"), 3, 62)),
    "model must be a Hugging Face decoder with causal layers, got a Linear": (
        ValueError,
        lambda m: AssociativeMemory(torch.nn.Linear(2, 2), 1, 4),
    ),
    "model must have a language model's head, got a LlamaModel": (
        ValueError,
        lambda m: AssociativeMemory(m.model.model, 1, 4),
    ),
    "with causal layers, got a BertModel": (
        ValueError,
        lambda m: AssociativeMemory(
            transformers.BertModel(
                transformers.BertConfig(
                    vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
                )
            ),
            1,
            4,
        ),
    ),
    "model must embed its tokens in the module that runs its layers, got a BertLMHeadModel": (
        ValueError,
        lambda m: AssociativeMemory(
            transformers.BertLMHeadModel(
                transformers.BertConfig(
                    vocab_size=9,
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    intermediate_size=8,
                    is_decoder=True,
                )
            ),
            1,
            4,
        ),
    ),
    "input_ids or inputs_embeds must be given, and not both": (ValueError, lambda m: m()),
    r"input_ids must have shape \[B, T\], got \[4\]": (ValueError, lambda m: m(models.tokens(1, 4)[0])),
    "input_ids must be an integer tensor, got torch.float32": (TypeError, lambda m: m(torch.ones(1, 4))),
    r"input_ids must have a row and a token in it, got shape \[1, 0\]": (ValueError, lambda m: m(models.tokens(1, 0))),
    r"inputs_embeds must have shape \[B, T, d = 32\]": (
        ValueError,
        lambda m: m(inputs_embeds=torch.ones(1, 4, 31, dtype=DOUBLE)),
    ),
    r"labels must have shape \[B, T\] = \[1, 4\], got \[1, 3\]": (
        ValueError,
        lambda m: m(models.tokens(1, 4), labels=models.tokens(1, 3)),
    ),
    "attention_mask must have a token in every row, got row 1": (
        ValueError,
        lambda m: m(models.tokens(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])),
    ),
    "state must be an AssociativeState, got list": (TypeError, lambda m: m(models.tokens(1, 4), state=[])),
    "state must have 3 memories, one of each layer with one, got 2": (
        ValueError,
        lambda m: m(models.tokens(1, 4), state=AssociativeState(m(models.tokens(1, 4)).state.memories[:2])),
    ),
    r"state.memory must have shape \[B, G, K, V\] = \[1, 1, 30, 32\], got \[2, 1, 30, 32\]": (
        ValueError,
        lambda m: m(models.tokens(1, 4), state=m(models.tokens(2, 4)).state),
    ),
    r"state.memory must have shape \[B, G, K, V\] = \[1, 1, 30, 32\], got \[1, 1, 24, 32\]": (
        ValueError,
        lambda m: m(models.tokens(1, 4), state=wrapped(d_mem=4)(models.tokens(1, 4)).state),
    ),
    "state.memory must be torch.float64, got torch.float32": (
        TypeError,
        lambda m: m(models.tokens(1, 4), state=wrapped(dtype=torch.float32)(models.tokens(1, 4)).state),
    ),
    "checkpoint must be True or False, got 1": (TypeError, lambda m: AssociativeMemory(m.model, M, L, checkpoint=1)),
    "max_new_tokens must be at least 1": (ValueError, lambda m: m.generate(models.tokens(1, 4), max_new_tokens=0)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    kind, call = BAD[message]
    with pytest.raises(kind, match=message):
        call(wrapped())


def test_a_model_of_encoder_and_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration, which is both: pass one of them"):
        AssociativeMemory(transformers.T5ForConditionalGeneration(config), M, L)


def test_a_model_without_weights_yet() -> None:
    with torch.device("meta"):
        model = models.make()
    assert AssociativeMemory(model, M, L).memory_tokens.is_meta


def test_a_converted_model_and_one_that_drops_layers_are_refused() -> None:
    from segattn import convert

    with pytest.raises(ValueError, match=r"segattn\.revert first"):
        AssociativeMemory(convert(models.make("llama"), 8, quiet=True), M, L)
    memory = AssociativeMemory(models.make("opt", layerdrop=1.0), M, L)
    memory.train()
    with pytest.raises(RuntimeError, match="turn layer dropping off"):
        memory(models.tokens(1, 4))
