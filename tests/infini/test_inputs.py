"""What calls of converted models are given: prompts and caches, packed sequences, labels, embeddings, masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")

from models import converted, make, tokens

import segattn

L = 16
FAMILIES = ("llama", "qwen3", "gpt2")
# sequences of 19 and 31 tokens
BOUNDS = torch.tensor([0, 19, 50], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(19), torch.arange(31)])[None]


def greedy(model: Any, ids: Tensor | None = None, **arguments: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **arguments)


def read(model: Any, ids: Tensor, static: bool) -> Any:
    cache = segattn.StaticInfiniCache(model, len(ids)) if static else segattn.InfiniCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_goes_on_where_its_cache_ends(name: str, static: bool) -> None:
    model, ids = converted(name), tokens(2, 37)
    wanted = greedy(model, ids)
    cache = read(model, ids[:, :30], static)
    before = [x.clone() for state in cache.states.values() for x in state.tensors()]
    for time in (1, 10, 29, 30):
        for mask in (None, torch.ones(2, time, dtype=torch.long)):
            with pytest.raises(
                ValueError, match=rf"must be the whole text .* the 30 tokens .* got {time}: .*\.reset\(\)"
            ):
                greedy(model, ids[:, :time], past_key_values=cache, attention_mask=mask)
    embeds = model.get_input_embeddings()(ids[:, :30])
    with pytest.raises(ValueError, match="inputs_embeds must be the whole text"):
        greedy(model, inputs_embeds=embeds, past_key_values=cache)
    after = [x for state in cache.states.values() for x in state.tensors()]
    assert cache.get_seq_length() == 30
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))
    assert torch.equal(greedy(model, ids, past_key_values=cache), wanted)
    cache.reset()
    assert torch.equal(greedy(model, ids, past_key_values=cache), wanted)


@pytest.mark.skipif(not hasattr(transformers.cache_utils.Cache, "activate_past_recording"), reason="needs newer ones")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_of_new_tokens_alone_has_the_mask_of_all(name: str) -> None:
    model, ids = converted(name), tokens(2, 37)
    cache = read(model, ids[:, :30], False)
    said = greedy(model, ids[:, 30:], past_key_values=cache, attention_mask=torch.ones(2, 37, dtype=torch.long))
    assert torch.equal(said[:, 7:], greedy(model, ids)[:, 37:])


@pytest.mark.parametrize("value", [-1e4, 2.0])
def test_a_mask_to_be_added_is_refused(value: float) -> None:
    ids = tokens(2, 20)
    mask = torch.zeros(2, 20) if value < 0 else torch.ones(2, 20)
    mask[1, :3] = value
    plain = make("llama")
    for model in (converted(), segattn.RecurrentMemory(plain, 2, 8), segattn.AssociativeMemory(plain, 2, 8)):
        with pytest.raises(ValueError, match="attention_mask must be of ones and zeros, got 3 other values in row 1"):
            model(ids, attention_mask=mask)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("ends", [1, 3])
def test_a_prompt_that_ends_with_the_padding_token(ends: int, use_cache: bool) -> None:
    model, ids = converted(), tokens(2, 20)
    ids[1, -ends:] = 0
    said = (
        rf"attention_mask must end with ones for generate, got row 1 with {ends} columns of padding .* pad on the left"
        r".* holds pad_token_id: pass it attention_mask=torch\.ones_like\(input_ids\)"
    )
    with pytest.raises(ValueError, match=said):
        greedy(model, ids, use_cache=use_cache)
    with pytest.raises(ValueError, match=said):
        greedy(model, ids, past_key_values=segattn.StaticInfiniCache(model, 2))
    whole = greedy(model, ids, attention_mask=torch.ones_like(ids), use_cache=use_cache)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits[:, -1].argmax(-1), whole[:, 20])


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_that_are_no_batch_of_texts(name: str) -> None:
    model, ids = converted(name), tokens(2, 20)
    for wrong in (ids[0], ids[None], ids[:, :0], ids[:0]):
        for call in (model, lambda x: greedy(model, x)):
            with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] of at least one token, got \["):
                call(wrong)
    for embeds, error, said in (
        (
            torch.zeros(1, 5, 31),
            ValueError,
            r"inputs_embeds must be \[B, T, 32\] of at least one token, got \[1, 5, 31\]",
        ),
        (torch.zeros(1, 5, 32).double(), TypeError, r"inputs_embeds must be of the model's dtype, torch.float32, got"),
        (torch.zeros(1, 5, 32).long(), TypeError, "inputs_embeds must be bfloat16, float16, float32 or float64, got"),
    ):
        with pytest.raises(error, match=said):
            model(inputs_embeds=embeds)
        with pytest.raises(error, match=said):
            greedy(model, inputs_embeds=embeds)
    wide = torch.randn(1, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        # a norm of GPT-2 takes no other dtype than its own
        assert name == "gpt2" or converted(name).bfloat16()(inputs_embeds=wide).logits.isfinite().all()


def test_a_row_has_a_token_unless_more_of_it_may_follow() -> None:
    model, ids = converted(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1] = 0
    said = "attention_mask must have a token in every row, got row 1 without one"
    for call in (
        lambda: model(ids, attention_mask=mask),
        lambda: model(ids, attention_mask=mask, use_cache=False),
        lambda: greedy(model, ids, attention_mask=mask),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    # a row that is padded on the left, in pieces
    more = torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], 1)
    following = tokens(2, 9, 1)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        rest = model(following, attention_mask=more, past_key_values=cache).logits
        torch.testing.assert_close(rest[1:], model(following[1:]).logits, rtol=1e-4, atol=1e-4)


WRONG_BOUNDS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "a list": (TypeError, {"cu_seq_lens_q": [0, 19, 50]}, "cu_seq_lens_q must be an int32 or int64 tensor, got list"),
    "a tuple": (TypeError, {"cu_seq_lens_q": (0, 19, 50)}, "cu_seq_lens_q must be an int32 .* got tuple"),
    "floats": (TypeError, {"cu_seq_lens_q": BOUNDS.float()}, r"cu_seq_lens_q must be an int32 .* got torch\.float32"),
    "two dimensions": (
        ValueError,
        {"cu_seq_lens_q": BOUNDS[None]},
        r"cu_seq_lens_q must be \[N \+ 1\], .* got \[1, 3\]",
    ),
    "no sequence": (ValueError, {"cu_seq_lens_q": BOUNDS[:1]}, r"cu_seq_lens_q must be \[N \+ 1\], .* got \[1\]"),
    "too short": (
        ValueError,
        {"cu_seq_lens_q": BOUNDS[:2]},
        r"cu_seq_lens_q must rise from 0 to B · T = 50 .* \[0, 19\]",
    ),
    "falling": (ValueError, {"cu_seq_lens_q": BOUNDS[[0, 2, 1, 2]]}, "cu_seq_lens_q must rise from 0 to B"),
    "keys alone": (ValueError, {"cu_seq_lens_k": BOUNDS}, "cu_seq_lens_q must be passed with cu_seq_lens_k"),
    "other keys": (
        ValueError,
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": torch.tensor([0, 10, 50])},
        r"cu_seq_lens_k must equal cu_seq_lens_q, \[0, 19, 50\], .* got \[0, 10, 50\]",
    ),
    "other positions": (
        ValueError,
        {"cu_seq_lens_q": BOUNDS, "position_ids": torch.arange(50)[None]},
        "position_ids must count from 0 in each sequence of cu_seq_lens_q",
    ),
    "positions in a list": (
        TypeError,
        {"position_ids": POSITIONS.tolist()},
        "position_ids must be an int32 .* got list",
    ),
    "positions in floats": (TypeError, {"position_ids": POSITIONS.float()}, "position_ids must be an int32 or int64"),
}


@pytest.mark.parametrize("how", WRONG_BOUNDS)
@pytest.mark.parametrize("layers", [None, [0]])
def test_bounds_of_packed_sequences_are_refused_by_their_own_name(how: str, layers: list[int] | None) -> None:
    error, call, said = WRONG_BOUNDS[how]
    with pytest.raises(error, match=said):
        segattn.convert(make(), L, layers=layers, quiet=True)(tokens(1, 50), use_cache=False, **call)


def test_packed_sequences_begin_with_each_row() -> None:
    model, ids = converted(), tokens(2, 25)
    with pytest.raises(
        ValueError, match=r"cu_seq_lens_q must begin a sequence with each row of 25 columns, got \[0, 19, 50"
    ):
        model(ids, cu_seq_lens_q=BOUNDS)
    bounds = torch.tensor([0, 25, 40, 50])
    packed = model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds.int()).logits
    assert torch.equal(model(ids.view(1, 50), cu_seq_lens_q=bounds).logits.view_as(packed), packed)


def test_bounds_positions_and_keys_that_agree_say_the_same() -> None:
    model, ids = converted(), tokens(1, 50)
    wanted = model(ids, position_ids=POSITIONS).logits
    assert torch.equal(
        model(ids, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS.clone(), position_ids=POSITIONS).logits, wanted
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["labels", "shift_labels"])
def test_labels_have_one_rule(name: str, kind: str) -> None:
    model, ids = converted(name), tokens(2, 20)
    right = {"labels": ids, kind: ids}
    wanted = model(ids, **right).loss
    assert torch.equal(model(ids, **right | {kind: ids.int()}).loss, wanted)
    for wrong, error, said in (
        (ids.short(), TypeError, rf"{kind} must be an int32 or int64 tensor, got torch\.int16"),
        (ids.byte(), TypeError, rf"{kind} must be an int32 or int64 tensor, got torch\.uint8"),
        (ids.float(), TypeError, rf"{kind} must be an int32 or int64 tensor, got torch\.float32"),
        (ids.tolist(), TypeError, rf"{kind} must be an int32 or int64 tensor, got list"),
        (ids[:, 1:], ValueError, rf"{kind} must have shape \[B, T\] = \[2, 20\], got \[2, 19\]"),
        (ids[0], ValueError, rf"{kind} must have shape \[B, T\] = \[2, 20\], got \[20\]"),
    ):
        with pytest.raises(error, match=said):
            model(ids, **right | {kind: wrong})


def test_labels_by_place_and_with_logits_left_out() -> None:
    model, ids = converted(), tokens(2, 20)
    assert torch.equal(model(ids, None, None, None, None, ids.int()).loss, model(ids, labels=ids).loss)
    with pytest.raises(ValueError, match=r"logits_to_keep must be left out beside labels, .* got 5"):
        model(ids, labels=ids, logits_to_keep=5)
    plain = segattn.revert(model)
    assert not plain._forward_pre_hooks
    with pytest.raises(RuntimeError):
        plain(ids, labels=ids.int())


def test_classes_of_rows_are_not_labels_of_tokens() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_labels=3, pad_token_id=0)
    model = segattn.convert(transformers.LlamaForSequenceClassification(config), L, quiet=True).eval()
    assert model(tokens(2, 20), labels=torch.tensor([0, 2])).loss.isfinite()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_cache_is_not_read_again_in_a_backward_pass(reentrant: bool) -> None:
    model, ids = converted().train(), tokens(1, 4 * L)
    cache = segattn.InfiniCache(model)
    model(ids[:, :L], past_key_values=cache)
    embeds = model.get_input_embeddings()(ids[:, L:])

    def call(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, past_key_values=cache).logits

    logits = checkpoint(call, embeds, use_reentrant=reentrant)
    with pytest.raises(
        ValueError, match=r"past_key_values must be None inside torch\.utils\.checkpoint of the whole model"
    ):
        logits.sum().backward()
    # without a cache the whole model is checkpointed as any other
    rows = [model.get_input_embeddings()(ids).detach().requires_grad_() for _ in range(2)]
    model(inputs_embeds=rows[0], use_cache=False).logits.square().sum().backward()
    run = lambda x: model(inputs_embeds=x, use_cache=False).logits  # noqa: E731
    checkpoint(run, rows[1], use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(rows[1].grad, rows[0].grad)


CROSSING = {
    "vocab_size": 61,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["Bart", "Marian", "Pegasus"])
def test_cross_attention_is_known_by_what_it_is(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**CROSSING, pad_token_id=0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(
        ValueError, match=f"must attend to its own text alone, .* .that of {kind}ForCausalLM is {kind}Att"
    ):
        segattn.convert(model, L)


def test_ways_back_name_themselves() -> None:
    model, ids = converted(), tokens(1, 40)
    wanted = model(ids).logits
    with pytest.raises(ValueError, match=r"to have a plain one, which needs no revert, .* type\(config\)\.from_dict\("):
        segattn.revert(type(model)(model.config))
    config = model.config
    assert type(model)(type(config).from_dict(config.to_dict()))(ids).logits.isfinite().all()
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        RuntimeError, match=r"call segattn.revert first, or set_attn_implementation\('segattn'\) to go on"
    ):
        model(ids)
    model.set_attn_implementation("segattn")
    assert torch.equal(model(ids).logits, wanted)


def test_checkpoints_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    segattn.save_pretrained(converted(), tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    wanted = r"path must be a folder that segattn\.save_pretrained wrote, or a name on the hub, got '.*"
    for path in (tmp_path / "none", tmp_path / "empty", tmp_path / "saved/config.json", "no-such/model"):
        with pytest.raises(OSError, match=wanted + str(path).rpartition("/")[2]):
            segattn.from_pretrained(path, quiet=True)
    with pytest.raises(
        TypeError, match=r"seg_len must be an argument of AutoModelForCausalLM\.from_pretrained or an entr"
    ):
        segattn.from_pretrained(tmp_path / "saved", seg_len=3, quiet=True)
