"""The baselines are what their papers say, keep what is counted, and are compared alike."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from segattn.bench.experiments.baselines import experiment as harness
from segattn.bench.experiments.baselines import speed
from segattn.bench.experiments.baselines.counting import (
    at_the_papers_sizes,
    bytes_of,
    counted_bytes,
    formula_bytes,
    parameters,
)
from segattn.bench.experiments.baselines.kept import Kept, before_segments, numbers_before
from segattn.bench.experiments.baselines.lookback import Lookback
from segattn.bench.experiments.baselines.memorizing import Memorizing, MemorizingState
from segattn.bench.experiments.baselines.models import BASELINES, BaselineSetup, build
from segattn.bench.experiments.baselines.replacing import Tokens
from segattn.bench.experiments.baselines.transformer_xl import TransformerXL
from segattn.bench.experiments.book import experiment as book
from segattn.runs.text import generate_text

NAMES = tuple(BASELINES)
SIZES = {"segment_len": 8, "row": 40, "batch": 2, "steps": 2, "width": 16, "hidden": 24, "warm_up": 1, "reach": 2}
SIZES |= {"cached": 8, "memory_tokens": 3, "stored": 20, "neighbours": 3, "seeds": 1, "held_out": 0.1}
SETUP = BaselineSetup(**SIZES)
L, T, K = 8, 40, 6


def sharp(setup: BaselineSetup, name: str) -> Any:
    """A model whose attention matters to its logits."""
    model = build(setup, name, 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def some_bytes(batch: int, time: int) -> Tensor:
    return torch.randint(256, (batch, time), generator=torch.Generator().manual_seed(1))


def some_tokens(time: int = T, grad: bool = False) -> Tokens:
    """float64, at positions that turn nothing."""
    q, k, v = (torch.randn(2, 3, time, K, dtype=torch.double, requires_grad=grad) for _ in range(3))
    still = torch.ones(1, time, K, dtype=torch.double), torch.zeros(1, time, K, dtype=torch.double)
    return Tokens(q, k, v, 0.7, still)


def softmax_over(q: Tensor, k: Tensor, v: Tensor, scale: Any) -> Tensor:
    """One query [B, H, K] over keys [B, H, J, K]."""
    return torch.einsum("bhj,bhjv->bhv", (torch.einsum("bhk,bhjk->bhj", q, k) * scale).softmax(-1), v)


def transformer_xl_by_token(tokens: Tokens, cached: int) -> Tensor:
    rows = []
    for t in range(tokens.q.shape[2]):
        begin = t // L * L
        first = max(0, begin - cached)
        k, v = (torch.cat([x[:, :, first:begin].detach(), x[:, :, begin : t + 1]], 2) for x in tokens[1:3])
        rows.append(softmax_over(tokens.q[:, :, t], k, v, tokens.scale))
    return torch.stack(rows, 2)


def test_a_lookback_is_transformer_xl_of_a_segment_with_gradients() -> None:
    tokens = some_tokens(grad=True)
    found, detached = Lookback(L).attend(tokens, None), TransformerXL(L, L).attend(tokens, None)
    torch.testing.assert_close(found, detached, rtol=1e-12, atol=1e-12)
    dq, dk, dv = torch.autograd.grad(found[:, :, 2 * L : 3 * L].sum(), tokens[:3])
    for x in (dk, dv):
        assert x[:, :, L : 3 * L].abs().sum((0, 1, 3)).all()
        assert not x[:, :, :L].any()
        assert not x[:, :, 3 * L :].any()
    assert not dq[:, :, : 2 * L].any()


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("cached", [0, 3, 8, 19, 200])
def test_transformer_xl_is_its_definition_and_no_gradient_enters_the_cache(cached: int) -> None:
    tokens = some_tokens(grad=True)
    found, wanted = TransformerXL(L, cached).attend(tokens, None), transformer_xl_by_token(tokens, cached)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * weights).sum(), tokens[:3]) for x in (found, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-11)
    later = torch.autograd.grad(TransformerXL(L, cached).attend(tokens, None)[:, :, L:].sum(), tokens[:3])
    assert not any(x[:, :, :L].any() for x in later)
    assert all(x[:, :, L:].any() for x in later)


def test_a_transformer_xl_that_caches_everything_is_full_attention() -> None:
    setup = BaselineSetup(**SIZES | {"layers": 1, "cached": T - L})
    rows = some_bytes(2, T)
    full, cached, local = (sharp(setup, name)(rows).logits for name in ("full", "transformer-xl", "local"))
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=1e-5)
    assert (local - full)[:, L:].abs().max() > 0.1
    plain = book.build(setup, "full", 0).eval()
    plain.load_state_dict(sharp(setup, "full").state_dict())
    torch.testing.assert_close(full, plain(rows).logits, rtol=1e-4, atol=1e-5)


def recalled_by_token(module: Memorizing, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """What each token's nearest stored keys give, and 1 where there are some."""
    rows, some = [], []
    scale = module.log_scale.exp()[:, None]
    for t in range(tokens.q.shape[2]):
        begin = t // L * L
        k, v = (x[:, :, max(0, begin - module.stored) : begin].detach() for x in (unit(tokens.k), tokens.v))
        some.append(min(begin, 1))
        if not begin:
            rows.append(torch.zeros_like(tokens.v[:, :, 0]))
            continue
        q = unit(tokens.q[:, :, t])
        products = torch.einsum("bhk,bhjk->bhj", q, k)
        nearest = products.argsort(-1, descending=True)[..., : module.neighbours, None]
        near_k, near_v = (x.gather(2, nearest.expand(-1, -1, -1, K)) for x in (k, v))
        rows.append(softmax_over(q, near_k, near_v, scale))
    return torch.stack(rows, 2), torch.tensor(some)[:, None]


