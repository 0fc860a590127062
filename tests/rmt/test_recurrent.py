"""Tests of `RecurrentMemory` against a plain loop over the model's calls, and of the laws of its mechanism."""

import copy
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

import models

from segattn.rmt.recurrent import block_attention
from segattn.rmt.recurrent.layout import block_mask
from segattn.rmt.recurrent.memory import RecurrentMemory, add_noise
from segattn.rmt.recurrent.state import RecurrentState
from segattn.rmt.segments import cut

M, L = 3, 7
MASKS = ("paper", "causal")
FIRST, SEPARATOR = 1, 2


def decoder(name: str = "llama", **options: Any) -> RecurrentMemory:
    if name == "gpt2" and options.get("attention") and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("GPT-2 tells its attention nothing before transformers 5")
    torch.manual_seed(1)
    return RecurrentMemory(models.make(name).double(), M, L, **options)


def encoder(head: str = "SequenceClassification", classes: int = 5, **options: Any) -> RecurrentMemory:
    config = transformers.BertConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=L + M + 3,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"BertFor{head}")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return RecurrentMemory(model, M, L, **{"special_tokens": (FIRST, SEPARATOR), **options})


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
        out = model(
            inputs_embeds=x,
            attention_mask=scores[None, None],
            position_ids=torch.arange(time)[None],
            output_hidden_states=True,
        )
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


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ragged(lengths: list[int], side: str, width: int) -> Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : length if side == "right" else width] = 1
        if side == "left":
            mask[row, : width - length] = 0
    return mask


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attention", [None, "segattn"])
@pytest.mark.parametrize("tokens", [1, 5, L])
def test_every_row_depends_on_what_the_table_says(mask: str, attention: str | None, tokens: int) -> None:
    module = decoder(mask=mask, attention=attention)
    x = torch.randn(1, tokens + 2 * M, 32, dtype=torch.float64, requires_grad=True)
    hidden = module._caller.whole(module.model, x, None, True).hidden
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


@pytest.mark.parametrize("attention", [None, "segattn"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", models.NAMES)
def test_decoder_equals_a_plain_loop(name: str, mask: str, attention: str | None, monkeypatch: Any) -> None:
    plain = decoder(name)
    if attention is not None:
        decoder(name, attention=attention)
    ids = models.tokens(1, 2 * L + 3)
    logits, memory = plain_decoder(plain, ids, mask)
    calls = []
    operation = block_attention.segment_attention
    monkeypatch.setattr(
        block_attention, "segment_attention", lambda *a, **k: calls.append(k["num_write"]) or operation(*a, **k)
    )
    module = RecurrentMemory(plain.model, M, L, mask=mask, attention=attention)
    module.memory = plain.memory
    out = module(ids)
    # Gemma 2 caps its scores in float32 when it is left as it is
    tolerance = 2e-6 if name == "gemma2" else 1e-10
    close(out.logits, logits, tolerance)
    close(out.state.memory, memory, tolerance)
    assert calls == ([] if attention is None else [M if mask == "paper" else 0] * 2 * 3)


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


class Plain(nn.Module):
    """A model that is not of Hugging Face: one layer of attention, with the caller's mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, 16)
        self.mix = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        time = inputs_embeds.shape[1]
        position = torch.linspace(0, 1, 40)[:time, None].to(inputs_embeds)
        q, k, v = (self.mix(inputs_embeds + position) * 3)[:, None].chunk(3, -1)
        return inputs_embeds + self.out(F.scaled_dot_product_attention(q, k, v, attention_mask)[:, 0])


def plain_module(kind: str = "decoder", **options: Any) -> RecurrentMemory:
    torch.manual_seed(0)
    model = Plain().double()
    head = nn.Linear(16, models.VOCABULARY).double()
    return RecurrentMemory(model, M, L, kind=kind, embedding=model.embedding, head=head, **options)


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
        ({"input_ids": ids.float()}, "input_ids must be an integer tensor, got torch.float32"),
        ({"input_ids": ids[0]}, r"input_ids must have shape \[B, T\], got \[9\]"),
        ({"input_ids": ids[:, :0]}, r"input_ids must have a row and a token in it, got shape \[2, 0\]"),
        ({"inputs_embeds": torch.zeros(2, 3, 8)}, r"inputs_embeds must have shape \[B, T, d = 32\], got \[2, 3, 8\]"),
        ({"input_ids": ids, "labels": ids[:, 1:]}, r"labels must have shape \[B, T\] = \[2, 9\], got \[2, 8\]"),
        ({"input_ids": ids, "labels": ids[:, 0]}, r"labels must have shape \[B, T\] = \[2, 9\], got \[2\]"),
        ({"input_ids": ids, "labels": ids.float()}, "labels must be an integer tensor, got torch.float32"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, r"attention_mask must have shape \[B, T\] = \[2, 9\]"),
        ({"input_ids": ids, "attention_mask": mask * 0}, "must have a token in every row, got row 0 without one"),
        (
            {"input_ids": ids, "attention_mask": mask.index_fill(1, torch.tensor([4]), 0)},
            "must have a row's tokens side by side, got padding between those of row 0",
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
        ("BloomConfig", {"n_layer": 2, "n_head": 4}, "mask must be 'causal' for a BloomForCausalLM, which takes no"),
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


def bert(kind: str = "BertLMHeadModel", **options: Any) -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**sizes, intermediate_size=32, **options)).eval()


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


def test_a_decoder_that_classifies_rows_is_refused() -> None:
    config = models.make("gpt2").config
    module = RecurrentMemory(transformers.GPT2ForSequenceClassification(config).eval(), M, L)
    with pytest.raises(TypeError, match="got GPT2ForSequenceClassification, which classifies rows: pass head="):
        module(models.tokens(1, L))


def test_what_generate_is_given() -> None:
    module, ids = decoder(), models.tokens(2, L)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (
            ids,
            {"state": module.initial_state(3)},
            r"state must have shape \[B, m, d\] = \[2, 3, 32\], got \[3, 3, 32\]",
        ),
        (ids, {"state": module.memory}, "state must be a RecurrentState, got Parameter"),
        (ids[:, :0], {}, r"input_ids must have a row and a token in it, got shape \[2, 0\]"),
        (ids[0], {}, r"input_ids must have shape \[B, T\], got \[7\]"),
        (ids.tolist(), {}, "input_ids must be an integer tensor, got list"),
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
