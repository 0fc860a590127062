"""Tests of the options of `generate`: transformers' own, of a model that reads each text anew, says what they do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import associative_memories
import models
from recurrent_memories import L, M, decoder, plain_module, ragged
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PretrainedConfig, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from segattn.rmt.associative.memory import AssociativeMemory
from segattn.rmt.recurrent.memory import RecurrentMemory
from segattn.rmt.writer import REFUSED

MEMORIES = {
    "recurrent": decoder,
    "causal": lambda: decoder("gpt2", mask="causal"),
    "fused": lambda: decoder("qwen3", attention="segattn"),
    "module": plain_module,
    "associative": associative_memories.wrapped,
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 9},
    "nucleus": {"do_sample": True, "top_p": 0.8, "top_k": 0, "min_p": 0.01, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "bad_words_ids": [[3], [7]]},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 3, "do_sample": True, "top_k": 5},
    "ends": {"eos_token_id": [5, 11, 17, 23, 40], "pad_token_id": 0, "min_new_tokens": 3},
    "beams that end": {"num_beams": 4, "eos_token_id": [5, 11, 17, 23, 40], "pad_token_id": 0, "early_stopping": True},
}


class Anew(GenerationMixin):
    """A memory that reads the whole text again for every token, as transformers' `generate` sees it."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, memory: Any) -> None:
        self.memory, self.device = memory, torch.device("cpu")
        self.config = PretrainedConfig(vocab_size=models.VOCABULARY)
        self.generation_config = GenerationConfig(use_cache=False)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.memory(input_ids, attention_mask).logits
        return CausalLMOutputWithPast(logits=logits)

    __call__ = forward

    def get_experts_implementation(self) -> dict[str, str]:
        return {}


def written(seed: int, generate: Any, *arguments: Any, **options: Any) -> Any:
    torch.manual_seed(seed)
    return generate(*arguments, max_new_tokens=2 * L + 1, return_dict_in_generate=True, **options)


def assert_same(mine: Any, theirs: Any, prompt: int) -> None:
    """Check tokens and whatever numbers transformers returned with them."""
    assert torch.equal(mine.sequences, theirs.sequences[:, prompt:])
    assert set(mine) == set(theirs) - {"past_key_values"}
    for name in set(mine) - {"sequences"}:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MEMORIES)
def test_generate_is_that_of_a_model_that_reads_the_text_anew(kind: str, way: str) -> None:
    """Padded prompts that end within, at the end of, and in front of a segment are continued over two borders."""
    memory, ids = MEMORIES[kind](), models.tokens(3, 2 * L + 3)
    mask = ragged([2 * L + 3, 2 * L, 4], "left", 2 * L + 3)
    options = {"output_scores": True, "output_logits": True} | WAYS[way]
    theirs = written(7, Anew(memory).generate, ids, attention_mask=mask, **options)
    assert_same(written(7, memory.generate, ids, mask, **options), theirs, ids.shape[1])


@pytest.mark.parametrize("way", WAYS)
def test_in_one_segment_an_associative_memory_generates_what_its_model_does(way: str) -> None:
    model = models.make().double()
    memory, ids = AssociativeMemory(model, M, 40), models.tokens(2, 5)
    options = {"output_scores": True} | WAYS[way]
    theirs = written(3, model.generate, ids, **options)
    assert_same(written(3, memory.generate, ids, **options), theirs, 5)


@pytest.mark.parametrize("way", WAYS)
def test_in_one_segment_a_recurrent_memory_generates_what_its_model_does_behind_the_memory(way: str) -> None:
    model = models.make().double()
    memory, ids = RecurrentMemory(model, M, 40, mask="causal"), models.tokens(2, 5)
    options = {"output_scores": True} | WAYS[way]
    rows = torch.cat((memory.memory.expand(2, -1, -1), memory.embed(ids)), 1)
    mask = torch.ones(2, M + 5).long()
    theirs = written(3, model.generate, ids, inputs_embeds=rows, attention_mask=mask, **options)
    assert_same(written(3, memory.generate, ids, **options), theirs, 5)


@pytest.mark.parametrize("kind", ["recurrent", "associative"])
def test_beams_of_rows_padded_on_either_side_equal_each_row_alone(kind: str) -> None:
    memory, lengths = MEMORIES[kind](), [2 * L, 4, L + 4, 3]
    ids = models.tokens(4, 2 * L + 2)
    for side in ("left", "right"):
        mask = ragged(lengths, side, 2 * L + 2)
        together = memory.generate(ids, mask, max_new_tokens=L + 3, num_beams=3)
        for row in range(4):
            alone = memory.generate(ids[row : row + 1, mask[row].bool()], max_new_tokens=L + 3, num_beams=3)
            assert torch.equal(together[row], alone[0])


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_each_token() -> None:
    memory, ids, streamer = decoder(), models.tokens(1, L + 2), Recorder()
    new = memory.generate(ids, max_new_tokens=L, streamer=streamer)
    assert torch.equal(streamer.pieces[0], ids)
    assert torch.equal(torch.cat(streamer.pieces[1:]), new[0])
    assert streamer.ended