@pytest.mark.parametrize(("stored", "neighbours"), [(20, 3), (64, 5), (12, 1), (40, 99)])
def test_memorizing_is_its_definition(stored: int, neighbours: int) -> None:
    module = Memorizing(L, 5, 3, stored, neighbours).double()
    with torch.no_grad():
        module.gate.bias.copy_(torch.tensor([0.3, -1.0, 2.0]))
        module.log_scale.copy_(torch.tensor([0.5, 2.0, 1.0]))
    tokens = some_tokens(grad=True)
    found = module.attend(tokens, None)
    recalled, some = recalled_by_token(module, tokens)
    share = module.gate().sigmoid().double()[:, None, None] * some
    wanted = (1 - share) * transformer_xl_by_token(tokens, 5) + share * recalled
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights, inputs = torch.randn_like(found), (*tokens[:3], module.gate.bias, module.log_scale)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (found, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)
    later = torch.autograd.grad(module.attend(tokens, None)[:, :, L:].sum(), tokens[:3])
    assert not any(x[:, :, :L].any() for x in later)


def test_memorizing_with_all_keys_and_an_open_gate_is_softmax_over_all_earlier_segments() -> None:
    module = Memorizing(L, 0, 3, 64, 64).double()
    module.gate.bias.data.fill_(60.0)
    assert module.log_scale.exp().tolist() == pytest.approx([10.0] * 3)
    tokens = some_tokens()
    found = module.attend(tokens, None)
    scores = unit(tokens.q) @ unit(tokens.k).mT * module.log_scale.exp()[:, None, None]
    segment = torch.arange(T) // L
    scores = scores.masked_fill(segment[:, None] <= segment, -torch.inf)
    torch.testing.assert_close(found[:, :, L:], scores.softmax(-1)[:, :, L:] @ tokens.v, rtol=1e-12, atol=1e-12)
    local = TransformerXL(L, 0).attend(tokens, None)
    torch.testing.assert_close(found[:, :, :L], local[:, :, :L], rtol=0, atol=0)


