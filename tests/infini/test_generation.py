"""Reading and generating with caches: pieces, padded rows, beams, copies, tokens taken back, compiled steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

transformers = pytest.importorskip("transformers")

from calls import error
from models import CHOSEN, CONFIGS, NAMES, VERSION, converted, make, tokens

import segattn

L = 16
NEW = 2 * L + 3
# newer transformers can take tokens back
ROLLBACK = hasattr(transformers.cache_utils.Cache, "activate_past_recording")
# 5.0 says of every model that it cannot read a prompt in chunks without a cache
CHUNKS = () if VERSION == (5, 0) else ({"prefill_chunk_size": 7},)


def greedy(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **arguments)


def is_forced(model: Any, ids: Tensor, start: int) -> bool:
    """Return whether each token from `start` on is the likeliest after all before it, read at once without a cache."""
    with torch.no_grad():
        likeliest = model(ids[:, :-1], use_cache=False).logits.argmax(-1)
    return torch.equal(likeliest[:, start - 1 :], ids[:, start:])


def test_no_warning_of_positions_that_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(transformers.generation.stopping_criteria.logger, "warning_once", said.append)
    model, ids = make(max_position_embeddings=L), tokens(1, 2 * L)
    greedy(segattn.convert(model, L, quiet=True), ids)
    assert said == []
    # where a layer is not converted they run on
    segattn.convert(segattn.revert(model), L, layers=[0], quiet=True)
    greedy(model, ids)
    assert len(said) > 0


@pytest.mark.parametrize("name", NAMES)
def test_generate_equals_reading_it_all_again_for_every_token(name: str) -> None:
    model = converted(name)
    for time in (1, L - 1, L, 2 * L + 5):
        ids = tokens(2, time)
        assert is_forced(model, greedy(model, ids), time), time


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_any_sizes_equal_the_whole(name: str) -> None:
    model, ids = converted(name), tokens(2, 75)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, parts = segattn.InfiniCache(model), []
        for piece in ids.split([5, 1, 13, L, 1, 39], 1):
            answer = model(piece, past_key_values=cache)
            assert answer.past_key_values is cache
            parts.append(answer.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 75


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_row_generates_what_it_generates_alone(name: str) -> None:
    model, rows = converted(name), [tokens(1, 9, 1), tokens(1, 2 * L, 2), tokens(1, 41, 3)]
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([(torch.arange(width) >= width - row.shape[1]).long()[None] for row in rows])
    alone = [greedy(model, row)[0, row.shape[1] :] for row in rows]
    # what is cut where does not depend on the type
    for chunks in ({}, *CHUNKS) if name in CHOSEN else ({},):
        together = greedy(model, ids, attention_mask=mask, **chunks)
        for mine, wanted in zip(together, alone, strict=True):
            assert torch.equal(mine[width:], wanted)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_chunked_prefill(chunks: dict[str, int]) -> None:
    model, ids = converted(), tokens(1, 3 * L)
    assert torch.equal(greedy(model, ids, **chunks), greedy(model, ids))


@pytest.mark.parametrize("name", NAMES)
def test_beams_follow_their_own_memory(name: str) -> None:
    model, ids = converted(name), tokens(2, L + 3)
    best = model.generate(ids, max_new_tokens=L + 2, num_beams=3, do_sample=False, pad_token_id=0)
    without = model.generate(ids, max_new_tokens=L + 2, num_beams=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(best, without)


def test_samples_do_not_mix() -> None:
    model, ids = converted(), tokens(1, L + 3)
    arguments = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 4, "pad_token_id": 0}
    torch.manual_seed(1)
    mine = model.generate(ids, **arguments)
    torch.manual_seed(1)
    assert torch.equal(mine, model.generate(ids, use_cache=False, **arguments))
    assert len({tuple(row.tolist()) for row in mine}) > 1


@pytest.mark.parametrize("name", CHOSEN)
def test_a_conversation_goes_on_from_its_cache(name: str) -> None:
    model = converted(name)
    cache, ids = segattn.InfiniCache(model), tokens(1, 11)
    for turn in range(3):
        asked = ids.shape[1]
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=13, do_sample=False, pad_token_id=0)
        assert is_forced(model, ids, asked)
        ids = torch.cat([ids, tokens(1, 8, turn)], 1)


@pytest.mark.skipif(not ROLLBACK, reason="needs a transformers that can take tokens back")
@pytest.mark.parametrize("name", CHOSEN)
def test_prompt_lookup_and_an_assistant_change_nothing(name: str) -> None:
    model = converted(name)
    ids = tokens(1, 9).repeat(1, 5)
    plain = greedy(model, ids)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=5), plain)
    assert torch.equal(greedy(model, ids, assistant_model=make()), plain)
    assert torch.equal(greedy(model, ids, assistant_model=converted(name)), plain)


@pytest.mark.skipif(not ROLLBACK, reason="needs a transformers that can take tokens back")
def test_prompt_lookup_in_float64() -> None:
    model, ids = converted().double(), tokens(1, 9).repeat(1, 5)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=5), greedy(model, ids))


def test_a_prompt_that_holds_the_padding_token() -> None:
    model, ids = converted(), tokens(1, 40)
    ids[0, 7] = 0
    with pytest.raises(ValueError, match=r"holds pad_token_id: pass it attention_mask=torch\.ones_like\(input_ids\)"):
        greedy(model, ids)
    said = greedy(model, ids, attention_mask=torch.ones_like(ids))
    assert is_forced(model, said, 40)
    if ROLLBACK:
        # which transformers never passes the mask
        for assistant in (make(), converted()):
            arguments = {"attention_mask": torch.ones_like(ids), "assistant_model": assistant}
            assert torch.equal(greedy(model, ids, **arguments), said)


def test_tokens_taken_back_across_a_segments_edge() -> None:
    model, ids = converted(), tokens(1, 2 * L + 9)
    cache = segattn.InfiniCache(model)
    for layer in cache.layers:
        layer.activate_past_recording()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        model(ids[:, : L + 3], past_key_values=cache)
        model(tokens(1, L, 5), past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-L)
        rest = model(ids[:, L + 3 :], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, L + 3 :], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="crop must take back at most"):
        cache.layers[0].crop(-40)


def test_bytes_do_not_grow_with_the_text() -> None:
    model, held = converted(), []
    with torch.no_grad():
        for time in (4 * L, 64 * L, 1024 * L):
            cache = segattn.InfiniCache(model)
            for piece in tokens(1, time + 5).split(256 * L, 1):
                model(piece, past_key_values=cache, logits_to_keep=1)
            held.append((cache.num_bytes, cache.max_bytes))
    assert held[0] == held[1] == held[2]
    kept, most = held[0]
    # 2 layers; M and z of 2 heads, and three tails of 5 tokens, of 16 at most
    assert kept == 2 * 4 * 2 * (8 * 8 + 8 + 3 * 5 * 8)
    assert most == 2 * 4 * 2 * (8 * 8 + 8 + 3 * L * 8)


def test_layers_that_were_left_keep_their_own_cache() -> None:
    kinds = ["sliding_attention", "full_attention"]
    for model in (
        converted("gemma3_text", layer_types=kinds, sliding_window=8),
        segattn.convert(make(), L, layers=[0], quiet=True),
        segattn.convert(make(), L, layers=[1], quiet=True),
    ):
        ids = tokens(2, 41)
        assert is_forced(model, greedy(model, ids), 41)
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        padded = greedy(model, ids, attention_mask=mask)
        assert torch.equal(padded[0, 6:], greedy(model, ids[:1, 6:])[0])


def test_rows_taken_from_a_cache_go_on_as_they_were() -> None:
    model, ids = converted(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache = segattn.InfiniCache(model)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        # tails of 14 and 9 tokens
        model(ids[:, :14], attention_mask=mask[:, :14], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        rest = model(ids[1:, 14:], attention_mask=mask[1:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[1:, 14:], rtol=1e-4, atol=1e-4)


def test_a_cache_is_a_value_to_those_who_copy_it() -> None:
    model, ids = converted(), tokens(1, 40)
    cache = segattn.InfiniCache(model)
    with torch.no_grad():
        model(ids[:, :21], past_key_values=cache)
        other = cache.copy()
        first = model(ids[:, 21:], past_key_values=other).logits
        assert (cache.get_seq_length(), other.get_seq_length()) == (21, 40)
        assert torch.equal(model(ids[:, 21:], past_key_values=cache).logits, first)


def test_copies_that_take_tokens_back_do_not_write_into_each_other() -> None:
    model, ids = converted(), tokens(1, 15)
    cache = segattn.InfiniCache(model)
    with torch.no_grad():
        for token in ids[:, :8].split(1, 1):
            model(token, past_key_values=cache)
        other = cache.copy()
        for layer in cache.layers:
            layer.crop(-3)
        for token in tokens(1, 6, 9).split(1, 1):
            model(token, past_key_values=cache)
        rest = [model(token, past_key_values=other).logits for token in ids[:, 8:].split(1, 1)]
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(rest, 1), whole[:, 8:], rtol=1e-4, atol=1e-4)


def test_an_interrupted_pass_leaves_the_cache_as_it_was() -> None:
    model, ids = converted(), tokens(1, 40)
    cache = segattn.InfiniCache(model)
    with torch.no_grad():
        model(ids[:, :21], past_key_values=cache)
        wanted = model(ids[:, 21:], past_key_values=cache.copy()).logits
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 21:], past_key_values=cache)
        hook.remove()
        assert torch.equal(model(ids[:, 21:], past_key_values=cache).logits, wanted)


MODES = (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("made", range(len(MODES)))
@pytest.mark.parametrize("kind", ["of any size", "static"])
def test_a_cache_is_read_and_written_in_any_mode(kind: str, made: int) -> None:
    model, ids, parts = converted(), tokens(2, 2 * L + 5), []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        with MODES[made]():
            cache = segattn.StaticInfiniCache(model, 2) if kind == "static" else segattn.InfiniCache(model)
            model(ids[:, :2], past_key_values=cache)
        for time in range(2, ids.shape[1]):
            # three tokens in each mode, so that each writes where another has been
            with MODES[(made + time // 3) % len(MODES)]():
                parts.append(model(ids[:, time : time + 1], past_key_values=cache).logits.float())
    # that of autocast
    assert error(torch.cat(parts, 1), whole[:, 2:]) < 0.02


def test_generate_goes_on_from_a_cache_of_inference_mode() -> None:
    model, ids = converted(), tokens(1, 20)
    wanted, cache = greedy(model, ids), segattn.InfiniCache(model)
    with torch.inference_mode():
        model(ids[:, :16], past_key_values=cache)
        for time in range(16, 19):
            model(ids[:, time : time + 1], past_key_values=cache)
    assert torch.equal(greedy(model, ids, past_key_values=cache), wanted)


@pytest.mark.parametrize("trained", ["q_proj", "segattn_gate", "o_proj"])
def test_a_token_at_a_time_has_the_gradient_of_the_whole(trained: str) -> None:
    """Train what leaves the first layer's keys and values without gradients, as LoRA on the queries alone does."""
    model, ids, grads = converted(), tokens(1, 2 * L + 3), []
    model.requires_grad_(False)
    parameters = [parameter.requires_grad_() for name, parameter in model.named_parameters() if trained in name]
    for pieces in ([ids], ids.split(1, dim=1)):
        cache = segattn.InfiniCache(model)
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], 1)
        grads.append(torch.autograd.grad(logits.square().mean(), parameters))
    for found, wanted in zip(*grads, strict=True):
        assert error(found, wanted) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_equals_the_whole_eager_and_compiled(name: str) -> None:
    if name in ("opt", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss") and not ROLLBACK:
        pytest.skip("that of older transformers makes tensors as long as the text, or as the rows of an expert")
    # the compiler is slow, and the layers of most types are alike
    kinds = CONFIGS[name][1].get("layer_types", ["full_attention"])
    alike = len({*kinds}) == 1 and {"no_rope_layer_interval", "n_layer"}.isdisjoint(CONFIGS[name][1])
    one = {"num_hidden_layers": 1} | ({"layer_types": kinds[:1]} if "layer_types" in CONFIGS[name][1] else {})
    depth = one if alike and name not in CHOSEN else {}
    model = converted(name, L, "linear" if name == "phi3" else "delta", **depth)
    ids, graphs = tokens(2, 63), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for step in (model, compiled):
            cache = segattn.StaticInfiniCache(model, 2)
            first, again = ids[:, :21], ids[:, 45:50]
            parts = [model(first, past_key_values=cache).logits]
            parts += [step(ids[:, t : t + 1], past_key_values=cache, **at(t)).logits for t in range(21, 45)]
            parts += [model(again, past_key_values=cache).logits]
            parts += [step(ids[:, t : t + 1], past_key_values=cache, **at(t)).logits for t in range(50, 63)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1
    assert cache.get_seq_length() == 63


def at(t: int) -> dict[str, Tensor]:
    """Return the argument by which transformers 4 counts when it compiles."""
    return {} if ROLLBACK else {"cache_position": torch.tensor([t])}


@pytest.mark.parametrize("name", NAMES)
def test_generate_with_a_static_cache_of_padded_rows_and_beams(name: str) -> None:
    if name == "opt" and not ROLLBACK:
        pytest.skip("OPT of transformers 4 makes tensors as long as the text")
    model, ids = converted(name), tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    static = segattn.StaticInfiniCache(model, 2)
    assert torch.equal(
        greedy(model, ids, attention_mask=mask, past_key_values=static), greedy(model, ids, attention_mask=mask)
    )
    if name in CHOSEN:
        static.reset()
        assert torch.equal(greedy(model, ids, past_key_values=static), greedy(model, ids))
    arguments = {"max_new_tokens": L + 2, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    beams = model.generate(ids[:1], past_key_values=segattn.StaticInfiniCache(model, 3), **arguments)
    assert torch.equal(beams, model.generate(ids[:1], **arguments))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_static_cache_replays_in_a_cuda_graph() -> None:
    model = converted(hidden_size=64).cuda()
    ids = tokens(1, 3 * L).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, token = segattn.StaticInfiniCache(model), ids[:, :1].clone()
        model(token, past_key_values=cache)
        cache.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(token, past_key_values=cache).logits
        cache.reset()
        for t in range(3 * L):
            token.copy_(ids[:, t : t + 1])
            graph.replay()
            torch.testing.assert_close(out[:, 0], whole[:, t], rtol=1e-3, atol=1e-3)


def test_bad_static_caches() -> None:
    model = converted()
    with pytest.raises(ValueError, match="every layer converted for a static cache"):
        segattn.StaticInfiniCache(segattn.convert(make(), L, layers=[0], quiet=True))
    with pytest.raises(ValueError, match="batch size 2, as the input is, got 1"):
        model(tokens(2, 5), past_key_values=segattn.StaticInfiniCache(model, 1))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        segattn.StaticInfiniCache(model, 0)
    with pytest.raises(ValueError, match="must not be cropped"):
        segattn.StaticInfiniCache(model).crop(-1)
    mask = torch.ones(1, 5)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="padding on the right"):
        model(tokens(1, 5), attention_mask=mask, past_key_values=segattn.StaticInfiniCache(model, 1))
    cache = segattn.StaticInfiniCache(model, 1)
    for time in (1, 5):
        with pytest.raises(RuntimeError, match="gradients"):
            model(tokens(1, time), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", ["offloaded", "static", "offloaded_static", "quantized"])
def test_a_cache_by_name_is_refused_by_name(kind: str) -> None:
    model, ids = converted(), tokens(2, 20)
    plain = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="dynamic"), plain)
    with pytest.raises(ValueError, match=f"cache_implementation must be left out for a converted model, got '{kind}'"):
        model.generate(ids, cache_implementation=kind, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"cache_config must be left out for a converted model, got \{'nbits': 4\}"):
        model.generate(ids, cache_config={"nbits": 4}, max_new_tokens=2)
    model.generation_config.cache_implementation = kind
    with pytest.raises(ValueError, match="cache_implementation must be left out"):
        model.generate(ids, max_new_tokens=2)


def test_caches_that_cannot_be_used() -> None:
    model, ids = converted(), tokens(2, 20)
    for call in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match="must not generate with a paged cache"):
            call([[3, 4, 5]])
    plain = segattn.revert(converted())
    assert plain.init_continuous_batching.__func__ is type(plain).init_continuous_batching
    with torch.no_grad():
        static = transformers.StaticCache(config=model.config, max_cache_len=32)
        with pytest.raises(ValueError, match="got a StaticCache of 0 tokens"):
            model.generate(ids, past_key_values=static, max_new_tokens=2)
        full = make()(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="got a DynamicCache of 20 tokens"):
            model(ids, past_key_values=full)
        # it could not be filled, and whoever keeps it would begin anew with each turn
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"got a DynamicCache of 0 tokens: pass segattn\.InfiniCache\(model\)"):
                call(ids, past_key_values=transformers.DynamicCache())
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values must be of batch size 1, as the input is, got 2"):
            model(ids[:1], past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values must be of this model"):
            converted(num_hidden_layers=3)(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values must hold 1 key heads of width 8, got 2 of 8"):
            converted(num_key_value_heads=1)(ids, past_key_values=cache)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        ended = model(ids, attention_mask=mask, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="pad on the left"):
            model(ids, past_key_values=ended)
        begun = torch.ones(2, 40)
        begun[1, 20:23] = 0
        with pytest.raises(ValueError, match="row 1 has 3 columns of it after 20 tokens"):
            model(ids, attention_mask=begun, past_key_values=cache)
    with pytest.raises(ValueError, match=r"call segattn\.convert first"):
        segattn.InfiniCache(make())
