"""Tests of `RecurrentMemory` against a plain loop over the model's calls: masks, padding, gradients, pieces, losses."""

import weakref
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import models
from recurrent_memories import FIRST, SEPARATOR, L, M, close, decoder, encoder, plain_module, ragged

from segattn.rmt.recurrent import block_attention
from segattn.rmt.recurrent.layout import block_mask
from segattn.rmt.recurrent.memory import RecurrentMemory
from segattn.rmt.recurrent.state import RecurrentState
from segattn.rmt.segments import cut

MASKS = ("paper", "causal")


def visible_by_table(read: int, tokens: int, write: int, mask: str) -> Tensor:
    """Build the mask of the paper's figure 6d, block by block."""
    total = read + tokens + write
    visible = torch.ones(total, total).tril().bool()
    if mask == "paper":
        kinds = ["read"] * read + ["token"] * tokens + ["write"] * write
        for i, row in enumerate(kinds):
            for j, column in enumerate(kinds):
                visible[i, j] = {
                    "read": column == "read",
                    "token": column == "read" or (column == "token" and j <= i),
                    "write": True,
                }[row]
    return visible


def plain_decoder(module: RecurrentMemory, ids: Tensor, mask: str) -> tuple[Tensor, Tensor]:
    """Read one row in a plain loop over the model's calls, with masks made from the table."""
    model, embed = module.model, module.model.get_input_embeddings()
    memory, logits = module.memory[None], []
    for begin in range(0, ids.shape[1], L):
        x = torch.cat((memory, embed(ids[:, begin : begin + L]), memory), 1)
        time = x.shape[1]
        hidden_where = ~visible_by_table(M, time - 2 * M, M, mask)
        scores = torch.zeros(time, time, dtype=x.dtype).masked_fill(hidden_where, torch.finfo(x.dtype).min)
        arguments = {"attention_mask": scores[None, None], "position_ids": torch.arange(time)[None]}
        # it makes its own of both
        arguments = {} if model.config.model_type == "bloom" else arguments
        out = model(inputs_embeds=x, output_hidden_states=True, **arguments)
        memory = out.hidden_states[-1][:, -M:]
        logits.append(out.logits[:, M:-M])
    return torch.cat(logits, 1), memory


def plain_encoder(module: RecurrentMemory, ids: Tensor, first_len: int) -> tuple[Tensor, Tensor]:
    """Read a row as [first | memory | separator | tokens | separator], and return the logits of the last segment."""
    model, embed = module.model, module.model.get_input_embeddings()
    first, separator = embed(torch.tensor([[FIRST, SEPARATOR]])).split(1, 1)
    memory = module.memory[None]
    cuts = [0, *range(first_len, ids.shape[1], L), ids.shape[1]]
    for begin, end in pairwise(cuts):
        x = torch.cat((first, memory, separator, embed(ids[:, begin:end]), separator), 1)
        out = model(inputs_embeds=x, output_hidden_states=True)
        memory = out.hidden_states[-1][:, 1 : 1 + M]
    return out.logits, memory


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attention", [None, "segattn"])
@pytest.mark.parametrize("tokens", [1, 5, L])
def test_every_row_depends_on_what_the_table_says(mask: str, attention: str | None, tokens: int) -> None:
    module = decoder(mask=mask, attention=attention)
    x = torch.randn(1, tokens + 2 * M, 32, dtype=torch.float64, requires_grad=True)
    hidden = module._caller.whole(module._caller.shown(module.model), x, None, True).hidden
    depends = torch.stack(
        [torch.autograd.grad(row.square().sum(), x, retain_graph=True)[0][0].abs().sum(1) > 0 for row in hidden[0]]
    )
    assert torch.equal(depends, visible_by_table(M, tokens, M, mask))


