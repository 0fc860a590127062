"""Tests of calls of `AssociativeMemory`: pieces, padding, state, loss, gradients, generation, bad input."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from calls import error

transformers = pytest.importorskip("transformers")

import models
from associative_memories import DOUBLE, FAMILIES, SCHEDULED, L, M, as_scheduled, checkpointed, padded, results, wrapped

from segattn.kernels.state import MemoryState
from segattn.rmt.associative import layer as layer_module
from segattn.rmt.associative import memory as associative_memory
from segattn.rmt.associative.memory import AssociativeMemory
from segattn.rmt.associative.state import AssociativeState


@pytest.mark.parametrize("schedule", SCHEDULED)
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


@pytest.mark.parametrize("schedule", SCHEDULED)
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


@pytest.mark.parametrize("schedule", SCHEDULED)
def test_two_threads_may_call_a_memory_at_once(schedule: str) -> None:
    """Call it in a second thread while the first is inside each of its modules."""
    memory, texts = wrapped(schedule=schedule), [models.tokens(2, 4 * L, seed) for seed in (3, 4)]
    with torch.no_grad():
        expected = [memory(text).logits for text in texts]
    before = dict(memory.named_parameters())
    found: list[torch.Tensor] = []

    def other() -> None:
        with torch.no_grad():
            found.append(memory(texts[1]).logits)

    def second(module: Any, args: Any) -> None:
        if threading.current_thread() is threading.main_thread() and len(found) < 6:
            assert {name: x for name, x in memory.named_parameters() if x is not before[name]} == {}
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    for layer in memory.decoder.modules(memory.model):
        layer.input_layernorm.register_forward_pre_hook(second)
    with torch.no_grad():
        assert error(memory(texts[0]).logits, expected[0]) < 1e-12
    assert len(found) == 6
    for logits in found:
        assert error(logits, expected[1]) < 1e-12
    assert all(x is before[name] for name, x in memory.named_parameters())


def test_defaults_of_device_and_dtype_do_not_matter() -> None:
    ids, mask = padded((2 * L + 1, L - 2))
    model, dtype = models.make(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            torch.manual_seed(1)
            found = AssociativeMemory(model, M, L, d_mem=4, bptt=1)
            out, generated = found(ids, mask, ids), found.generate(ids, max_new_tokens=3)
    finally:
        torch.set_default_dtype(dtype)
    torch.manual_seed(1)
    other = AssociativeMemory(model, M, L, d_mem=4, bptt=1)
    assert torch.equal(found.memory_tokens, other.memory_tokens)
    other.load_state_dict(found.state_dict())
    assert torch.equal(out.loss, other(ids, mask, ids).loss)
    assert torch.equal(generated, other.generate(ids, max_new_tokens=3))


def test_labels_of_int32_count_as_those_of_int64() -> None:
    memory, ids = wrapped(), models.tokens(2, 2 * L + 1)
    assert torch.equal(memory(ids, labels=ids.int()).loss, memory(ids, labels=ids).loss)


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


@pytest.mark.parametrize("schedule", SCHEDULED)
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


@pytest.mark.parametrize("schedule", SCHEDULED)
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
    r"input_ids must be \[B, T\] of at least one token, got \[4\]": (ValueError, lambda m: m(models.tokens(1, 4)[0])),
    "input_ids must be an int32 or int64 tensor, got torch.float32": (TypeError, lambda m: m(torch.ones(1, 4))),
    r"input_ids must be \[B, T\] of at least one token, got \[1, 0\]": (ValueError, lambda m: m(models.tokens(1, 0))),
    r"inputs_embeds must be \[B, T, 32\] of at least one token": (
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


if models.VERSION < (5,):
    # there no attention of its layers says that it is causal
    del BAD["model must embed its tokens in the module that runs its layers, got a BertLMHeadModel"]


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    kind, call = BAD[message]
    with pytest.raises(kind, match=message):
        call(wrapped())


def test_a_model_of_encoder_and_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration, which is both: pass one of them"):
        AssociativeMemory(transformers.T5ForConditionalGeneration(config), M, L)
    with pytest.raises(
        ValueError, match=r"got a BloomForCausalLM, whose layers have no .*RecurrentMemory\(mask='causal'\)"
    ):
        AssociativeMemory(models.make("bloom"), M, L)


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
