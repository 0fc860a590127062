"""What the planner says, against the papers, counts of real models, bytes of real states, and by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import models
from rich.console import Console
from typer.testing import CliRunner

import segattn
import segattn.cli.plan as plan_command
from segattn.bench.planner import floors, plots, published
from segattn.bench.planner.exchange import EXCHANGES, Links, Split, Traffic
from segattn.bench.planner.floors import PEAKS, Peak, Sizes
from segattn.bench.planner.memory_tokens import Associative, Recurrent
from segattn.bench.planner.report import LETTERS, SCHEMES, SLOWER_PRODUCTS, estimates, exchanges
from segattn.bench.planner.schemes import Full, Infini, Local
from segattn.bench.planner.settings import PlanSettings, gpu_of
from segattn.bench.planner.shapes import SHAPES, shape_of
from segattn.bench.planner.units import in_bytes, in_seconds, in_units
from segattn.cli.main import app
from segattn.rmt.associative.memory import AssociativeMemory
from segattn.rmt.recurrent.layout import block_mask
from segattn.rmt.recurrent.memory import RecurrentMemory
from segattn.runs.errors import SettingError
from segattn.runs.figures import format_length

# those of tests/helpers/models.py
LLAMA = shape_of("layers=2,width=32,heads=4,kv_heads=2,ff=48,vocabulary=61,gated=1,rotary=1")
OPT = shape_of("layers=2,width=32,heads=4,ff=48,vocabulary=61")
B, L, M = 3, 5, 2
PEAK = Peak(1e15, 3e12)


def plan(length: int, **changes: Any) -> PlanSettings:
    sizes: dict[str, Any] = {"segment_len": L, "memory": M, "d_mem": 4, "batch": B, "dtype": "float32"}
    return PlanSettings(**({"shape": LLAMA, "length": length} | sizes | changes))


def counted(run: Any) -> int:
    """Operations of matrix products; the table of rotations, which transformers 4 makes by one, is left out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    modules = counter.get_flop_counts()
    rotations = [sum(own.values()) for name, own in modules.items() if name.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(rotations)


def tiny(name: str = "llama") -> Any:
    model = models.make(name)
    model.set_attn_implementation("eager")
    return model


def products(pairs: int) -> int:
    """Of two layers' attention in `pairs` of a sequence: 4 heads of width 8."""
    return 2 * B * 4 * pairs * 2 * (8 + 8)


# the papers


@pytest.mark.parametrize(
    ("name", "ratio", "with_memory"), [("opt-125m", 294.8, 282.9), ("opt-175b", 29.3, 28.2)], ids=["125m", "175b"]
)
def test_flops_of_the_million_token_paper(name: str, ratio: float, with_memory: float) -> None:
    row = next(row for row in published.savings() if row["shape"] == name)
    assert row["segments"][-1] * published.SEGMENT_LEN == 2_097_152
    assert round(row["saving"][-1], 1) == ratio
    assert round(row["saving_with_memory"][-1], 1) == with_memory
    assert round(row["saving"][-1]) == row["printed"]


def test_the_whole_family_is_there_and_larger_models_save_less() -> None:
    rows = published.savings()
    last = [row["saving"][-1] for row in rows]
    assert len(last) == 9
    assert last == sorted(last, reverse=True)
    # computed apart from this code when the formula was found
    assert {row["shape"]: round(row["saving"][-1], 1) for row in rows}.items() >= {
        "opt-1.3b": 154.1,
        "opt-6.7b": 82.5,
        "opt-30b": 48.9,
    }.items()
    assert all(row["saving"][0] == 1 > row["saving_with_memory"][0] for row in rows)


def test_numbers_kept_by_the_infini_attention_paper() -> None:
    for row in published.memories():
        # 50 M, 183 M, 2.5 M and 1.6 M are printed, and shares of those
        digits = 1 if row.printed < 10 else 0
        assert round(row.numbers / 1e6, digits) == row.printed
        assert row.share == pytest.approx(row.printed_share, rel=0.03)
        assert 183.0 / row.printed == pytest.approx(row.printed_share, rel=0.02)
    kept = {row.name: row.numbers for row in published.memories()}
    state = segattn.MemoryState.zeros(1, 8, 128, 128)
    assert kept["Infini-attention"] == 12 * sum(x.numel() for x in state)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("opt-125m", 125_239_296),
        ("opt-350m", 331_196_416),
        ("opt-1.3b", 1_315_758_080),
        ("opt-6.7b", 6_658_473_984),
    ],
)
def test_named_models_have_the_parameters_that_are_known(name: str, parameters: int) -> None:
    s = SHAPES[name]
    if s.gated:
        # norms; below 8B the embeddings are the head's matrix
        others = (2 * s.layers + 1) * s.width + (0 if "3.2" in name else s.head)
    else:
        # biases, two norms a layer and, where there is no projection behind it, a last one; positions
        layer = 4 * s.width + s.ff + s.width + 4 * s.width
        others = s.layers * layer + (0 if s.embedding_width else 2 * s.width) + 2050 * s.width
    assert s.matrices + others == parameters


# counts of real models


