"""Tests of the text that a decoder with a recurrent memory generates."""

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import models
from recurrent_memories import L, M, decoder, plain_module, ragged

from segattn.rmt.recurrent.memory import RecurrentMemory
from segattn.rmt.recurrent.state import RecurrentState

PROMPTS = [1, L - 2, L, L + 1, 2 * L, 3 * L - 1]


@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: decoder(mask="paper", **k),
        lambda **k: decoder(mask="causal", **k),
        lambda **k: decoder("gpt2", **k),
        lambda **k: decoder("opt", **k),
        lambda **k: decoder("qwen3", attention="segattn", **k),
        lambda **k: plain_module(**k),
    ],
    ids="paper causal gpt2 opt fused module".split(),
)
def test_generation_equals_teacher_forcing(make: Any, alignment: str) -> None:
    module, new = make(alignment=alignment), 2 * L + 2
    for prompt in PROMPTS:
        ids = models.tokens(2, prompt, seed=prompt)
        written = module.generate(ids, max_new_tokens=new)
        assert torch.equal(written[:, 0], module(ids).logits[:, -1].argmax(-1))
        # aligned to the right, a prompt of several segments ends with a full one
        first = prompt if alignment == "right" and prompt >= L else prompt // L * L
        state = module(ids[:, :first]).state if first else None
        forced = torch.cat((ids[:, first:], written), 1)
        logits = RecurrentMemory.forward(left_aligned(module), forced, state=state).logits
        # with nothing before it in this call, the first token has no logits here; it was compared above
        own = min(new, new + prompt - first - 1)
        assert torch.equal(logits[:, -own - 1 : -1].argmax(-1), written[:, -own:])


def left_aligned(module: RecurrentMemory) -> RecurrentMemory:
    other = copy.copy(module)
    other.settings = type(module.settings)(**{**vars(module.settings), "alignment": "left"})
    return other


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_of_padded_rows_equals_each_alone(side: str) -> None:
    module, lengths = decoder(), [2 * L, 4, L + 4, 2 * L + 1]
    ids, mask = models.tokens(4, 2 * L + 2), ragged([2 * L, 4, L + 4, 2 * L + 1], side, 2 * L + 2)
    state = RecurrentState(torch.randn(4, M, 32, dtype=torch.float64))
    for before in (None, state):
        written = module.generate(ids, mask, max_new_tokens=L + 3, state=before)
        for row in range(len(lengths)):
            own = None if before is None else RecurrentState(before.memory[row : row + 1])
            alone = module.generate(ids[row : row + 1, mask[row].bool()], max_new_tokens=L + 3, state=own)
            assert torch.equal(written[row], alone[0])


def test_generation_ends_at_the_end_of_a_text() -> None:
    module, ids = decoder(), models.tokens(3, L + 2)
    free = module.generate(ids, max_new_tokens=12)
    eos = int(free[1, 3])
    ended = module.generate(ids, max_new_tokens=12, eos_token_id=eos, pad_token_id=0)
    longest = 0
    for row in range(3):
        at = (free[row] == eos).nonzero()
        stop = int(at[0]) + 1 if len(at) else 12
        longest = max(longest, stop)
        assert torch.equal(ended[row, :stop], free[row, :stop])
        assert (ended[row, stop:] == 0).all()
    assert ended.shape[1] == longest


def test_sampling() -> None:
    module, ids = decoder(), models.tokens(2, L)
    draw = lambda seed, **k: module.generate(  # noqa: E731
        ids, max_new_tokens=6, do_sample=True, generator=torch.Generator().manual_seed(seed), **k
    )
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), module.generate(ids, max_new_tokens=6))
    assert torch.equal(draw(0, top_p=1e-6), module.generate(ids, max_new_tokens=6))


@pytest.mark.parametrize("alignment", ["left", "right"])
def test_generation_is_without_noise(alignment: str) -> None:
    module, ids = decoder(alignment=alignment), models.tokens(3, 4 * L + 2)
    mask = ragged([4 * L + 2, 2 * L + 3, L - 1], "left", 4 * L + 2)
    expected = module.generate(ids, mask, max_new_tokens=L + 3)
    module.noise = 5.0
    assert torch.equal(module.train().generate(ids, mask, max_new_tokens=L + 3), expected)


def test_adapters_generate_as_they_read() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    module = RecurrentMemory(peft.get_peft_model(models.make().double(), config), M, L)
    ids = models.tokens(2, L + 3)
    written = module.generate(ids, max_new_tokens=2 * L)
    logits = module(torch.cat((ids, written), 1)).logits
    assert torch.equal(logits[:, L + 2 : -1].argmax(-1), written)
    with module.model.disable_adapter():
        assert not torch.allclose(module(ids).logits, logits[:, : L + 3])


def test_what_generate_is_given() -> None:
    module, ids = decoder(), models.tokens(2, L)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (
            ids,
            {"state": module.initial_state(3)},
            r"state must have shape \[B, m, d\] = \[2, 3, 32\], got \[3, 3, 32\]",
        ),
        (ids, {"state": module.memory}, "state must be a RecurrentState, got Parameter"),
        (ids[:, :0], {}, r"input_ids must be \[B, T\] of at least one token, got \[2, 0\]"),
        (ids[0], {}, r"input_ids must be \[B, T\] of at least one token, got \[7\]"),
        (ids.tolist(), {}, "input_ids must be an int32 or int64 tensor, got list"),
        (ids, {"temperature": 0.5}, "must come with do_sample=True, got one of them without"),
    ]
    for prompt, options, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            module.generate(prompt, max_new_tokens=3, **options)
    free = module.generate(ids, max_new_tokens=8)
    ended = module.generate(ids, max_new_tokens=8, eos_token_id=[int(free[0, 2]), int(free[1, 4])])
    for row in range(2):
        stop = min(at for at in range(8) if free[row, at] in (free[0, 2], free[1, 4])) + 1
        assert torch.equal(ended[row, :stop], free[row, :stop])
        assert (ended[row, stop:] == 0).all()
