"""Converted models with a lookback, sinks, memory maps, and layers without a memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from models import CONFIGS, OPTIONS, VERSION, make, open_gates, tokens
from models import NAMES as ALL

import segattn
from segattn.infini.huggingface import interface
from segattn.infini.huggingface.pieces import backward_in_pieces
from segattn.infini.huggingface.settings import conversion_of
from segattn.kernels.attention import segment_attention

L = 8
TIME = 45
BOTH = {"lookback": 1, "sinks": 3}
# whose rotary embeddings differ: of all channels or a part, halves or neighbours, complex, of two kinds, none
NAMES = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi", "cohere2", "llama4_text", "smollm3")
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


def windowed(name: str = "llama", changes: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a converted model whose gates are open and whose maps are not the identity."""
    options = OPTIONS.get(name, {}) | BOTH | options
    model = segattn.convert(make(name, **(changes or {})), L, quiet=True, **options)
    open_gates(model)
    for parameter, x in model.named_parameters():
        if "segattn_memory" in parameter:
            torch.nn.init.normal_(x, std=0.1)
    return model


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments).logits


def in_pieces(model: Any, ids: Tensor, lengths: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Return the logits of a text in pieces, and the cache after it."""
    cache, outs, end = segattn.InfiniCache(model), [], 0
    with torch.no_grad():
        for piece in ids.split(lengths, dim=1):
            end += piece.shape[1]
            seen = None if mask is None else mask[:, :end]
            outs.append(model(piece, attention_mask=seen, past_key_values=cache, use_cache=True).logits)
    return torch.cat(outs, 1), cache


def close(x: Tensor, y: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_with_gates_closed_a_lookback_is_the_mask_of_two_segments(name: str) -> None:
    ids, position = tokens(2, TIME), torch.arange(TIME)
    behind = position[:, None] // L - position // L
    mask = (position[:, None] >= position) & (behind <= 1)
    plain = make(name)
    plain.config._attn_implementation = "eager"
    floats = torch.zeros(2, 1, TIME, TIME).masked_fill(~mask, torch.finfo(torch.float32).min)
    kinds = set(getattr(plain.config, "layer_types", None) or ())
    whole = logits(plain, ids, attention_mask=dict.fromkeys(kinds, floats) if len(kinds) > 1 else floats)
    model = segattn.convert(make(name), L, gate_init=-60, lookback=1, quiet=True, **OPTIONS.get(name, {}))
    close(logits(model, ids), whole)


def one_layer(name: str, **changes: Any) -> Any:
    kinds = {"layer_types": ["full_attention"]} if "layer_types" in CONFIGS[name][1] else {}
    return make(name, **{"num_hidden_layers": 1} | kinds | changes)


# without learnt positions, which cannot stand before a window, and queries that are scaled by their position
ROTARY = tuple(name for name in ALL if name not in ("gpt2", "opt", "gpt_bigcode", "ministral3"))
CASES = [(name, {}) for name in ROTARY] + [
    ("llama", {"rope_parameters": {"rope_theta": 1e4} | x}) for x in SCALED.values()
]


@pytest.mark.skipif(VERSION < (5, 0), reason="rotary embeddings are configured by other names")
@pytest.mark.parametrize("lookback", [0, 1])
@pytest.mark.parametrize(("name", "changes"), CASES, ids=[*ROTARY, *SCALED])
def test_a_segment_with_sinks_is_a_text_of_sinks_and_window(name: str, changes: dict[str, Any], lookback: int) -> None:
    """Read [sinks, window] as a text of its own by the plain model, for every segment: one layer sees no more."""
    sinks, ids = 3, tokens(2, TIME)
    plain = one_layer(name, **changes)
    model = segattn.convert(one_layer(name, **changes), L, gate_init=-60, lookback=lookback, sinks=sinks, quiet=True)
    read, cached = logits(model, ids), in_pieces(model, ids, [1, 9, 20, *[1] * 15])[0]
    for segment in range(-(-TIME // L)):
        begin, end = max(segment - lookback, 0) * L, min((segment + 1) * L, TIME)
        text = ids[:, begin:end] if begin == 0 else torch.cat([ids[:, :sinks], ids[:, begin:end]], 1)
        wanted = logits(plain, text)[:, -(end - segment * L) :]
        close(read[:, segment * L : end], wanted)
        close(cached[:, segment * L : end], wanted)


OPTION_SETS: dict[str, dict[str, Any]] = {
    "lookback": {"lookback": 1, "sinks": 0},
    "sinks": {"lookback": 0, "sinks": L, "update": "linear"},
    "both": {},
    "maps": {"memory_maps": True},
    "maps alone": {"lookback": 0, "sinks": 0, "memory_maps": True},
    "a layer without a memory": {"memory_layers": [-1]},
    "a layer not converted": {"layers": [0]},
    "a layer not converted, sinks": {"layers": [1], "lookback": 0, "memory_maps": True},
}


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
def test_pieces_padded_rows_and_packed_texts_equal_the_whole(options: dict[str, Any]) -> None:
    model = windowed("llama", **options)
    ids = tokens(2, TIME)
    whole = logits(model, ids)
    for lengths in ([1, 9, L, 27], [2 * L, 2 * L, TIME - 4 * L], [*[1] * 20, 25], [40, *[1] * 5]):
        close(in_pieces(model, ids, lengths)[0], whole)
    # rows whose memories begin at different columns, the last of which is too short to see a sink
    lengths = (TIME, TIME - 13, 5)
    rows = [tokens(1, n, seed) for seed, n in enumerate(lengths)]
    padded = torch.cat([torch.nn.functional.pad(row, (TIME - row.shape[1], 0)) for row in rows])
    mask = (torch.arange(TIME) >= TIME - torch.tensor(lengths)[:, None]).long()
    for read in (logits(model, padded, attention_mask=mask), in_pieces(model, padded, [14, 20, *[1] * 11], mask)[0]):
        for row, n, mine in zip(rows, lengths, read, strict=True):
            close(mine[TIME - n :], logits(model, row)[0])
    packed = torch.cat(rows, 1)
    bounds = torch.tensor([0, lengths[0], sum(lengths[:2]), sum(lengths)], dtype=torch.int32)
    read = logits(model, packed, cu_seq_lens_q=bounds, position_ids=None)[0]
    for row, mine in zip(rows, read.split(lengths), strict=True):
        close(mine, logits(model, row)[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_rotary_embedding_goes_through_a_cache(name: str) -> None:
    model, ids = windowed(name), tokens(2, TIME)
    close(in_pieces(model, ids, [3, 2 * L, 1, 1, 11, *[1] * 13])[0], logits(model, ids))


def test_positions_of_the_cache_stay_within_the_window_however_long_the_text() -> None:
    model, seen = windowed(), []
    model.model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    cache = in_pieces(model, tokens(1, 40 * L), [L] * 20 + [1] * 20 * L)[1]
    assert (min(int(x.min()) for x in seen), max(int(x.max()) for x in seen)) == (-L - 3, 2 * L - 1)
    size = cache.num_bytes
    again = in_pieces(model, tokens(1, 12 * L), [L] * 12)[1]
    assert again.num_bytes == size <= again.max_bytes
    short = in_pieces(model, tokens(1, 3), [3])[1]
    assert short.max_bytes == again.max_bytes


def test_a_layer_that_is_not_converted_leaves_the_others_as_they_were() -> None:
    ids, seen = tokens(2, TIME), []
    mask = torch.ones(2, TIME, dtype=torch.long)
    mask[0, :13] = 0
    for layers in ([0, 1], [0]):
        model = windowed(layers=layers)
        seen.append(model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states[1])
    close(seen[0][0, 13:], seen[1][0, 13:])
    close(seen[0][1], seen[1][1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_generation(name: str) -> None:
    model = windowed(name, memory_maps=True)
    options = {"max_new_tokens": 2 * L + 3, "min_new_tokens": 2 * L + 3, "do_sample": False, "pad_token_id": 0}
    for time in (1, 3 * L - 1):
        ids = tokens(2, time)
        new = model.generate(ids, **options)
        assert torch.equal(logits(model, new[:, :-1]).argmax(-1)[:, time - 1 :], new[:, time:])
    ids = tokens(2, L + 3)
    assert torch.equal(
        model.generate(ids, num_beams=3, **options), model.generate(ids, num_beams=3, use_cache=False, **options)
    )


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils.Cache, "activate_past_recording"),
    reason="needs a transformers that can take tokens back",
)
def test_assisted_decoding_changes_nothing() -> None:
    model, ids = windowed(), tokens(1, 9).repeat(1, 5)
    options = {"max_new_tokens": 2 * L + 3, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **options), plain)
    assert torch.equal(model.generate(ids, assistant_model=windowed(), **options), plain)


def test_tokens_taken_back() -> None:
    model, ids = windowed(), tokens(2, TIME)
    whole = logits(model, ids)
    for recording, most in ((False, 5), (True, 5 + L)):
        cache = segattn.InfiniCache(model)
        if recording:
            for layer in cache.layers:
                layer.activate_past_recording()
        with torch.no_grad():
            for piece in ids[:, : 3 * L + 5].split([L, 2 * L, 5], 1):
                model(piece, past_key_values=cache)
            with pytest.raises(ValueError, match=f"crop must take back at most the {most} tokens"):
                cache.layers[0].crop(-most - 1)
            for layer in cache.layers:
                layer.crop(-most)
            close(model(ids[:, 3 * L + 5 - most :], past_key_values=cache).logits, whole[:, 3 * L + 5 - most :])


def test_rows_of_a_cache_in_another_order() -> None:
    model, ids = windowed(), tokens(3, TIME)
    mask = (torch.arange(TIME) >= torch.tensor([0, 20, 11])[:, None]).long()
    whole = logits(model, ids, attention_mask=mask)
    cache = in_pieces(model, ids[:, :33], [33], mask)[1]
    order = torch.tensor([1, 1, 2])
    cache.copy().reorder_cache(torch.tensor([0, 1, 2]))
    cache.reorder_cache(order)
    with torch.no_grad():
        read = model(ids[order, 33:], attention_mask=mask[order], past_key_values=cache).logits
    close(read, whole[order, 33:])


@pytest.mark.parametrize("options", [{}, {"memory_maps": True, "memory_layers": [1]}, {"lookback": 0}])
def test_gradients_of_pieces_are_those_of_the_whole(options: dict[str, Any]) -> None:
    model, ids = windowed(**options).train(), tokens(2, TIME)

    def gradient() -> Tensor:
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return found

    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "segattn" in n)
    whole = gradient()
    for length in (2 * L, 11, 3):
        backward_in_pieces(model, ids, length)
        assert (gradient() - whole).norm() < 2e-5 * whole.norm()
    # a cut that changed nothing would be none
    backward_in_pieces(model, ids, 11, truncate=1)
    assert (gradient() - whole).norm() > 1e-3 * whole.norm()


def test_memory_maps_are_the_identity_at_first_and_only_the_memory_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, calls = tokens(2, TIME), []
    plain, model = windowed(), segattn.convert(make(), L, memory_maps=True, quiet=True, **BOTH)
    open_gates(model)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    sizes = {n: p.numel() for n, p in model.named_parameters() if "layers.0" in n and "segattn_memory" in n}
    assert list(sizes.values()) == [4 * 8 * 8, 4 * 8, 2 * 8 * 8, 2 * 8]

    def record(*args: Tensor, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return segment_attention(*args, **kwargs)

    monkeypatch.setattr(interface, "segment_attention", record)
    first = model.model.layers[0].self_attn
    for name in ("segattn_memory_q", "segattn_memory_k"):
        torch.nn.init.normal_(getattr(first, name).weight, std=0.1)
        torch.nn.init.normal_(getattr(first, name).bias)
    mapped = logits(model, ids)
    assert (mapped - logits(plain, ids)).abs().max() > 1e-2
    (args, kwargs), (plain_args, plain_kwargs) = calls[0], calls[2]
    for mine, wanted in zip(args, plain_args, strict=True):
        assert torch.equal(mine, wanted)
    assert torch.equal(kwargs["sink_k"], plain_kwargs["sink_k"])
    for which, heads in (("q", 4), ("k", 2)):
        x, change = plain_kwargs[f"memory_{which}"], getattr(first, f"segattn_memory_{which}")
        by_head = [x[:, h] + x[:, h] @ change.weight[h] + change.bias.view(heads, 8)[h] for h in range(heads)]
        close(kwargs[f"memory_{which}"], torch.stack(by_head, 1))


def test_a_layer_without_a_memory_has_no_gate_and_no_state_but_its_window() -> None:
    model, ids = windowed(memory_layers=[1], memory_maps=True), tokens(2, TIME)
    assert {n for n, _ in model.named_parameters() if "layers.0" in n and "segattn" in n} == set()
    assert "lookback=1, sinks=3" in str(model.model.layers[1].self_attn.segattn_gate)
    without, with_memory = in_pieces(model, ids, [TIME])[1].states.values()
    assert without.memory is None
    assert len(without.tensors()) == len(with_memory.tensors()) - 2
    other = windowed(memory_maps=True)
    other.load_state_dict(model.state_dict(), strict=False)
    torch.nn.init.constant_(other.model.layers[0].self_attn.segattn_gate.bias, -60)
    close(logits(model, ids), logits(other, ids))


@pytest.mark.parametrize("way", ["model", "gates", "gates of a converted one"])
def test_saved_and_loaded(way: str, tmp_path: Path) -> None:
    model, ids = windowed(memory_maps=True, memory_layers=[1]), tokens(2, TIME)
    if way == "model":
        segattn.save_pretrained(model, tmp_path)
        loaded = segattn.from_pretrained(tmp_path, quiet=True)
    else:
        segattn.save_gates(model, tmp_path / "gates")
        loaded = make()
        if way != "gates":
            segattn.convert(loaded, L, memory_maps=True, memory_layers=[-1], quiet=True, **BOTH)
        segattn.load_gates(loaded, tmp_path / "gates", quiet=True)
    assert conversion_of(loaded).settings == conversion_of(model).settings
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    plain = segattn.revert(loaded)
    assert not [n for n, _ in plain.named_modules() if "segattn" in n]
    assert torch.equal(logits(plain, ids), logits(make(), ids))


def test_an_entry_of_the_first_version_has_no_window_and_a_memory_in_every_layer(tmp_path: Path) -> None:
    model, ids = windowed(lookback=0, sinks=0), tokens(2, TIME)
    segattn.save_pretrained(model, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    entry = config["segment_attention"] | {"version": 1}
    for name in ("lookback", "sinks", "memory_maps", "memory_layers"):
        del entry[name]
    file.write_text(json.dumps(config | {"segment_attention": entry}))
    loaded = segattn.from_pretrained(tmp_path, quiet=True)
    assert conversion_of(loaded).settings == conversion_of(model).settings
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_maps_in_peft_are_trained_and_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kept = ["segattn_gate", "segattn_memory_q", "segattn_memory_k"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=kept)
    model, ids = peft.get_peft_model(windowed(memory_maps=True), config), tokens(2, TIME)
    groups = segattn.parameter_groups(model, 1e-1)
    matrices = {id(x) for x in groups[0]["params"]}
    trained = {n: x for n, x in model.named_parameters() if x.requires_grad and "segattn_memory" in n}
    assert len(trained) == 2 * 2 * 2
    assert all((id(x) in matrices) == n.endswith("weight") for n, x in trained.items())
    before = {n: x.detach().clone() for n, x in trained.items()}
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD(groups).step()
    assert all((x != before[n]).any() for n, x in trained.items())
    segattn.save_gates(model, tmp_path / "gates")
    held = safetensors_torch.load_file(tmp_path / "gates")
    mine = trained["base_model.model.model.layers.1.self_attn.segattn_memory_q.modules_to_save.default.weight"]
    assert torch.equal(held["1.segattn_memory_q.weight"], mine)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "gates"
    for saved, options in (({"memory_maps": True}, {}), ({}, {"memory_maps": True})):
        segattn.save_gates(windowed(**saved), file)
        with pytest.raises(ValueError, match=f"converted with memory_maps={bool(options)}, as this one is"):
            segattn.load_gates(windowed(**options), file)
    for name, value in (("lookback", 0), ("sinks", 2), ("memory_layers", [0])):
        with pytest.raises(ValueError, match=f"converted with {name}="):
            segattn.load_gates(windowed(**{name: value}), file)
    segattn.save_gates(windowed(memory_maps=True), file)
    held = safetensors_torch.load_file(file)
    key = "1.segattn_memory_k.weight"
    for change, message in (
        ({key: None}, r"must hold one gate and two memory maps .* lacks those of \[1\]"),
        ({key: torch.zeros(2, 4, 4)}, r"1.segattn_memory_k.weight must be of shape \[2, 8, 8\].*got \[2, 4, 4\]"),
        ({key: torch.full((2, 8, 8), torch.nan)}, "must hold finite numbers, got 128 that are not"),
    ):
        parts = {name: x for name, x in (held | change).items() if x is not None}
        with safetensors_torch.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        safetensors_torch.save_file(parts, tmp_path / "changed", metadata)
        model = make()
        with pytest.raises(ValueError, match=message):
            segattn.load_gates(model, tmp_path / "changed", quiet=True)
        assert not [n for n, _ in model.named_modules() if "segattn" in n]


def test_maps_stay_float32_in_a_model_that_is_cast() -> None:
    model, ids = windowed(memory_maps=True), tokens(2, TIME)
    wanted = logits(model, ids)
    half = model.bfloat16()
    assert {p.dtype for n, p in half.named_parameters() if "segattn" in n} == {torch.float32}
    read = in_pieces(half, ids, [5, 20, *[1] * 20])[0]
    assert read.dtype == torch.bfloat16
    assert (read.float() - wanted).norm() < 0.05 * wanted.norm()


def test_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    model = windowed(memory_maps=True, memory_layers=[1])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    # from the second length on, torch.compile takes lengths for symbols
    for time in (TIME, TIME - 8, 5):
        close(logits(compiled, tokens(2, time)), logits(model, tokens(2, time)))


def test_compiled_after_a_graph_with_breaks() -> None:
    torch._dynamo.reset()
    ids = tokens(2, TIME)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    # compiles layers one by one, after which torch.compile takes their indices for symbols
    logits(torch.compile(windowed(), backend="eager"), ids, attention_mask=mask)
    for name in ("layers", "memory_layers"):
        model = windowed(**{name: [1]})
        close(logits(torch.compile(model, backend="eager", fullgraph=True), ids), logits(model, ids))


def test_a_pass_that_reads_no_memory_is_warned_of() -> None:
    model = windowed().train()
    model(tokens(1, 2 * L + 1), use_cache=False)
    with pytest.warns(segattn.UntrainedMemoryWarning, match=rf"longer than \(1 \+ lookback\) · segment_len, {2 * L}"):
        model(tokens(1, 2 * L), use_cache=False)


def parallel(model: Any) -> None:
    with segattn.sequence_parallel(model, None):
        pass


STATIC: dict[str, dict[str, Any]] = {
    "both": {},
    "lookback": {"sinks": 0},
    "sinks": {"lookback": 0},
    "linear": {"update": "linear"},
    "maps": {"memory_maps": True},
    "layers": {"memory_layers": [1], "memory_maps": True},
    "neither, maps": {"lookback": 0, "sinks": 0, "memory_maps": True},
    "neither, layers": {"lookback": 0, "sinks": 0, "memory_layers": [0]},
    "one sink": {"sinks": 1},
    "a segment of sinks": {"sinks": L},
}


def with_static(model: Any, ids: Tensor, cache: Any, pieces: list[int], step: Any) -> Tensor:
    """Return the logits of a text in pieces, of which those of one token are steps of `step`."""
    outs = []
    for piece in ids.split(pieces, dim=1):
        outs.append((step if piece.shape[1] == 1 else model)(piece, past_key_values=cache).logits)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("options", STATIC.values(), ids=STATIC)
def test_a_static_cache_equals_the_whole_in_steps_and_pieces(options: dict[str, Any]) -> None:
    model, ids = windowed(**options), tokens(2, 63)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = segattn.StaticInfiniCache(model, 2)
        for pieces in ([1] * 63, [21, *[1] * 24, 5, *[1] * 13], [L, *[1] * L, L, *[1] * 39], [2, 61], [60, 1, 1, 1]):
            close(with_static(model, ids, cache, pieces, model), whole, 1e-4)
            mine = cache.states
            other = in_pieces(model, ids, [30, 33])[1]
            assert (cache.rows.folded, cache.rows.lengths) == (other.rows.folded, other.rows.lengths)
            for layer, state in other.states.items():
                for x, y in zip(mine[layer].tensors(), state.tensors(), strict=True):
                    close(x, y, 1e-4)
            cache.reset()


@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_of_every_kind_of_rotary_embedding(name: str) -> None:
    model, ids = windowed(name, memory_maps=True), tokens(2, 3 * L + 7)
    with torch.no_grad():
        found = with_static(model, ids, segattn.StaticInfiniCache(model, 2), [5, *[1] * (3 * L + 2)], model)
    close(found, logits(model, ids), 1e-4)


# the compiler is slow; the other embeddings are cosine and sine too
@pytest.mark.skipif(VERSION < (5, 0), reason="a static cache with a lookback compiles to no graph in transformers 4")
@pytest.mark.parametrize("name", ["llama", "llama4_text"])
def test_a_static_cache_compiles_to_one_graph_of_fixed_addresses(name: str) -> None:
    model, ids, graphs = windowed(name, memory_maps=True), tokens(2, 3 * L + 7), CompileCounter()
    torch._dynamo.reset()
    cache = segattn.StaticInfiniCache(model, 2)
    addresses = [x.data_ptr() for layer in cache.layers for x in layer.tensors()]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        close(with_static(model, ids, cache, [5, *[1] * (3 * L + 2)], compiled), logits(model, ids), 1e-4)
    assert [x.data_ptr() for layer in cache.layers for x in layer.tensors()] == addresses
    assert graphs.frame_count == 1


@pytest.mark.parametrize("options", [{}, {"lookback": 0, "memory_maps": True}, {"sinks": 0}], ids=str)
def test_generate_with_a_static_cache_of_padded_rows_and_beams(options: dict[str, Any]) -> None:
    model, ids = windowed(**options), tokens(2, 21)
    arguments = {"max_new_tokens": 3 * L, "do_sample": False, "pad_token_id": 0}
    for padding in (0, 6, 14, 18):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        static = segattn.StaticInfiniCache(model, 2)
        found = model.generate(ids, attention_mask=mask, past_key_values=static, **arguments)
        assert torch.equal(found, model.generate(ids, attention_mask=mask, **arguments))
        cache = segattn.InfiniCache(model)
        model.generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
        assert static.rows.folded == cache.rows.folded
    beams = model.generate(ids[:1], past_key_values=segattn.StaticInfiniCache(model, 3), num_beams=3, **arguments)
    assert torch.equal(beams, model.generate(ids[:1], num_beams=3, **arguments))


def test_bytes_of_a_static_cache() -> None:
    model, size = windowed(), 2 * 2 * 8 * 4  # rows, key heads, width, bytes
    # keys, keys before rotary embedding and values of two segments, keys and values of sinks, three memories
    each = size * (3 * 2 * L + 2 * 3) + 3 * 2 * 2 * (8 * 8 + 8) * 4
    assert segattn.StaticInfiniCache(model, 2).num_bytes == 2 * each


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lookback": (lambda: windowed(lookback=2), "lookback must be 0 or 1 segments, got 2"),
    "sinks": (lambda: windowed(sinks=L + 1), f"sinks must be at most segment_len = {L}, got {L + 1}"),
    "maps": (lambda: windowed(memory_maps=1), "memory_maps must be"),
    "no memory": (lambda: windowed(memory_layers=[]), "memory_layers must name at least one layer, got none"),
    "no such layer": (lambda: windowed(memory_layers=[2]), r"memory_layers must lie in \[-2, 2\), got 2"),
    "not converted": (lambda: windowed(layers=[0], memory_layers=[1]), r"among the converted layers \[0\], got \[1\]"),
    "learnt positions": (
        lambda: windowed("gpt2", lookback=0),
        "must be 0 for a model with learnt positions, got 0 and 3",
    ),
    "sequence parallel": (
        lambda: parallel(windowed()),
        "with lookback=0 and sinks=0 for sequence_parallel, got 1 and 3",
    ),
}


@pytest.mark.parametrize(("make_it", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make_it: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make_it()


@pytest.mark.skipif(VERSION < (5, 0), reason="rotary embeddings are configured by other names")
@pytest.mark.parametrize("options", [{"sinks": 0}, {"lookback": 0, "layers": [0]}, {"lookback": 0, "sinks": 3}])
def test_a_rotary_embedding_that_depends_on_the_length_of_a_call(options: dict[str, Any]) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    length = L + 2 if options.get("sinks") else 4 * L
    with pytest.raises(ValueError, match="where the model's 'dynamic' rotary embedding begins to depend on the length"):
        windowed("llama", {"rope_parameters": rope, "max_position_embeddings": length}, **options)


@pytest.mark.skipif("ministral3" not in ALL, reason="older transformers lack the type")
def test_queries_that_are_scaled_by_their_position() -> None:
    with pytest.raises(ValueError, match="convert every layer with lookback=0 and shorten segments to where it begins"):
        windowed("ministral3")
    model, ids = windowed("ministral3", lookback=0), tokens(2, TIME)
    close(in_pieces(model, ids, [9, *[1] * 20, 16])[0], logits(model, ids))


def test_a_model_whose_rotary_embedding_has_no_module() -> None:
    model = make()
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: [2 * part for part in forward(x, position_ids)]
    with pytest.raises(ValueError, match=re.escape("layers [0, 1] get a rotary embedding that no module")):
        segattn.convert(model, L, sinks=1, quiet=True)