def test_the_store_holds_keys_as_they_were_projected() -> None:
    model, rows = sharp(SETUP, "memorizing"), some_bytes(2, T)
    projected = {}
    for name, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.register_forward_hook(lambda _, __, out, name=name: projected.update({name: out}))
    _, state = BASELINES["memorizing"].read(model, rows, None)
    assert isinstance(state.layers[0], Kept)
    assert isinstance(state.layers[1], MemorizingState)
    wanted = unit(projected[1].unflatten(2, (2, 8)).transpose(1, 2))[:, :, -20:]
    torch.testing.assert_close(state.layers[1].stored.keys, wanted, rtol=1e-5, atol=1e-6)
    assert not state.layers[1].stored.keys.requires_grad


def test_the_layer_that_looks_up_is_the_papers_ninth_of_twelve() -> None:
    assert [BaselineSetup(layers=layers).looking_up for layers in (1, 2, 4, 12)] == [0, 1, 2, 8]


def test_what_stood_before_each_segment() -> None:
    kept, new = torch.arange(1.0, 4).view(1, 1, 3, 1), torch.arange(4.0, 13).view(1, 1, 9, 1)
    found = before_segments(kept, new, 5, 3)[0, 0, :, :, 0]
    assert found.tolist() == [[0, 0, 1, 2, 3], [2, 3, 4, 5, 6], [5, 6, 7, 8, 9]]
    assert numbers_before(3, 9, 5, 3).tolist() == [3, 5, 5]
    assert before_segments(kept[:, :, :0], new, 0, 3).shape == (1, 1, 3, 0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_models_are_causal_and_remember_as_far_as_they_should(name: str) -> None:
    model, rows = sharp(SETUP, name), some_bytes(1, T)
    changed = rows.clone()
    changed[0, 3] = 255 - rows[0, 3]
    differs = (model(rows).logits != model(changed).logits).any(-1)[0]
    assert not differs[:3].any()
    assert differs[3:L].all()
    # two layers of a cache of one segment reach two segments back
    reach = {"local": L, "transformer-xl": 3 * L, "lookback": 3 * L}.get(name, T)
    assert differs[L:reach].view(-1, L).any(1).all()
    assert not differs[reach:].any()


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_any_whole_segments_equal_the_whole_and_a_row_is_alone(name: str) -> None:
    model, rows = sharp(SETUP, name), some_bytes(2, T)
    whole, state, pieces = model(rows).logits, None, []
    for piece in rows.split([8, 16, 16], 1):
        logits, state = BASELINES[name].read(model, piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    for row in range(2):
        torch.testing.assert_close(model(rows[row : row + 1]).logits[0], whole[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_kept_are_those_of_the_formula(name: str) -> None:
    for changes in ({}, {"heads": 4, "layers": 3, "cached": 13, "stored": 100}, {"cached": 0, "memory_tokens": 5}):
        setup = BaselineSetup(**SIZES | changes)
        counted = counted_bytes(build(setup, name, 0), name, setup, (8, 24, 96))
        assert counted == {length: formula_bytes(setup, name, length) for length in (8, 24, 96)}
    by_hand = {"local": 0, "full": 4 * 2 * 16 * 24 * 2, "transformer-xl": 4 * 2 * 16 * 8 * 2, "rmt": 4 * 3 * 16}
    by_hand |= {"memorizing": 4 * 2 * 16 * (20 + 2 * 8), "linear": 4 * 2 * 2 * 8 * 9, "delta": 4 * 2 * 2 * 8 * 9}
    by_hand |= {"lookback": 4 * 2 * 16 * 8 * 2, "delta-lookback": 4 * (2 * 2 * 8 * 9 + 3 * 16 * 8 * 2)}
    assert formula_bytes(SETUP, name, 24) == by_hand[name]


def test_a_part_of_a_tensor_counts_as_all_that_it_keeps_alive() -> None:
    assert bytes_of((torch.zeros(5)[:2], (torch.zeros(3, dtype=torch.double), None))) == 20 + 24


def test_the_papers_table_is_counted() -> None:
    rows = {row["name"]: row for row in at_the_papers_sizes()}
    assert {name: row["counted"] for name, row in rows.items()} == {
        "transformer-xl": 12 * 2048 * 8 * 256,
        "memorizing": 12 * 2048 * 8 * 256 + 65000 * 8 * 256,
        "rmt": 100 * 1024,
        "linear": 12 * 8 * 128 * 129,
    }
    # keys and values of the memory in every layer, where the memory itself is handed on
    assert rows["rmt"]["numbers"] == 24 * rows["rmt"]["counted"]
    for name, row in rows.items():
        assert name == "rmt" or row["counted"] == row["numbers"]
        assert row["numbers"] / 1e6 == pytest.approx(row["printed"], rel=0.02)
        assert row["fewer"] == pytest.approx(row["printed_fewer"], rel=0.03)
    assert round(183 / 1.6) == rows["linear"]["printed_fewer"] == 114


def test_models_have_the_same_weights_and_few_of_their_own() -> None:
    wanted = book.build(SETUP, "full", 3).state_dict()
    count = sum(x.numel() for x in wanted.values())
    own = {"memorizing": 2 + 2, "rmt": 3 * 16, "linear": 2 * 2, "delta": 2 * 2, "delta-lookback": 2 * 2}
    for name in NAMES:
        model = build(SETUP, name, 3)
        held = {key.removeprefix("model.") if name == "rmt" else key: x for key, x in model.state_dict().items()}
        assert all(torch.equal(held[key], x) for key, x in wanted.items())
        assert parameters(model) == count + own.get(name, 0)


def test_local_is_that_of_the_book() -> None:
    text = torch.tensor(list(generate_text(400, 0).encode()), dtype=torch.uint8)
    losses = [book.train(make(SETUP, "local", 0), text, SETUP, 0) for make in (build, book.build)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_speeds_are_medians_of_ratios_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = speed._medians({"local": [1.0, 4.0, 2.0], "full": [2.0, 4.0, 8.0]}, 8)
    assert found["full"] == {"tokens_per_second": 2, "ratio": 0.5}
    assert found["local"] == {"tokens_per_second": 4, "ratio": 1.0}
    order: list[str] = []
    for name in ("_train", "_evaluate"):
        monkeypatch.setattr(speed, name, lambda model, rows: order.append(type(model).__name__))
    clock = iter(range(1000))
    monkeypatch.setattr("segattn.bench.speed.timing.time.perf_counter", lambda: next(clock))
    measured = speed.speeds(SETUP, ("local", "rmt"), rounds=1)
    names = ["LlamaForCausalLM", "RecurrentMemory"]
    # by turns, each round from the next one on
    assert order == (names + names[::-1] + names) * 2
    assert measured["train"] == {name: {"tokens_per_second": 80, "ratio": 1.0} for name in ("local", "rmt")}


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="rows must be of whole segments of 8 tokens, got 12"):
        build(SETUP, "transformer-xl", 0)(some_bytes(1, 12))
    with pytest.raises(ValueError, match="cached must be at least 0, got -1"):
        TransformerXL(8, -1)
    with pytest.raises(ValueError, match="neighbours must be at least 1, got 0"):
        Memorizing(8, 8, 2, 16, 0)


def test_the_experiment_is_kept_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "LENGTHS", (40, 80))
    monkeypatch.setattr(harness, "speeds", lambda setup, names: speed.speeds(setup, names, rounds=1))
    book, out = tmp_path / "book.txt", tmp_path / "out"
    book.write_text(generate_text(300, 0))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    command = ["--text", str(book), "--out", str(out), *options, "--lr-factors", "0.5", "2"]
    assert harness.main(command) == 0
    first = json.loads((out / "baselines.json").read_text())
    assert [(run["variant"], run["seed"]) for run in first["runs"]] == [(name, 0) for name in NAMES]
    assert all(run["nats"] > 0 and run["loss"] for run in first["runs"])
    assert [(run["variant"], run["lr"]) for run in first["tried"]] == [(n, lr) for n in NAMES for lr in (0.005, 0.02)]
    tried = {(run["variant"], run["lr"]): run["nats"] for run in first["tried"]}
    assert len(set(tried.values())) == len(tried)
    assert first["rates"] == {name: min((0.005, 0.02), key=lambda lr, name=name: tried[name, lr]) for name in NAMES}
    assert first["kept"]["full"]["counted"] == first["kept"]["full"]["bytes"] == {"40": 10240, "80": 20480}
    assert set(first["speed"]["train"]) == set(NAMES)
    assert (out / "baselines.png").read_bytes().startswith(b"\x89PNG")
    for made in (first["speed"]["made"], *(run["made"] for run in first["runs"])):
        assert {"commit", "dirty", "processor", "threads"} <= made.keys()
    printed = capsys.readouterr().out
    # why its two figures are so far apart
    assert "counted is what is handed on from segment to segment" in " ".join(printed.split())
    assert printed.count(": perplexity") == 3 * len(NAMES)
    assert "Infini-attention" in printed
    assert str(tmp_path) not in (out / "baselines.json").read_text()
    assert harness.main(command) == 0
    assert json.loads((out / "baselines.json").read_text()) == first
    assert harness.main([*command, "--stored", "24"]) == 2
    said = f"--stored must be 20 as in {out / 'baselines.json'}, got 24: or choose another --out\n"
    assert capsys.readouterr().err == f"baselines: {said}"


def test_learning_rates_are_chosen_by_bytes_that_no_run_is_judged_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = torch.arange(1000).to(torch.uint8)
    setup = replace(SETUP, held_out=0.2, validation=0.25)
    read, seeds = [], []

    def train(model: Any, known: Tensor, one: BaselineSetup, seed: int, on_step: Any) -> None:
        read.append(known)
        seeds.append(seed)

    def by_position(model: Any, known: Tensor, row: int) -> Tensor:
        read.append(known)
        return torch.tensor([1.0, 2.0])

    monkeypatch.setattr(harness, "train", train)
    monkeypatch.setattr(harness, "by_position", by_position)
    monkeypatch.setattr(harness, "BASELINES", {"local": BASELINES["local"]})
    figures: dict[str, Any] = {}
    rates = harness.chosen_rates(replace(setup, lr_factors=(1.0,)), text, tmp_path / "kept.json", figures)
    assert rates == {"local": 0.01}
    assert [(x[0].item(), len(x)) for x in read] == [(0, 600), (600 % 256, 200)]
    assert not set(seeds) & set(range(1000))
    assert figures["tried"] == [{"variant": "local", "lr": 0.01, "nats": 1.5}]


def test_the_best_rate_has_the_fewest_nats_and_is_a_number() -> None:
    tried = [("a", 1.0, 2.0), ("a", 2.0, 1.0), ("a", 3.0, 1.5), ("b", 1.0, math.nan), ("b", 2.0, 9.0)]
    for order in (tried, tried[::-1]):
        runs = [{"variant": name, "lr": lr, "nats": nats} for name, lr, nats in order]
        assert harness.best_rates(runs) == {"a": 2.0, "b": 2.0}


def test_what_cannot_be_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(40_000))
    command = ["--text", str(tmp_path / "book.txt"), "--out", str(tmp_path / "out")]
    for option, problem in (
        ("--steps=0", "--steps must be at least 1, got 0"),
        ("--neighbours=0", "--neighbours must be at least 1, got 0"),
        ("--memory-tokens=0", "--memory-tokens must be at least 1, got 0"),
        ("--cached=-1", "--cached must not be negative, and finite, got -1"),
        ("--lr-factors=0", "--lr-factors must be positive and finite, got [0.0]"),
        ("--validation=1", "--validation must be between 0 and 1, got 1.0"),
        ("--validation=0.001", "--text must have at least 257 bytes for evaluation, got 38 of 38000"),
        ("--heads=3", "--width must be a multiple of 6, twice the heads, got 64"),
    ):
        assert harness.main([*command, option]) == 2
        assert capsys.readouterr().err == f"baselines: {problem}\n"
    assert not (tmp_path / "out").exists()