@pytest.mark.parametrize(("name", "shape"), [("llama", LLAMA), ("opt", OPT)], ids=["llama", "opt"])
@pytest.mark.parametrize("length", [1, 23])
def test_full_attention_counts_what_a_model_computes_but_for_pairs_that_nobody_sees(
    name: str, shape: Any, length: int
) -> None:
    model = tiny(name)
    done = counted(lambda: model(models.tokens(B, length), use_cache=False))
    hidden = length * length - length * (length + 1) // 2
    assert Full(plan(length, shape=shape)).forward().operations == done - products(hidden)


def test_a_last_token_has_logits_alone() -> None:
    model = tiny()
    done = counted(lambda: model(models.tokens(B, 23), use_cache=False, logits_to_keep=1))
    cost = Full(plan(23))
    assert cost.forward(logits=1).operations == done - products(23 * 22 // 2)


@pytest.mark.parametrize("length", [5, 25])
def test_rmt_counts_what_the_module_computes(length: int) -> None:
    """Its attention is dense here."""
    model = RecurrentMemory(tiny(), M, L).eval()
    done = counted(lambda: model(models.tokens(B, length)))
    segments, rows = length // L, L + 2 * M
    hidden = segments * int((~block_mask(rows, M, M)).sum())
    assert Recurrent(plan(length)).forward().operations == done - products(hidden)


@pytest.mark.parametrize("length", [5, 25])
def test_armt_counts_what_the_module_computes(length: int) -> None:
    """It also reads a memory that is empty, and multiplies by normalizers, which the plan leaves out."""
    model = AssociativeMemory(tiny(), M, L, d_mem=4, nu=3).eval()
    done = counted(lambda: model(models.tokens(B, length)))
    segments, rows, features, d = length // L, L + M, 24, 32
    hidden = segments * rows * (rows - 1) // 2
    empty = 2 * B * (rows * 2 * d * (4 + features) + M * 2 * d * features)
    normalizers = 2 * B * segments * 2 * features * (rows + 2 * M)
    assert Associative(plan(length)).forward().operations == done - products(hidden) - empty - normalizers


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize(("lookback", "sinks"), [(1, 0), (0, 3), (1, 2)])
@pytest.mark.parametrize("length", [5, 11, 23, 25])
def test_a_lookback_and_sinks_count_what_is_visible(length: int, lookback: int, sinks: int, update: str) -> None:
    pairs, readers = 0, 0
    for token in range(length):
        first = max(0, token // L - lookback) * L
        pairs += token + 1 - first + min(sinks, first)
        readers += first > 0
    written = max(0, length // L - lookback) * L
    looked_up = max(0, written - L) if update == "delta" else 0
    wanted = B * 4 * 2 * (16 * pairs + 64 * readers) + B * 2 * 2 * 64 * (written + looked_up)
    chosen = plan(length, lookback=lookback, sinks=sinks, update=update)
    assert Infini(chosen).mixing().operations == wanted
    assert Local(chosen).mixing().operations == B * 4 * 2 * 16 * pairs
    # one token after another at the end: what the last segment's tokens see, and the keys that are read for them
    last = range((length - 1) // L * L, length) if length % L == 0 else None
    if last is not None:
        seen = [t + 1 - max(0, t // L - lookback) * L + min(sinks, max(0, t // L - lookback) * L) for t in last]
        assert Local(chosen).mixing_one_by_one().operations == B * 4 * 2 * 16 * sum(seen)
        moved = B * (4 * 16 * L + 2 * 16 * sum(seen)) * 4
        assert Local(chosen).mixing_one_by_one().bytes == moved


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("length", [5, 23])
def test_infini_attention_counts_what_the_reference_computes(update: str, length: int) -> None:
    """Which is dense inside segments, reads a memory that is empty, and multiplies by normalizers."""
    q, k, v = (torch.randn(B, 4, length, 8, dtype=torch.float64) for _ in range(3))
    gate = torch.zeros(4, dtype=torch.float64)
    done = counted(
        lambda: segattn.segment_attention(q, k, v, segment_len=L, gate=gate, update=update, backend="reference")
    )
    whole, rest = divmod(length, L)
    hidden = whole * L * (L - 1) // 2 + rest * (rest - 1) // 2
    lookups = length + (whole * L if update == "delta" else 0)
    empty = L * (2 if update == "delta" else 1)
    extra = B * 4 * (hidden * 2 * 16 + empty * 2 * 64 + lookups * 2 * 8)
    cost = Infini(plan(length, shape=OPT, update=update))
    assert cost.mixing().operations == done - extra


# bytes of real states and caches


def held(*tensors: torch.Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def test_bytes_of_a_cache_of_keys_and_values() -> None:
    cache = transformers.DynamicCache()
    with torch.no_grad():
        tiny()(models.tokens(B, 23), past_key_values=cache)
    real = sum(held(layer.keys, layer.values) for layer in cache.layers)
    assert B * Full(plan(23)).cache_bytes() == real


@pytest.mark.parametrize("window", [{}, {"lookback": 1}, {"sinks": 3}, {"lookback": 1, "sinks": 3}], ids=str)
@pytest.mark.parametrize("length", [26, 3])
def test_bytes_of_a_converted_models_cache(length: int, window: dict[str, int]) -> None:
    model = segattn.convert(models.make(), segment_len=L, **window)
    cache = segattn.InfiniCache(model)
    with torch.no_grad():
        model(models.tokens(B, length), past_key_values=cache)
    # as long as it takes to keep as much as there ever will be
    cost = Infini(plan(max(length, 1 + 2 * L), **window))
    assert B * (cost.state_bytes() + cost.cache_bytes()) == cache.max_bytes
    other = Local(plan(100, **window))
    assert other.cache_bytes() == 2 * 2 * 16 * 4 * ((1 + window.get("lookback", 0)) * L + window.get("sinks", 0))
    for scheme in (Recurrent, Associative):
        assert scheme(plan(100, **window)).cache_bytes() == scheme(plan(100)).cache_bytes()
        assert scheme(plan(100, **window)).decoding() == scheme(plan(100)).decoding()


def test_bytes_of_a_recurrent_memory() -> None:
    with torch.no_grad():
        state = RecurrentMemory(tiny(), M, L)(models.tokens(B, 23)).state
    cost = Recurrent(plan(23))
    assert B * cost.state_bytes() == held(state.memory)
    # of a segment and the memory at either end
    assert cost.cache_bytes() == 2 * 2 * (L + 2 * M) * 16 * 4


def test_bytes_of_an_associative_memory() -> None:
    with torch.no_grad():
        state = AssociativeMemory(tiny(), M, L, d_mem=4)(models.tokens(B, 23)).state
    assert B * Associative(plan(23)).state_bytes() == sum(held(*memory) for memory in state.memories)


def test_a_llama_of_8b_keeps_what_was_worked_out_by_hand() -> None:
    million = PlanSettings(SHAPES["llama-3-8b"], 2**20)
    assert Full(million).cache_bytes() == 2**20 * 128 * 2**10
    assert Infini(million).state_bytes() == 32 * 8 * 128 * 129 * 4
    # half as much again for the keys before rotation
    assert Local(million).cache_bytes() == 2048 * 128 * 2**10 == Infini(million).cache_bytes() * 2 // 3


def test_activations_are_the_tensors_that_autograd_saves() -> None:
    """All but the statistics of norms and the ids: a model whose element-wise steps keep nothing else."""
    model, ids, time = models.make("opt"), models.tokens(1, 23), 23
    model.set_attn_implementation("sdpa")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights and x.is_floating_point() and x.ndim:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten())
    statistics = 5 * 2 * time * 4
    real = sum(x.untyped_storage().nbytes() for x in saved.values())
    assert Full(plan(time, shape=OPT, batch=1)).activation_bytes() == real - statistics


# by hand, and laws


def test_bytes_of_products_by_hand() -> None:
    """One token, two bytes a number: every matrix, what goes in and out of each product, q, k, v and o of attention."""
    s, one = LLAMA, plan(1, batch=1, dtype="bfloat16")
    layer = 32 + 32 + 2 * 16 + 32 + 32 + 32 + 96 + 96 + 32
    assert Full(one).forward().bytes == 2 * (s.matrices + 2 * layer + 2 * (32 + 16 + 16 + 32) + 32 + 61)
    assert s.matrices == 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 61


def test_decoding_is_reading_one_by_one() -> None:
    """Of a text of one segment, single tokens add up to the products of the whole, memory's end of segment included."""
    for scheme in (Full, Local, Infini, Recurrent, Associative):
        cost = scheme(plan(L))
        assert cost.decoding().operations == cost.forward().operations, scheme.name
        assert cost.decoding().bytes > cost.forward().bytes


def test_decoding_deep_in_a_text_by_hand() -> None:
    deep = plan(4 * L, batch=1)
    seen = sum(range(3 * L + 1, 4 * L + 1))
    dense = L * 2 * LLAMA.matrices
    assert Full(deep).decoding().operations == dense + 2 * 4 * seen * 2 * 16
    local = 2 * 4 * L * (L + 1) // 2 * 2 * 16
    assert Local(deep).decoding().operations == dense + local
    # each token reads a memory of 8 by 8, each key is looked up and written
    memory = 2 * L * 2 * 64 * (4 + 2 * 2)
    assert Infini(deep).decoding().operations == dense + local + memory
    assert Infini(replace(deep, update="linear")).decoding().operations == dense + local + 2 * L * 2 * 64 * (4 + 2)
    # the state: read by each token, read and written once at the segment's end, with the keys and values
    state = 2 * 8 * 9 * 4
    more = 2 * ((L + 2) * state + 2 * L * 2 * 8 * 4)
    assert Infini(deep).decoding().bytes == Local(deep).decoding().bytes + more


def test_bytes_of_rmts_attention_by_hand() -> None:
    """Of one layer and sequence, four bytes a number: 64 of a row's query and output, 32 of its key and value."""
    cost, rows = Recurrent(plan(2 * L, batch=1)), 2 * (L + 2 * M)
    assert cost.mixing().bytes == 4 * rows * (64 + 32)
    # tokens see the memory and those before; read rows each other, write rows all
    seen = sum(M + t for t in range(1, L + 1)) + M + L + 2 * M
    assert cost.mixing_one_by_one().bytes == 4 * ((L + 2 * M) * 64 + seen * 32)


def test_bytes_of_armts_memory_by_hand() -> None:
    cost, rows, d = Associative(plan(2 * L, batch=1)), 2 * (L + M), 32
    state, projections = 24 * (d + 1), d * (2 * 4 + d + 1)
    # the second segment is read into and out of, two are written; a state is written twice and read once
    memory = rows // 2 * 2 * d + 2 * M * d + projections + 3 * state
    assert cost.mixing().bytes == 4 * (rows * (64 + 32) + memory)
    # every token and the memory tokens' pass read the state and the query's projection; once a new state is written
    seen = L * (L + 1) // 2 + L + M
    memory = (L + M) * 2 * d + M * d + L * d * 4 + projections + (L + 2) * state
    assert cost.mixing_one_by_one().bytes == 4 * ((L + M) * 64 + seen * 32 + memory)


def test_attention_in_segments_is_that_of_the_floors() -> None:
    sizes = Sizes(B, 4, 2, 23, 8, 8, L, 4)
    assert Local(plan(23)).mixing() == floors.local_forward(sizes)
    assert Infini(plan(23)).mixing() == floors.forward(sizes, "delta")


def test_weights_are_read_once_a_pass() -> None:
    """They are the bytes that do not grow with the batch; those of the head are read for rows with logits alone."""

    def weights(scheme: type[Full], work: Callable[[Full], floors.Work]) -> int:
        return 2 * work(scheme(plan(4 * L))).bytes - work(scheme(plan(4 * L, batch=2 * B))).bytes

    layers, head = 4 * 2 * LLAMA.layer_matrices, 4 * LLAMA.head
    assert weights(Full, Full.forward) == layers + head
    assert weights(Full, Full.decoding) == L * (layers + head)
    # rmt once a segment; and once more in each for the write tokens
    assert weights(Recurrent, Full.forward) == 4 * (layers + head)
    assert weights(Recurrent, lambda cost: cost.forward(logits=1)) == 4 * layers + head
    assert weights(Recurrent, Full.decoding) == (L + 1) * layers + L * head


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_more_of_anything_costs_more(scheme: type[Full]) -> None:
    costs = [scheme(plan(length)) for length in (1, 4, 5, 6, 10, 11, 64, 1000, 2**21)]
    for shorter, longer in pairwise(costs):
        assert shorter.forward().operations < longer.forward().operations
        assert shorter.forward().bytes < longer.forward().bytes
        assert shorter.activation_bytes() < longer.activation_bytes()
        assert shorter.checkpointed_bytes() < longer.checkpointed_bytes()
        assert shorter.cache_bytes() <= longer.cache_bytes()
    assert scheme(plan(64, batch=4)).forward().operations * 3 == scheme(plan(64)).forward().operations * 4
    long = plan(4096, segment_len=256)
    assert scheme(long).checkpointed_bytes() < scheme(long).activation_bytes()


@pytest.mark.parametrize("scheme", [Local, Infini, Recurrent, Associative], ids=lambda scheme: scheme.name)
def test_what_is_kept_does_not_grow_beyond_a_segment(scheme: type[Full]) -> None:
    kept = {(scheme(plan(n)).state_bytes(), scheme(plan(n)).cache_bytes()) for n in (L, 64, 2**20)}
    assert len(kept) == 1
    long = [scheme(plan(n)).decoding().operations for n in (64 * L, 2**14 * L)]
    assert long[0] == long[1]


@pytest.mark.parametrize("scheme", [Local, Infini, Recurrent, Associative], ids=lambda scheme: scheme.name)
def test_gradients_that_end_early_hold_as_much_as_a_shorter_text(scheme: type[Full]) -> None:
    cut = scheme(plan(100, bptt=3))
    assert cut.activation_bytes() == scheme(plan(3 * L)).activation_bytes()
    assert cut.checkpointed_bytes() == scheme(plan(3 * L)).checkpointed_bytes()
    assert Full(plan(100, bptt=3)).activation_bytes() == Full(plan(100)).activation_bytes()


def test_states_of_every_segment_are_held_in_training() -> None:
    def growth(scheme: type[Full]) -> int:
        """Of a sequence's activations by two more segments."""
        return scheme(plan(6 * L)).activation_bytes() - scheme(plan(4 * L)).activation_bytes()

    # and the queries and keys before rotation
    assert growth(Infini) == growth(Local) + 2 * Infini(plan(L)).state_bytes() + 2 * 2 * L * (32 + 16) * 4
    row = (4 * 32 + 2 * 32 + 2 * 16 + 3 * 48) * 4 + 4 * 4
    assert growth(Recurrent) == growth(Local) + 2 * 2 * 2 * M * row
    # each row's input before it reads, and query; each memory token's key, value and what that replaces
    memory = 2 * 2 * 4 * ((L + M) * (32 + 4) + M * (4 + 32 + 32)) + 2 * Associative(plan(L)).state_bytes()
    assert growth(Associative) == growth(Local) + 2 * 2 * M * row + memory


def test_what_is_computed_again_is_held_for_one_layer() -> None:
    """Of the whole text, but of one segment where a segment goes through all layers before the next."""

    def growth(scheme: type[Full]) -> int:
        return scheme(plan(6 * L)).checkpointed_bytes() - scheme(plan(4 * L)).checkpointed_bytes()

    def layer(scheme: type[Full]) -> int:
        cost = scheme(plan(L))
        return cost.layer_bytes(2 * L)

    logits = 2 * L * (61 * 4 + 2 * 32 * 4)
    assert growth(Full) == 2 * 2 * L * 32 * 4 + layer(Full) + logits
    assert growth(Infini) == 2 * 2 * L * 32 * 4 + layer(Infini) + logits
    assert growth(Recurrent) == 2 * 2 * (L + 2 * M) * 32 * 4 + logits
    assert growth(Associative) == 2 * 2 * (L + M) * 32 * 4 + logits + 2 * Associative(plan(L)).state_bytes()


def test_the_saving_and_the_floor_are_what_they_say() -> None:
    rows = estimates([plan(23), plan(1000)], PEAK)
    assert [row["scheme"] for row in rows] == [scheme.name for scheme in SCHEMES] * 2
    full = rows[len(SCHEMES)]
    for row in rows[len(SCHEMES) :]:
        assert row["flops_saving"] * row["forward_flops"] == pytest.approx(full["forward_flops"])
        assert row["forward_floor_s"] == max(row["forward_flops"] / 1e15, row["forward_bytes"] / 3e12)
        # for so small a model both of a token's ways take its bytes
        assert row["decode_floor_s_per_token"] == pytest.approx(row["decode_bytes_per_token"] / 3e12)
        cost = next(scheme for scheme in SCHEMES if scheme.name == row["scheme"])(plan(1000))
        assert row["prefill_floor_s"] == floors.seconds(cost.forward(logits=1), PEAK) < row["forward_floor_s"]


def test_gpus_are_found_by_row_and_by_driver() -> None:
    assert [gpu_of(row) for row, _, _ in PEAKS] == [(row, peak) for row, _, peak in PEAKS]
    assert gpu_of("NVIDIA H100 80GB HBM3")[0] == gpu_of("h100")[0] == "H100 SXM"
    with pytest.raises(SettingError, match=r"gpu must be one of A100 40GB, .*got 'A100'"):
        gpu_of("A100")


# what ranks send

SPLIT = Split(LLAMA, length=64, ranks=4, segment_len=8)


def test_traffic_by_hand() -> None:
    sent = {name: exchange(SPLIT) for name, exchange in EXCHANGES.items()}
    # blocks of 16 tokens' keys and values of 2 heads of 8; 3 hops, 3 more, and 4 of their gradients
    assert sent["ring"] == Traffic(10 * 16 * 2 * 2 * 8 * 2, 7)
    # q, o, and k, v of as many heads as ranks; three quarters leave; twice
    assert sent["ulysses"] == Traffic(2 * 16 * 2 * (4 + 4) * 8 * 3 // 4 * 2, 4)
    state = held(*segattn.MemoryState.zeros(1, 2, 8, 8))
    # sums, and gradients of the states before
    assert sent["linear"] == Traffic(3 * 2 * state, 6)
    assert sent["linear scan"] == Traffic(2 * 2 * state, 4)
    # and K × K of the maps with both
    assert sent["delta"] == Traffic(3 * 2 * (state + 2 * 8 * 8 * 4), 12)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_traffic_is_what_sequence_parallel_attention_gathers(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = pytest.importorskip("segattn.kernels.sequence_parallel")
    sent: list[int] = []

    def gather(ranks: Any, x: torch.Tensor) -> torch.Tensor:
        sent.append(x.nbytes)
        return x.detach().expand(ranks.size, *x.shape)

    monkeypatch.setattr(parallel.Ranks, "gather", gather)
    q = torch.randn(1, 4, 16, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(2))
    ranks = parallel.Ranks(None, 1, 4)
    out, _ = parallel.sequence_parallel_attention(
        q, k, v, group=ranks, segment_len=8, gate=torch.zeros(4), update=update, want_state=False, check_ranks=False
    )
    out.sum().backward()
    # in a ring, what each rank has passes three others
    assert EXCHANGES[update](SPLIT) == Traffic(3 * sum(sent), 3 * len(sent))


def test_one_rank_sends_nothing() -> None:
    assert {exchange(replace(SPLIT, ranks=1)) for exchange in EXCHANGES.values()} == {Traffic(0, 0)}


def test_the_rank_with_most_tokens_counts() -> None:
    ring = EXCHANGES["ring"]
    assert ring(replace(SPLIT, length=65)) == ring(replace(SPLIT, length=68)) != ring(SPLIT)


def test_states_do_not_grow_with_the_text_and_keys_do() -> None:
    for name, exchange in EXCHANGES.items():
        short, long = exchange(SPLIT), exchange(replace(SPLIT, length=640))
        assert short is not None
        assert long is not None
        assert long.bytes == short.bytes * (10 if name in ("ring", "ulysses") else 1)


@pytest.mark.parametrize(("heads", "groups", "ranks"), [(24, 8, 3), (24, 8, 4), (24, 4, 6), (12, 2, 6), (6, 6, 2)])
def test_ulysses_sends_a_key_head_to_every_rank_that_reads_it(heads: int, groups: int, ranks: int) -> None:
    read = {(head * ranks // heads, head * groups // heads) for head in range(heads)}
    shape = replace(LLAMA, heads=heads, kv_heads=groups)
    sent = EXCHANGES["ulysses"](replace(SPLIT, shape=shape, ranks=ranks, length=16 * ranks))
    numbers = 16 * 2 * (heads + len(read)) * shape.head_width
    assert sent == Traffic(2 * numbers * (ranks - 1) // ranks * 2, 4)


def test_where_a_scheme_ends() -> None:
    def works(**changes: Any) -> set[str]:
        return {name for name, exchange in EXCHANGES.items() if exchange(replace(SPLIT, **changes)) is not None}

    assert works() == set(EXCHANGES)
    # 4 query heads
    assert works(ranks=8) == set(EXCHANGES) - {"ulysses"}
    assert works(ranks=3) == set(EXCHANGES) - {"ulysses"}
    # 8 segments, and a ninth that is not whole, and 64 tokens
    assert works(ranks=9) == {"ring"}
    assert works(ranks=9, length=65) == set(EXCHANGES) - {"ulysses"}
    assert works(ranks=65) == set()


def test_links() -> None:
    links = Links(node_ranks=4, node_bandwidth=100.0, bandwidth=10.0, latency=2.0)
    assert links.seconds(Traffic(1000, 3), 4) == 10 + 6
    assert links.seconds(Traffic(1000, 3), 5) == 100 + 6
    rows = exchanges(LLAMA, [64], [1, 4, 9], 8, "bfloat16", links)
    assert [row["bytes"]["linear"] is None for row in rows] == [False, False, True]
    assert rows[1]["seconds"]["ring"] == rows[1]["bytes"]["ring"] / 100 + 7 * 2
    assert rows[2]["seconds"]["delta"] is None


# bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("opt-1b", "one of opt-125m, .*got 'opt-1b'"),
        ("layers=2,width=32,heads=4", "numbers with vocabulary"),
        ("layers=2,width=30,heads=4,vocabulary=7", "width a multiple of heads"),
        ("layers=2,width=32,heads=4,kv_heads=3,vocabulary=7", "heads a multiple of kv_heads"),
        ("layers=0,width=32,heads=4,vocabulary=7", "layers at least 1"),
        ("layers=2,width=32,heads=0,vocabulary=7", "heads at least 1"),
        ("layers=-2,width=32,heads=4,vocabulary=7", "numbers of layers"),
        ("layers=2,depth=3", "numbers of layers"),
        ("layers=2,width=32,heads=4,vocabulary=7,gated=2", "gated and rotary 0 or 1"),
    ],
)
def test_shapes_that_cannot_be(given: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        shape_of(given)


# experts, or projections through narrower ones
OTHER_LAYERS = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "llama4_text", "deepseek_v3", "gpt_oss", "mimo_v2_flash"),
)


@pytest.mark.parametrize("name", [name for name in models.TAKEN if name not in OTHER_LAYERS])
def test_a_models_folder_has_the_sizes_of_its_matrices(name: str, tmp_path: Path) -> None:
    model: Any = models.make(name)
    model.config.save_pretrained(tmp_path / "tiny")
    shape = shape_of(str(tmp_path / "tiny"))
    assert shape == shape_of(str(tmp_path / "tiny" / "config.json"))
    assert shape.name == "tiny"
    tables = {id(x.weight) for x in model.modules() if isinstance(x, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    # norms of queries and keys have a row for each head
    matrices = [
        x
        for at, x in model.named_parameters()
        if x.ndim == 2 and (id(x) not in tables or x is head) and "norm" not in at
    ]
    assert shape.matrices == sum(x.numel() for x in matrices)
    assert (shape.layers, shape.width, shape.heads) == (2, 32, 4)
    assert shape.kv_heads == getattr(model.config, "num_key_value_heads", {"gpt_bigcode": 1, "falcon": 1}.get(name, 4))
    assert shape.rotary == any("rotary" in at for at, _ in model.named_modules())


@pytest.mark.parametrize("name", [name for name in models.TAKEN if name in OTHER_LAYERS])
def test_layers_of_another_kind_have_no_shape(name: str, tmp_path: Path) -> None:
    models.make(name).config.save_pretrained(tmp_path)
    with pytest.raises(SettingError, match=r"layers that are alike, each of q, k, v and output .*; got .*ForCausalLM"):
        shape_of(str(tmp_path))


def test_what_a_configuration_leaves_out_is_what_its_class_takes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 50}))
    numbers = "layers=3,width=4096,heads=32,ff=11008,vocabulary=50,gated=1,rotary=1"
    assert shape_of(str(path)) == replace(shape_of(numbers), name=tmp_path.name)


def test_of_a_model_of_several_modalities_the_language_model_counts(tmp_path: Path) -> None:
    text = models.make("gemma3_text").config
    (tmp_path / "text").mkdir()
    text.save_pretrained(tmp_path / "text")
    transformers.Gemma3Config(text_config=text).save_pretrained(tmp_path / "both")
    both = shape_of(str(tmp_path / "both"))
    assert replace(both, name="text") == shape_of(str(tmp_path / "text"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": "many"}, "a configuration of a causal language model that transformers knows, or numbers; got"),
        (
            {"num_attention_heads": 5, "head_dim": None},
            "a configuration of a causal language model .*; got .*of llama: ",
        ),
        ({"num_hidden_layers": 10**9}, "it must have 1 to 10000 layers, got 1000000000, and 4 heads"),
        ({"hidden_size": 10**18}, "a configuration of a causal language model"),
        ({"model_type": "unheard-of"}, "that transformers knows, or numbers; got .* of unheard-of: The checkpoint"),
        ({"model_type": "t5"}, "a causal language model .* of t5: "),
        ({"model_type": "mamba"}, "layers that are alike, .* or numbers; got .* of MambaForCausalLM"),
        ({"model_type": None}, "a model's config.json, with its model_type; got"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    entries = models.make("llama").config.to_dict() | changes
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))
    with pytest.raises(SettingError, match=f"shape must be .*{said}"):
        shape_of(str(tmp_path))
    path.write_text("{")
    with pytest.raises(SettingError, match=r"shape must be a model's config\.json"):
        shape_of(str(path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"memory": 6}, "memory must be at most the 5 tokens of a segment, got 6"),
        ({"memory": 0}, "memory must be at least 1"),
        ({"bptt": 0}, "bptt must be at least 1"),
        ({"update": "gated"}, "update must be delta or linear, got 'gated'"),
        ({"dtype": "int8"}, "dtype must be bfloat16 or float16 or float32"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        plan(**({"length": 9} | changes))


@pytest.mark.parametrize(
    "changes", [{"bandwidth": 0.0}, {"node_bandwidth": float("inf")}, {"latency": -1.0}, {"node_ranks": 0}]
)
def test_links_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"{next(iter(changes))} must"):
        Links(**changes)


# the command


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == status, done.output
    return done.output


SMALL = ("layers=2,width=32,heads=4,vocabulary=61", "--segment-len", "64", "--memory", "4", "--d-mem", "8")


def test_the_plan_is_written_and_drawn(tmp_path: Path) -> None:
    json_file, png = tmp_path / "plan.json", tmp_path / "plan.png"
    text = run(*SMALL, "--length", "1K,64", "--gpu", "H200", "--formulas", "--json", str(json_file), "--png", str(png))
    document = json.loads(json_file.read_text(encoding="utf-8"))
    assert document["gpu"] == "H200"
    assert document["shape"]["matrices"] == 2 * 12 * 32 * 32 + 32 * 61
    wanted = [PlanSettings(shape_of(SMALL[0]), n, segment_len=64, memory=4, d_mem=8) for n in (64, 1024)]
    assert document["estimates"] == estimates(wanted, gpu_of("H200")[1])
    assert png.read_bytes().startswith(b"\x89PNG")
    for formula in (*document["formulas"], LETTERS):
        assert formula in text
    saving = document["estimates"][SCHEMES.index(Infini) + len(SCHEMES)]["flops_saving"]
    assert f"{saving:.2f} ×" in text


def test_the_models_name_is_all_that_is_needed() -> None:
    assert run("opt-125m") == run("model", "opt-125m")
    assert "llama-3-8b" in run("--length", "4096")
    assert "llama-3-8b" in run()
    assert "exchange" in run("--help")
    # the short form's options are those of `model`
    assert "segattn plan model --help" in " ".join(run("--help").replace("│", " ").split())


@pytest.mark.parametrize("command", [SMALL, ("exchange",), ("published",)])
def test_formulas_are_printed_where_they_are_wanted(command: tuple[str, ...]) -> None:
    short, long = run(*command).splitlines(), run(*command, "--formulas").splitlines()
    assert short[-1] == "--formulas prints how these figures are computed"
    assert long[: len(short) - 1] == short[:-1]
    assert len(long) > len(short)


def test_exchanges_are_written_and_drawn(tmp_path: Path) -> None:
    json_file, png = tmp_path / "sent.json", tmp_path / "sent.png"
    files = ("--json", str(json_file), "--png", str(png))
    text = run("exchange", "opt-125m", "--length", "32K", "--ranks", "16,2", "--bandwidth", "25", *files)
    document = json.loads(json_file.read_text(encoding="utf-8"))
    links = Links(bandwidth=25e9)
    assert document["links"] == vars(links)
    assert document["exchanges"] == exchanges(SHAPES["opt-125m"], [2**15], [2, 16], 2048, "bfloat16", links)
    assert in_bytes(document["exchanges"][1]["bytes"]["delta"]) in text
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_largest_that_is_taken_is_planned() -> None:
    most = "999999999999999"
    shape = f"layers={most},width={most},heads=1,vocabulary={most}"
    sizes = [f"--{name}={most}" for name in ("length", "segment-len", "memory", "d-mem", "nu", "batch", "bptt")]
    assert "ZFLOP" in run(shape, *sizes)
    assert "PiB" in run("exchange", shape, f"--length={most}", f"--ranks={most}", f"--segment-len={most}")


def test_float32_is_said_to_have_the_peak_of_bfloat16(tmp_path: Path) -> None:
    texts = {}
    for dtype in ("float32", "bfloat16"):
        texts[dtype] = run(*SMALL, "--dtype", dtype, "--json", str(tmp_path / dtype))
        formulas = json.loads((tmp_path / dtype).read_text(encoding="utf-8"))["formulas"]
        assert (SLOWER_PRODUCTS in formulas) == (SLOWER_PRODUCTS in texts[dtype]) == (dtype == "float32")
    assert "float32, floors on H100 SXM by its bfloat16 peak" in texts["float32"]
    assert "by its bfloat16 peak" not in texts["bfloat16"]


def test_no_cell_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run("published")
    for words in ("Transformer-XL", "Memorizing Transformers", "(K + V) H (65 000 + N l)", "Infini-attention"):
        assert words in text
    # nor is it where a terminal has no room for it
    rows = estimates([plan(10**14)], PEAK)
    tables = plan_command._memory_table(published.memories()), plan_command._table("", rows, plan_command.COSTS)
    for table in tables:
        console = Console(width=50, file=io.StringIO())
        console.print(table)
        assert "…" not in console.file.getvalue()


def test_published_figures_are_shown(tmp_path: Path) -> None:
    json_file, png = tmp_path / "papers.json", tmp_path / "papers.png"
    text = run("published", "--json", str(json_file), "--png", str(png))
    for figure in ("294.77", "282.89", "29.31", "28.20", "1,585,152"):
        assert figure in text
    assert json.loads(json_file.read_text(encoding="utf-8"))["savings"] == published.savings()
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["opt-1b"], "SHAPE must be one of"),
        (["--length", "4Q"], "--length must be numbers from 1 on with commas"),
        (["--length", "0"], "--length must be numbers from 1 on with commas, as 4096,32K,1M, got '0'"),
        (["--length", "9" * 400], "--length must be numbers of at most 15 digits, got one of 400"),
        (["--length", "9" * 5000], "--length must be numbers of at most 15 digits, got one of 5000"),
        (["--length", "999999999999999M"], "--length must be at most 1,000,000,000,000,000, got more"),
        (["--batch", "9" * 400], "--batch must be at most 1,000,000,000,000,000, got more"),
        ([f"layers=2,width={'9' * 400},heads=4,vocabulary=61"], "SHAPE must be numbers of at most"),
        (["exchange", "--segment-len", "9" * 400], "--segment-len must be at most"),
        (["exchange", "--ranks", "0"], "--ranks must be numbers from 1 on with commas, as 2,8,64, got '0'"),
        (["--segment-len", "0"], "--segment-len must be at least 1, got 0"),
        (["--gpu", "A100"], "--gpu must be one of"),
        (["exchange", "--ranks", "2,-1"], "--ranks must be numbers"),
        (["exchange", "--latency", "-1"], "--latency must not be negative"),
        (["exchange", "--dtype", "int8"], "--dtype must be"),
        (["published", "--json", "/nowhere/at/all.json"], "--json must be a file in a folder that exists"),
        (["--png", "."], "--png must be a file"),
        (["--json", "x" * 300], f"--json must be a file that can be written, got '{'x' * 300}' (File name too long)"),
        (["--png", "x" * 300 + ".png"], "--png must be a file that can be written, got 'xxx"),
        (["--png", "plan.xyz"], "--png must end in one of ."),
        (["/nowhere/at/all"], "SHAPE must be one of"),
        (
            ["."],
            "SHAPE must be a model's folder, with a config.json that can be read (No such file or directory); got '.'",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments: list[str], said: str) -> None:
    text = run(*arguments, status=2)
    assert said in text
    assert len(text.splitlines()) == 1


# pictures


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_the_plans_picture_has_its_figures() -> None:
    rows = estimates([plan(23), plan(1000)], PEAK)
    panels = plots.plan_figure(rows, "title").axes
    for axes, name in zip(panels, ("forward_flops", "prefill_floor_s", "decode_floor_s_per_token"), strict=False):
        for scheme, line in lines_of(axes).items():
            assert line == ([23, 1000], [row[name] for row in rows if row["scheme"] == scheme])
    kept = [row["state_bytes"] + row["cache_bytes"] for row in rows if row["scheme"] == "armt"]
    assert lines_of(panels[3])["armt"] == ([23, 1000], kept)
    assert len(lines_of(panels[4])) == len(SCHEMES)


def test_the_savings_picture_has_its_figures() -> None:
    axes = plots.savings_figure(published.savings()).axes[0]
    solid = {name: line for name, line in lines_of(axes).items() if not name.startswith("_")}
    assert len(solid) == 9
    tokens, ratios = solid["opt-125m, at last 294.8 ×"]
    assert (tokens[0], tokens[-1]) == (512, 2_097_152)
    assert ratios == published.savings()[0]["saving"]
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert list(dotted[-1].get_ydata()) == published.savings()[-1]["saving_with_memory"]


def test_the_exchange_picture_leaves_out_what_cannot_be() -> None:
    rows = exchanges(LLAMA, [64, 128], [2, 4, 16], 8, "bfloat16", Links())
    left, right = plots.exchange_figure(rows, "title").axes
    # of the longer text
    lines = lines_of(left)
    longer = [row for row in rows if row["length"] == 128]
    assert lines["ulysses"] == ([2, 4], [row["bytes"]["ulysses"] for row in longer[:2]])
    assert lines["delta"] == ([2, 4, 16], [row["bytes"]["delta"] for row in longer])
    assert lines_of(right)["ring"] == ([2, 4, 16], [row["seconds"]["ring"] for row in longer])


def test_units() -> None:
    assert [format_length(n) for n in (2**15, 3 * 2**20, 1000, 2**20 + 1)] == ["32K", "3M", "1,000", "1,048,577"]
    sizes = [in_bytes(x) for x in (0, 999, 1000, 1536, 2**41, None)]
    assert sizes == ["0 B", "999 B", "0.977 KiB", "1.5 KiB", "2 TiB", "–"]
    times = [in_seconds(x) for x in (0, 1.5e-9, 2.5e-5, 0.25, 90, 4321, None)]
    assert times == ["0 s", "1.5 ns", "25 µs", "250 ms", "90 s", "4,321 s", "–"]
    assert in_units(999.9e12, "FLOP") == "1 PFLOP"