@given(st.integers(0, 4), st.integers(0, 4), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_block_mask_of_padded_rows_is_that_of_each_alone(read: int, write: int, tokens: list[int]) -> None:
    time = read + max(tokens) + write
    lengths = torch.tensor([read + n + write for n in tokens])
    masks = block_mask(time, read, write, lengths)
    for own, length in zip(masks[:, 0], lengths.tolist(), strict=True):
        assert torch.equal(own[:length, :length], block_mask(length, read, write)[0, 0])
        assert not own[:length, length:].any()
        assert torch.equal(own[length:, length:], torch.eye(time - length, dtype=torch.bool))
    alone = block_mask(int(lengths[0]), read, write)[0, 0]
    expected = visible_by_table(read, tokens[0], write, "paper")
    assert torch.equal(alone[read : read + tokens[0]], expected[read : read + tokens[0]])


def test_an_encoder_sees_all() -> None:
    module = encoder()
    x = torch.randn(1, L, 32, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(1, M, 32, dtype=torch.float64, requires_grad=True)
    written, _ = module._segment(x, memory, None, False)
    for row in written[0]:
        for grad in torch.autograd.grad(row.square().sum(), (x, memory), retain_graph=True):
            assert (grad.abs().sum(2) > 0).all()


# those that keep arguments from their attention, or whose attention segment attention does not compute
OWN = ("stablelm", "nemotron", *models.REFUSED)
DECODERS = [
    (name, mask, attention)
    for name, mask, attention in product(models.TAKEN, MASKS, (None, "segattn"))
    if not (attention and name in OWN) and (name, mask) != ("bloom", "paper")
]


@pytest.mark.parametrize(("name", "mask", "attention"), DECODERS)
def test_decoder_equals_a_plain_loop(name: str, mask: str, attention: str | None, monkeypatch: Any) -> None:
    plain = decoder(name, mask=mask)
    if attention is not None:
        decoder(name, attention=attention)
    ids = models.tokens(1, 2 * L + 3)
    logits, memory = plain_decoder(plain, ids, mask)
    module = RecurrentMemory(plain.model, M, L, mask=mask, attention=attention)
    module.memory = plain.memory
    calls = []
    operation = block_attention.segment_attention
    monkeypatch.setattr(
        block_attention, "segment_attention", lambda *a, **k: calls.append(k["num_write"]) or operation(*a, **k)
    )
    out = module(ids)
    # Gemma 2 caps its scores in float32 when it is left as it is
    tolerance = 2e-6 if name == "gemma2" else 1e-10
    close(out.logits, logits, tolerance)
    close(out.state.memory, memory, tolerance)
    assert calls == ([] if attention is None else [M if mask == "paper" else 0] * 2 * 3)


@pytest.mark.parametrize("name", [name for name in OWN if name in models.TAKEN])
def test_a_fused_mask_is_refused_by_name(name: str) -> None:
    wanted = {
        "falcon": "a model whose attention can be chosen, got FalconForCausalLM",
        "bloom": "a model whose attention can be chosen, got BloomForCausalLM",
    }
    model = models.make(name)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=wanted.get(name, "must hand arguments on to its attention")):
        RecurrentMemory(model, M, L, attention="segattn")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("length", [1, L - 1, L, L + 1, 3 * L, 3 * L + 2])
def test_encoder_equals_a_plain_loop(length: int, alignment: str) -> None:
    module = encoder(alignment=alignment)
    ids = models.tokens(1, length)
    first_len = L if alignment == "left" else (length - 1) % L + 1
    logits, memory = plain_encoder(module, ids, first_len)
    out = module(ids)
    close(out.logits, logits)
    close(out.state.memory, memory)


def test_encoder_without_special_tokens() -> None:
    module = encoder("MaskedLM", special_tokens=None)
    ids = models.tokens(2, L + 2)
    memory, logits = module.memory.expand(2, -1, -1), []
    for piece in ids.split(L, 1):
        x = torch.cat((memory, module.embed(piece)), 1)
        out = module.model(inputs_embeds=x, output_hidden_states=True)
        memory = out.hidden_states[-1][:, :M]
        logits.append(out.logits[:, M:])
    out = module(ids)
    close(out.logits, torch.cat(logits, 1))
    close(out.state.memory, memory)


def test_special_ids_inside_the_text_stay() -> None:
    module = encoder()
    ids = models.tokens(1, L)
    ids[0, 2] = SEPARATOR
    changed = ids.clone()
    changed[0, 2] = 9
    assert not torch.allclose(module(ids).logits, module(changed).logits)
    close(module(ids).logits, plain_encoder(module, ids, L)[0])


@pytest.mark.parametrize("mask", MASKS)
def test_any_module_that_takes_embeddings(mask: str) -> None:
    module = plain_module(mask=mask)
    ids = models.tokens(2, 2 * L + 1)
    memory, logits = module.memory.expand(2, -1, -1), []
    for piece in ids.split(L, 1):
        x = torch.cat((memory, module.model.embedding(piece), memory), 1)
        visible = visible_by_table(M, piece.shape[1], M, mask)[None, None]
        hidden = module.model(x, visible)
        memory = hidden[:, -M:]
        logits.append(module.head(hidden[:, M:-M]))
    out = module(ids)
    close(out.logits, torch.cat(logits, 1))
    close(out.state.memory, memory)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: decoder(mask="paper", **k),
        lambda **k: decoder(mask="causal", **k),
        lambda **k: decoder("gpt2", attention="segattn", **k),
        lambda **k: decoder("opt", **k),
        lambda **k: encoder(loss="all", **k),
        lambda **k: encoder("TokenClassification", **k),
        lambda **k: plain_module(**k),
        lambda **k: plain_module("encoder", **k),
    ],
    ids="paper causal fused opt encoder tokens module encoder-module".split(),
)
def test_padded_rows_equal_each_alone(make: Any, alignment: str, side: str) -> None:
    module, lengths = make(alignment=alignment), [1, 2 * L + 5, L, 3 * L + 1]
    width = 3 * L + 4
    ids, mask = models.tokens(4, width), ragged(lengths, side, width)
    out = module(ids, mask)
    per_row = out.logits.ndim == 2
    labels = torch.arange(4) % 5 if per_row else ids % 5
    module.zero_grad()
    together = module(ids, mask, labels)
    together.loss.backward()
    gradient = module.memory.grad.clone()
    module.zero_grad()
    losses, counts = [], []
    for row in range(4):
        own = mask[row].bool()
        alone = module(ids[row : row + 1, own])
        close(out.logits[row : row + 1] if per_row else out.logits[row : row + 1, own], alone.logits)
        close(out.state.memory[row], alone.state.memory[0])
        target = labels[row : row + 1] if per_row else labels[row : row + 1, own]
        losses.append(module(ids[row : row + 1, own], labels=target).loss)
        segments = cut([(0, lengths[row])], L, alignment)
        whole = module.settings.loss == "all"
        count = lengths[row] if whole else segments[-1].longest
        counts.append((len(segments) if whole else 1) if per_row else count - (module.settings.kind == "decoder"))
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    close(together.loss, mean)
    mean.backward()
    close(gradient, module.memory.grad, 1e-9)
    if not per_row:
        assert (out.logits[~mask.bool()] == 0).all()


