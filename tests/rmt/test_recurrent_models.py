"""Tests of `RecurrentMemory` with models of many kinds: compiled, copied, in other dtypes, and those it refuses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import models
import torch.nn.functional as F
from recurrent_memories import L, M, bert, close, decoder, encoder, plain_module, ragged

from segattn.rmt.recurrent import block_attention
from segattn.rmt.recurrent.memory import RecurrentMemory, add_noise
from segattn.rmt.recurrent.state import RecurrentState

NO_MASK = "decoders of BERT in transformers 4 take no mask of pairs"


def test_the_compiled_segment_is_one_graph_and_equal() -> None:
    torch.compiler.reset()
    module, ids = decoder(), models.tokens(2, 3 * L)
    expected = module(ids, labels=ids)
    expected.loss.backward()
    gradient = module.memory.grad.clone()
    module.zero_grad()
    module.compile(fullgraph=True, backend="aot_eager")
    out = module(ids, labels=ids)
    out.loss.backward()
    close(out.loss, expected.loss)
    close(module.memory.grad, gradient, 1e-8)


@pytest.mark.parametrize("make", [encoder, lambda: decoder(attention="segattn")], ids=["encoder", "fused"])
def test_the_compiled_segment_reads(make: Any) -> None:
    torch.compiler.reset()
    module, ids = make(), models.tokens(2, 3 * L)
    with torch.no_grad():
        expected = module(ids, output_logits=False).state.memory
        module.compile(fullgraph=True, backend="eager")
        close(module(ids, output_logits=False).state.memory, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_of_the_segment_is_replayed() -> None:
    module = decoder().float().cuda()
    ids = models.tokens(2, 6 * L).cuda()
    with torch.no_grad():
        expected = module(ids, output_logits=False).state.memory
        module.compile(mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(module(ids, output_logits=False).state.memory, expected, rtol=1e-4, atol=1e-4)


def test_memory_tokens_begin_unlike_and_as_far_from_zero_as_embeddings() -> None:
    module = RecurrentMemory(models.make().double(), L, L)
    distances = torch.cdist(module.memory, module.memory) + 9 * torch.eye(L)
    assert distances.min() > 1e-3
    spread = module.model.get_input_embeddings().weight.std()
    assert 0.7 < module.memory.std() / spread < 1.4


def test_a_deep_copy_stands_alone() -> None:
    module, ids = decoder(), models.tokens(1, 2 * L)
    other = copy.deepcopy(module)
    before = module(ids).logits
    with torch.no_grad():
        other.memory.add_(1)
    close(module(ids).logits, before)
    assert not torch.allclose(other(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    module, ids = decoder().to(dtype), models.tokens(2, 2 * L + 1)
    mask = ragged([2 * L + 1, L - 2], "left", 2 * L + 1)
    out = module(ids, mask, ids)
    out.loss.backward()
    expected = decoder()(ids, mask, ids)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=tolerance, atol=tolerance)
    assert out.state.memory.dtype == module.memory.grad.dtype == dtype


def test_noise_is_of_training_and_between_segments() -> None:
    module, ids = decoder(), models.tokens(1, 3 * L)
    expected = module(ids).logits
    module.noise = 0.3
    close(module.eval()(ids).logits, expected)
    noisy = module.train()(ids).logits
    close(noisy[:, :L], expected[:, :L])
    assert not torch.allclose(noisy[:, L : 2 * L], expected[:, L : 2 * L])
    # its size, by a memory that is handed through as it is
    state = RecurrentState(torch.full((1, M, 32), 5.0, dtype=torch.float64))
    spread = torch.stack([add_noise(state.memory, module.noise) - state.memory for _ in range(200)]).std()
    assert 1.45 < spread < 1.55


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_memory_tokens": 8}, "segment_len must be at least num_memory_tokens = 8, got 7"),
        ({"num_memory_tokens": 0}, "num_memory_tokens must be at least 1, got 0"),
        ({"segment_len": 4091}, "segment_len must be at most 4090, since the model knows 4096 positions and 6 go"),
        ({"mask": "full"}, "mask must be one of 'paper', 'causal', got 'full'"),
        ({"bptt": 0}, "bptt must be at least 1, got 0"),
        ({"alignment": "middle"}, "alignment must be one of 'left', 'right', got 'middle'"),
        ({"loss": "first"}, "loss must be one of 'all', 'last', got 'first'"),
        ({"kind": "both"}, "kind must be one of 'decoder', 'encoder', got 'both'"),
        ({"special_tokens": (1, 2)}, r"special_tokens are for encoders and must be None, got \(1, 2\)"),
        ({"kind": "encoder", "mask": "paper"}, "mask is for decoders and must be None"),
        ({"kind": "encoder", "special_tokens": (1,)}, "special_tokens must be a pair of ids"),
        ({"attention": "flash"}, "attention must be None or 'segattn', got 'flash'"),
        ({"checkpoint": 1}, "checkpoint must be True or False, got 1"),
        ({"noise": -0.1}, "noise must be a number of at least 0, got -0.1"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    given = {"num_memory_tokens": M, "segment_len": L, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        RecurrentMemory(models.make(), **given)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        RecurrentMemory("gpt2", M, L)
    with pytest.raises(ValueError, match="kind must be 'decoder' or 'encoder' for a Linear"):
        RecurrentMemory(nn.Linear(3, 3), M, L)
    with pytest.raises(ValueError, match="model must have input embeddings, got Linear without: pass embedding="):
        RecurrentMemory(nn.Linear(3, 3), M, L, kind="decoder")
    with pytest.raises(ValueError, match="attention='segattn' is for Hugging Face decoders"):
        plain_module(attention="segattn")
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    both = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="which is both: pass one of them"):
        RecurrentMemory(both, M, L)
    bare = RecurrentMemory(models.make().model, M, L)
    with pytest.raises(TypeError, match="model must return logits, got LlamaModel, which returns hidden rows alone"):
        bare(models.tokens(1, L))
    assert bare(models.tokens(1, L), output_logits=False).logits is None


def test_bad_calls() -> None:
    module, ids = decoder(), models.tokens(2, L + 2)
    mask = torch.ones(2, L + 2)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "input_ids or inputs_embeds must be given, and not both"),
        ({"input_ids": ids.float()}, "input_ids must be an int32 or int64 tensor, got torch.float32"),
        ({"input_ids": ids[0]}, r"input_ids must be \[B, T\] of at least one token, got \[9\]"),
        ({"input_ids": ids[:, :0]}, r"input_ids must be \[B, T\] of at least one token, got \[2, 0\]"),
        (
            {"inputs_embeds": torch.zeros(2, 3, 8)},
            r"inputs_embeds must be \[B, T, 32\] of at least one token, got \[2, 3, 8\]",
        ),
        ({"input_ids": ids, "labels": ids[:, 1:]}, r"labels must have shape \[B, T\] = \[2, 9\], got \[2, 8\]"),
        ({"input_ids": ids, "labels": ids[:, 0]}, r"labels must have shape \[B, T\] = \[2, 9\], got \[2\]"),
        ({"input_ids": ids, "labels": ids.float()}, "labels must be an int32 or int64 tensor, got torch.float32"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, r"attention_mask must have shape \[B, T\] = \[2, 9\]"),
        ({"input_ids": ids, "attention_mask": mask * 0}, "must have a token in every row, got row 0 without one"),
        (
            {"input_ids": ids, "attention_mask": mask.index_fill(1, torch.tensor([4]), 0)},
            "attention_mask must hold one run of ones in each row, with padding only around it: row 0 has",
        ),
        ({"input_ids": ids, "state": torch.zeros(2, M, 32)}, "state must be a RecurrentState, got Tensor"),
        (
            {"input_ids": ids, "state": RecurrentState(torch.zeros(1, M, 32))},
            r"state must have shape \[B, m, d\] = \[2, 3, 32\], got \[1, 3, 32\]",
        ),
        (
            {"input_ids": ids, "state": RecurrentState(torch.zeros(2, M, 16))},
            r"state must have shape \[B, m, d\] = \[2, 3, 32\], got \[2, 3, 16\]",
        ),
    ]
    for call, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            module(**call)
    with pytest.raises(ValueError, match=r"labels must have shape \[B\], since the model classifies rows"):
        encoder()(ids, labels=ids)
    with pytest.raises(
        ValueError, match=r"labels must have shape \[B, T\], since the model has logits for every token"
    ):
        encoder("TokenClassification")(ids, labels=ids[:, 0])
    single = r"model must have logits of at least 2 classes where there are labels, got 1: load it with num_labels=2"
    with pytest.raises(ValueError, match=single):
        encoder(classes=1)(ids, labels=torch.zeros(len(ids), dtype=torch.long))
    assert encoder(classes=1)(ids).logits.shape == (len(ids), 1)
    with pytest.raises(TypeError, match="generate is for decoders"):
        encoder().generate(ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        module.generate(ids, max_new_tokens=0)


def test_the_models_own_calls_are_told_apart_from_the_memorys() -> None:
    module = decoder(attention="segattn")
    with pytest.raises(ValueError, match="must be called through it"):
        module.model(models.tokens(1, 4))
    module.model.set_attn_implementation("sdpa")
    assert module.model(models.tokens(1, 4)).logits.isfinite().all()


def test_a_copy_of_a_compiled_memory_has_its_own_weights() -> None:
    torch.compiler.reset()
    module, ids = decoder(), models.tokens(1, 2 * L)
    module.compile(backend="eager")
    before = module(ids).logits
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert (other(ids).logits == 0).all()
    close(module(ids).logits, before)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            "BloomConfig",
            {"n_layer": 2, "n_head": 4},
            "BloomForCausalLM, which takes no mask .*: its forward pass fails",
        ),
        (
            "GPTNeoConfig",
            {"num_layers": 1, "num_heads": 4, "attention_types": [[["local"], 1]]},
            "mask must be 'causal' for a GPTNeoForCausalLM, whose attention does not keep to the mask",
        ),
        (
            "MistralConfig",
            {"sliding_window": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32},
            "segment_len must be at most 6, since the model has layers with a window of 12 rows and 6 go to memory",
        ),
        (
            "GPTNeoConfig",
            {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 12},
            "segment_len must be at most 6, since the model has layers with a window of 12 rows and 6 go to memory",
        ),
    ],
)
def test_decoders_that_cannot_keep_to_the_papers_mask(config: str, options: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=models.VOCABULARY, hidden_size=32, **options)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    training = model.train().training
    with pytest.raises(ValueError, match=message):
        RecurrentMemory(model, M, L)
    assert model.training == training
    if "mask must" in message:
        module = RecurrentMemory(model.eval(), M, L, mask="causal")
        assert module.settings.kind == "decoder"
        ids = models.tokens(1, 2 * L)
        written = module.generate(ids, max_new_tokens=L)
        logits = module(torch.cat((ids, written), 1)).logits
        assert torch.equal(logits[:, 2 * L - 1 : -1].argmax(-1), written)


@pytest.mark.skipif(models.VERSION < (5,), reason=NO_MASK)
def test_rows_that_see_later_ones_are_no_decoders_without_a_mask() -> None:
    message = "mask must be 'paper' for a Bert.*, whose rows see later ones"
    for options in ({}, {"kind": "decoder"}):
        with pytest.raises(ValueError, match=message):
            RecurrentMemory(bert(), M, L, mask="causal", **options)
    causal, ids = RecurrentMemory(bert(is_decoder=True), M, L, mask="causal"), models.tokens(1, L)
    changed = ids.clone()
    changed[0, -1] = 60 - changed[0, -1]
    for module in (causal, RecurrentMemory(bert(), M, L)):
        assert torch.equal(module(ids).logits[:, :-1], module(changed).logits[:, :-1])
    with pytest.raises(ValueError, match=message):
        causal.model = bert("BertModel")


def test_rows_that_do_not_see_later_ones_are_no_encoders() -> None:
    message = "kind must be 'decoder' for a LlamaForCausalLM, whose rows do not see later ones"
    with pytest.raises(ValueError, match=message):
        RecurrentMemory(models.make(), M, L, kind="encoder")
    module = RecurrentMemory(bert("BertModel"), M, L)
    with pytest.raises(ValueError, match=message):
        module.model = models.make()


def test_the_encoder_of_a_model_with_both_is_an_encoder() -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=20, dropout_rate=0.0)
    model = transformers.T5ForConditionalGeneration(config).encoder
    module, ids = RecurrentMemory(model, M, L, head=nn.Linear(16, 3)), models.tokens(1, 2 * L) % 20
    memory = module.memory[None]
    for piece in ids.split(L, 1):
        rows = model(inputs_embeds=torch.cat((memory, model.embed_tokens(piece)), 1)).last_hidden_state
        memory = rows[:, :M]
    assert torch.equal(module(ids).logits, module.head(rows[:, 0]))


def test_what_is_checked_leaves_a_model_as_it_was() -> None:
    for model in (models.make(), bert("BertModel")):
        model.train()
        stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        stack[0].eval()
        modes = [module.training for module in model.modules()]
        RecurrentMemory(model, M, L)
        assert [module.training for module in model.modules()] == modes
        assert len(set(modes)) == 2


@pytest.mark.skipif(models.VERSION < (5,), reason=NO_MASK)
def test_reading_leaves_nothing_on_a_model() -> None:
    for make in (models.make, lambda: bert(is_decoder=True), lambda: bert("BertForTokenClassification")):
        model = make()
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        module, ids = RecurrentMemory(model, M, L), models.tokens(1, 2 * L + 1)
        module(ids)
        if module.settings.kind == "decoder":
            module.generate(ids, max_new_tokens=L)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        assert not any(module._forward_hooks for module in model.modules())
        assert pickle.loads(pickle.dumps(model))(ids)[0].shape == model(ids)[0].shape
        assert torch.equal(pickle.loads(pickle.dumps(module))(ids).state.memory, module(ids).state.memory)


def test_a_forward_may_ask_for_outputs_and_leave_what_it_likes_on_its_model() -> None:
    model, ids = models.make(), models.tokens(1, 3 * L)
    module, seen = RecurrentMemory(model, M, L), []
    model.set_attn_implementation("eager")

    def ask(trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        trunk.calls = getattr(trunk, "calls", 0) + 1
        return args, kwargs | {"output_attentions": True}

    model.model.register_forward_pre_hook(ask, with_kwargs=True)
    model.model.register_forward_hook(lambda trunk, args, output: seen.append(len(output.attentions)))
    module(ids)
    assert seen == [2, 2, 2]
    assert model.model.calls == 3


def test_a_compiled_trunk_is_read() -> None:
    module, ids = RecurrentMemory(models.make(), M, L), models.tokens(1, 2 * L)
    expected = module(ids).logits
    module.model.model.compile(backend="eager")
    close(module(ids).logits, expected, 1e-6)
    module.model.model = torch.compile(models.make().model, backend="eager")
    close(module(ids).logits, expected, 1e-6)


# Qwen2-MoE and OLMoE in transformers 4 choose their attention once, when they are made
EXPERTS = ("Mixtral", "GraniteMoe", *(("Qwen2Moe", "Olmoe") if models.VERSION >= (5,) else ()))


def experts(kind: str, seed: int) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    routed = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    small = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(vocab_size=models.VOCABULARY, **sizes, **routed, **small)
    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def deaf(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Attend causally, whatever the mask."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_whose_rows_are_rounded_in_batches_keep_to_a_mask(kind: str, dtype: torch.dtype) -> None:
    transformers.AttentionInterface.register("deaf", deaf)
    noise = {torch.float32: 1e-6, torch.bfloat16: 2e-3}[dtype]

    def rounded(module: nn.Module, args: Any, output: Any) -> Any:
        return output * (1 + noise * torch.randn(output.shape[:-1])[..., None].to(output))

    for seed in range(6):
        model = experts(kind, seed).to(dtype)
        module = RecurrentMemory(model, M, L)
        assert module(models.tokens(2, 2 * L + 3)).logits.isfinite().all()
        model.get_decoder().norm.register_forward_hook(rounded)
        RecurrentMemory(model, M, L)
        model.set_attn_implementation("deaf")
        with pytest.raises(ValueError, match="whose attention does not keep to the mask"):
            RecurrentMemory(model, M, L)


def test_arguments_that_segment_attention_does_not_take_are_refused_by_name() -> None:
    q = torch.randn(1, 2, 5, 8)
    block = block_attention.Block(2, 2, None)
    for name in ("position_bias", "sinks", "indices", "output_attentions", "unheard_of"):
        with pytest.raises(ValueError, match=f"Linear passes {name} to its attention, which attention='segattn' does"):
            block_attention.block_attention(nn.Linear(1, 1), q, q, q, None, segattn_block=block, **{name: True})
    block_attention.block_attention(
        nn.Linear(1, 1), q, q, q, None, segattn_block=block, position_ids=q, s_aux=None, output_attentions=False
    )


def test_what_is_checked_never_changes_a_model_that_runs_elsewhere() -> None:
    model, modes = models.make().train(), []
    expected = [module.training for module in model.modules()]
    model.model.layers[0].register_forward_hook(
        lambda *args: modes.append([module.training for module in model.modules()])
    )
    RecurrentMemory(model, M, L)
    assert modes
    assert all(seen == expected for seen in modes)


def test_a_forward_that_was_set_on_a_model_is_checked_in_evaluation_mode() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = models.make("gpt2", resid_pdrop=0.5).train()
    assert RecurrentMemory(model, M, L).model.training
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(model)
    module, ids = RecurrentMemory(model, M, L), models.tokens(1, 2 * L)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())
    module.eval()
    own = RecurrentMemory(accelerate.hooks.remove_hook_from_module(copy.deepcopy(model), recurse=True), M, L)
    own.memory = module.memory
    assert torch.equal(module(ids).logits, own.eval()(ids).logits)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RecurrentMemory(models.make(), M, L),
        lambda: RecurrentMemory(models.make(), M, L, attention="segattn"),
        pytest.param(
            lambda: RecurrentMemory(bert("BertForTokenClassification"), M, L, special_tokens=(1, 2)),
            marks=pytest.mark.skipif(models.VERSION < (5,), reason="BERT in transformers 4 makes masks on that device"),
        ),
    ],
)
def test_defaults_of_device_and_dtype_do_not_matter(make: Callable[[], RecurrentMemory]) -> None:
    torch.manual_seed(0)
    expected, ids, mask = make(), models.tokens(2, 2 * L + 1), ragged([2 * L + 1, L - 2], "left", 2 * L + 1)
    model, dtype = expected.model, torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            torch.manual_seed(1)
            found = RecurrentMemory(model, M, L, **options_of(expected))
            out = found(ids, mask)
            generated = found.generate(ids, max_new_tokens=3) if found.settings.kind == "decoder" else None
    finally:
        torch.set_default_dtype(dtype)
    torch.manual_seed(1)
    other = RecurrentMemory(model, M, L, **options_of(expected))
    assert torch.equal(found.memory, other.memory)
    assert torch.equal(out.state.memory, other(ids, mask).state.memory)
    if generated is not None:
        assert torch.equal(generated, other.generate(ids, max_new_tokens=3))


def options_of(module: RecurrentMemory) -> dict[str, Any]:
    return {"attention": module.attention, "special_tokens": module.settings.special_tokens}


@pytest.mark.parametrize("make", [decoder, encoder])
def test_labels_of_int32_count_as_those_of_int64(make: Any) -> None:
    module, ids = make(), models.tokens(2, 2 * L + 1)
    labels = ids if module.settings.kind == "decoder" else ids[:, 0] % 5
    assert torch.equal(module(ids, labels=labels.int()).loss, module(ids, labels=labels).loss)


def test_a_model_without_weights_yet() -> None:
    with torch.device("meta"):
        model = models.make()
    assert RecurrentMemory(model, M, L).memory.is_meta


def test_attention_is_chosen_once() -> None:
    with pytest.raises(AttributeError, match="attention"):
        decoder().attention = "segattn"  # type: ignore[misc]


def test_encoders_whose_rows_do_not_fit() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    roberta = transformers.RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=14, pad_token_id=1)
    model = transformers.RobertaModel(roberta)
    RecurrentMemory(model, 2, 7, special_tokens=(0, 2))
    with pytest.raises(ValueError, match="segment_len must be at most 7, since the model knows 12 positions and 5 go"):
        RecurrentMemory(model, 2, 8, special_tokens=(0, 2))
    albert = transformers.AlbertConfig(**sizes, embedding_size=16, intermediate_size=32)
    with pytest.raises(ValueError, match="model must have embeddings as wide as its layers, 32, got 16"):
        RecurrentMemory(transformers.AlbertModel(albert), M, L, kind="encoder")
    with pytest.raises(ValueError, match=r"special_tokens must be below the model's 61 tokens, got \(101, 102\)"):
        encoder(special_tokens=(101, 102))


@pytest.mark.skipif(models.VERSION < (5,), reason=NO_MASK)
@pytest.mark.parametrize("mask", ["paper", "causal"])
def test_positions_that_begin_behind_that_of_padding(mask: str) -> None:
    """RoBERTa's do, with every mask, and behind a cache, where it would begin anew by itself."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    roberta = transformers.RobertaConfig(
        **sizes, intermediate_size=32, max_position_embeddings=40, pad_token_id=1, eos_token_id=None, is_decoder=True
    )
    torch.manual_seed(0)
    model, ids = transformers.RobertaForCausalLM(roberta).eval(), models.tokens(2, 2 * L + 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    module = RecurrentMemory(model, M, L, mask=mask)
    fused = RecurrentMemory(copy.deepcopy(model), M, L, mask=mask, attention="segattn")
    fused.load_state_dict(module.state_dict())
    seen: list[int] = []
    table = model.roberta.embeddings.position_embeddings
    with torch.no_grad(), table.register_forward_hook(lambda _, args, out: seen.append(int(args[0].min()))):
        close(module(ids).logits, fused(ids).logits, 1e-5)
        new = module.generate(ids, max_new_tokens=L, do_sample=False)
        for _ in range(L):
            ids = torch.cat([ids, module(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(new, ids[:, -L:])
    assert min(seen) == 2


def test_a_decoder_that_classifies_rows_is_refused() -> None:
    config = models.make("gpt2").config
    module = RecurrentMemory(transformers.GPT2ForSequenceClassification(config).eval(), M, L)
    with pytest.raises(TypeError, match="got GPT2ForSequenceClassification, which classifies rows: pass head="):
        module(models.tokens(1, L))