def test_processors_and_criteria_see_the_text_from_the_prompt_on() -> None:
    memory, ids = decoder(), models.tokens(2, L + 2)
    seen: list[Tensor] = []

    def only_even(text: Tensor, scores: Tensor) -> Tensor:
        seen.append(text)
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)

    def full(text: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(text),), text.shape[1] >= L + 7)

    new = memory.generate(
        ids,
        max_new_tokens=3 * L,
        logits_processor=LogitsProcessorList([only_even]),
        stopping_criteria=StoppingCriteriaList([full]),
    )
    assert new.shape == (2, 5)
    assert not (new % 2).any()
    assert not torch.equal(new, memory.generate(ids, max_new_tokens=5))
    assert [text.shape[1] for text in seen] == list(range(L + 2, L + 7))
    assert torch.equal(seen[-1], torch.cat((ids, new[:, :-1]), 1))


def test_lengths_and_settings_are_those_of_transformers() -> None:
    memory, ids = decoder(), models.tokens(2, L)
    free = memory.generate(ids, max_new_tokens=9)
    assert torch.equal(memory.generate(ids, max_length=L + 9), free)
    assert torch.equal(memory.generate(ids, generation_config=GenerationConfig(max_new_tokens=9)), free)
    # what a configuration says of the plain model's cache does not matter
    config = GenerationConfig(max_new_tokens=9, cache_implementation="static", use_cache=True)
    assert torch.equal(memory.generate(ids, generation_config=config), free)
    assert config.cache_implementation == "static"
    own = memory.model.generation_config
    own.eos_token_id, own.max_new_tokens = int(free[0, 2]), 9
    stop = (free == free[0, 2]).int().argmax(1)
    stop[~(free == free[0, 2]).any(1)] = 8
    ended = memory.generate(ids)
    assert ended.shape[1] == stop.max() + 1
    assert torch.equal(ended[0, : stop[0] + 1], free[0, : stop[0] + 1])
    assert torch.equal(memory.generate(ids, eos_token_id=None), free)


def test_a_generator_goes_on_and_leaves_the_seed_alone() -> None:
    memory, ids = decoder(), models.tokens(2, L)
    draw = lambda **k: memory.generate(ids, max_new_tokens=6, do_sample=True, **k)  # noqa: E731
    torch.manual_seed(5)
    first, second = draw(), draw()
    generator = torch.Generator().manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(draw(generator=generator), first)
    assert torch.equal(draw(generator=generator), second)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="stopped"):
        draw(generator=generator, stopping_criteria=StoppingCriteriaList([stop]))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        draw(generator=5)


def stop(text: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("stopped")


def test_nothing_of_a_call_stays_on_the_memory() -> None:
    memory, ids = decoder(), models.tokens(2, L + 2)
    config = copy.deepcopy(memory.model.generation_config.to_dict())
    first = memory.generate(ids, max_new_tokens=L, num_beams=3)
    assert torch.equal(memory.generate(ids, max_new_tokens=L, num_beams=3), first)
    assert memory.model.generation_config.to_dict() == config


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_here_is_refused(name: str) -> None:
    memory, ids = decoder(), models.tokens(1, 4)
    with pytest.raises(TypeError, match=f"generate takes no {name}, got 1: .+"):
        memory.generate(ids, max_new_tokens=2, **{name: 1})


def test_a_refused_model_is_named_and_not_printed() -> None:
    memory = decoder()
    with pytest.raises(TypeError, match=r"generate takes no assistant_model, got a LlamaForCausalLM: .+") as raised:
        memory.generate(models.tokens(1, 4), max_new_tokens=2, assistant_model=models.make())
    assert len(str(raised.value)) < 200


def test_bad_options_are_named() -> None:
    memory, ids = decoder(), models.tokens(1, 4)
    with pytest.raises(ValueError, match="max_new_tokenz"):
        memory.generate(ids, max_new_tokenz=2)
    for name, value in {"output_attentions": True, "prompt_lookup_num_tokens": 1, "guidance_scale": 1.5}.items():
        config = GenerationConfig(max_new_tokens=2, return_dict_in_generate=True)
        setattr(config, name, value)
        with pytest.raises(ValueError, match=rf"generation_config\.{name} must not be set, got {value}: .+"):
            memory.generate(ids, generation_config=config)
    with pytest.raises(ValueError, match="streamer"):
        memory.generate(ids, max_new_tokens=2, num_beams=2, streamer=Recorder())


def test_options_are_checked_before_a_long_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, ids = decoder(), models.tokens(1, 3 * L)

    def read(*arguments: Any) -> Any:
        raise AssertionError("the prompt is read")

    monkeypatch.setattr(memory, "_read_segments", read)
    for options in ({"max_new_tokenz": 2}, {"temperature": 0.5, "max_new_tokens": 2}, {"num_beams": 0}):
        with pytest.raises(ValueError, match=r"max_new_tokenz|do_sample|num_beams"):
            memory.generate(ids, **options)
    with pytest.raises(AssertionError, match="the prompt is read"):
        memory.generate(ids, max_new_tokens=2)