def reach(module: RecurrentMemory, rows: list[int], **call: Any) -> list[list[bool]]:
    """Return for each row whether the tokens of each segment get a gradient from the row's last."""
    width = max(rows)
    embeds = torch.randn(len(rows), width, module.memory.shape[1], dtype=torch.float64, requires_grad=True)
    ids = models.tokens(len(rows), width) % 5
    labels = torch.arange(len(rows)) if module.settings.kind == "encoder" else ids
    module(inputs_embeds=embeds, attention_mask=ragged(rows, "right", width), labels=labels, **call).loss.backward()
    found = []
    for row, length in enumerate(rows):
        spans = cut([(0, length)], L, module.settings.alignment)
        found.append([bool(embeds.grad[row, s.begin[0] : s.end[0]].abs().sum() > 0) for s in spans])
    return found


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("bptt", [1, 2, 3, None])
@pytest.mark.parametrize("make", [decoder, encoder])
def test_gradients_reach_so_many_real_segments(make: Any, bptt: int | None, checkpoint: bool) -> None:
    module = make(bptt=bptt, loss="last", checkpoint=checkpoint)
    rows = [5 * L - 1, 2 * L + 3, 4]
    counts = [5, 3, 1]
    expected = [[bptt is None or left <= bptt for left in range(count, 0, -1)] for count in counts]
    assert reach(module, rows) == expected
    if bptt is not None and bptt < 5:
        alone = make(bptt=bptt, loss="last", checkpoint=checkpoint)
        reach(alone, [5 * L])
        grad = alone.memory.grad
        assert grad is None or (grad == 0).all()


@pytest.mark.parametrize("bptt", [1, 2, 3])
def test_where_all_segments_have_a_loss_the_graph_is_cut_every_so_many(bptt: int) -> None:
    module = decoder(bptt=bptt)
    width = 7 * L
    embeds = torch.randn(1, width, 32, dtype=torch.float64, requires_grad=True)
    ids = models.tokens(1, width)
    for at in range(7):
        labels = torch.full_like(ids, -100)
        labels[:, at * L + 1] = ids[:, at * L + 1]
        (grad,) = torch.autograd.grad(module(inputs_embeds=embeds, labels=labels).loss, embeds)
        got = [bool(own.abs().sum() > 0) for own in grad[0].split(L)]
        # borders at 7 - bptt, 7 - 2 bptt, ...
        first = max(7 - bptt * -(-(7 - at) // bptt), 0)
        assert got == [first <= s <= at for s in range(7)]


def test_gradients_equal_those_of_a_plain_loop_and_of_a_checkpointed_one() -> None:
    ids = models.tokens(1, 3 * L + 2)
    grads = []
    for checkpoint in (None, False, True):
        module = decoder(checkpoint=bool(checkpoint))
        logits = plain_decoder(module, ids, "paper")[0] if checkpoint is None else module(ids).logits
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
        if checkpoint is not None:
            own = module(ids, labels=ids).loss
            close(own, loss)
            loss = own
        loss.backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    for name, grad in grads[0].items():
        close(grads[1][name], grad, 1e-8)
        close(grads[2][name], grad, 1e-8)


def test_gradients_through_the_state_and_none_beyond_the_reach() -> None:
    ids = models.tokens(2, 2 * L)
    for bptt, reached in ((None, True), (3, True), (2, False), (1, False)):
        module = decoder(bptt=bptt, loss="last")
        state = RecurrentState(torch.randn(2, M, 32, dtype=torch.float64, requires_grad=True))
        module(ids, labels=ids, state=state).loss.backward()
        assert (state.memory.grad is not None and bool(state.memory.grad.abs().sum() > 0)) == reached


@pytest.mark.parametrize("make", [decoder, lambda: encoder("TokenClassification"), plain_module])
def test_pieces_equal_the_whole(make: Any) -> None:
    module, ids = make(), models.tokens(2, 4 * L + 3)
    whole = module(ids)
    whole.state.memory.square().sum().backward()
    gradient = module.memory.grad.clone()
    module.zero_grad()
    state, logits = None, []
    for piece in (ids[:, : 2 * L], ids[:, 2 * L : 3 * L], ids[:, 3 * L :]):
        out = module(piece, state=state)
        state = out.state
        logits.append(out.logits)
    close(torch.cat(logits, 1), whole.logits)
    state.memory.square().sum().backward()
    close(module.memory.grad, gradient, 1e-8)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_state_of_inference_mode_goes_on_in_training(checkpoint: bool) -> None:
    module, ids = decoder(checkpoint=checkpoint, bptt=2), models.tokens(2, 4 * L)
    with torch.inference_mode():
        state = module(ids[:, :L]).state
    gradients = []
    for own in (state, RecurrentState(state.memory.clone())):
        module.zero_grad()
        module(ids[:, L:], ragged([3 * L, L - 2], "right", 3 * L), ids[:, L:], state=own).loss.backward()
        gradients.append([p.grad for p in module.model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_nothing_is_kept_on_the_module_between_calls() -> None:
    module, ids = decoder(), models.tokens(2, 3 * L)
    one, two = module(ids[:1]), module(ids[1:])
    states: list[Any] = [None, None]
    for begin in range(0, 3 * L, L):
        for row in (0, 1):
            states[row] = module(ids[row : row + 1, begin : begin + L], state=states[row]).state
    close(states[0].memory, one.state.memory)
    close(states[1].memory, two.state.memory)
    close(module(ids[:1], state=module.initial_state(1)).logits, one.logits)


def test_loss_of_one_segment_is_the_models_own() -> None:
    module, ids = decoder(mask="causal"), models.tokens(3, L)
    memory = module.memory.expand(3, -1, -1)
    x = torch.cat((memory, module.embed(ids), memory), 1)
    labels = torch.full((3, L + 2 * M), -100)
    labels[:, M : M + L] = ids
    # the first token is predicted by the last read row there, and by nothing here
    labels[:, M] = -100
    # their loss is float32
    close(module(ids, labels=ids).loss.float(), module.model(inputs_embeds=x, labels=labels).loss, 1e-6)


def test_losses_of_all_and_of_the_last_segment() -> None:
    ids = models.tokens(1, 2 * L + 3)
    logits = decoder()(ids).logits[0]
    each = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    close(decoder()(ids, labels=ids).loss, each.mean())
    close(decoder(loss="last")(ids, labels=ids).loss, each[2 * L :].mean())
    labels = ids.clone()
    labels[:, : L + 1] = -100
    # the logit that predicts token L + 1 is that of token L, in the second segment
    close(decoder()(ids, labels=labels).loss, each[L:].mean())
    assert decoder()(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_encoder_losses() -> None:
    ids, labels = models.tokens(2, 2 * L + 3), torch.tensor([1, 4])
    per_segment, state = [], None
    for piece in ids.split(L, 1):
        out = encoder()(piece, state=state)
        per_segment.append(F.cross_entropy(out.logits, labels))
        state = out.state
    close(encoder()(ids, labels=labels).loss, per_segment[-1])
    close(encoder(loss="all")(ids, labels=labels).loss, torch.stack(per_segment).mean())
    tokens = encoder("TokenClassification", loss="all")
    target = ids % 5
    close(tokens(ids, labels=target).loss, F.cross_entropy(tokens(ids).logits.flatten(0, 1), target.flatten()))


def test_logits_are_kept_when_asked_for() -> None:
    module, ids = decoder(), models.tokens(1, 2 * L)
    assert module(ids, labels=ids).logits is None
    assert module(ids, output_logits=False).logits is None
    close(module(ids, labels=ids, output_logits=True).logits, module(ids).logits)
    # a row's class costs nothing to keep
    assert encoder()(ids, labels=torch.tensor([1])).logits is not None
    assert encoder("TokenClassification")(ids, labels=ids % 5).logits is None


def test_the_head_runs_only_where_its_logits_are_wanted() -> None:
    module, ids = encoder(), models.tokens(1, 4 * L)
    rows: list[Any] = []
    module.head = lambda first: rows.append(first.shape) or first
    module(ids, output_logits=False)
    assert rows == [(1, 32)]


class Alive(TorchDispatchMode):
    """A count of the most bytes of tensors, made under it, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x._base is None:
                self.now += x.nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(x, self._freed, x.nbytes)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("make", [decoder, encoder])
def test_bytes_alive_without_gradients_do_not_grow_with_the_segments(make: Any) -> None:
    module, most = make(), []
    for segments in (2, 3, 20):
        ids = models.tokens(1, segments * L)
        with torch.no_grad(), Alive() as alive:
            module(ids, output_logits=False)
        most.append(alive.most)
    assert most[0] > M * 32 * 8
    assert most[1] == most[2]


def test_rows_of_earlier_layers_are_not_kept() -> None:
    most = []
    for depth in (2, 8):
        module = RecurrentMemory(models.make(num_hidden_layers=depth), M, 40, mask="causal")
        with torch.no_grad(), Alive() as alive:
            module(models.tokens(1, 80), output_logits=False)
        most.append(alive.most)
    assert most[0] == most[1]
