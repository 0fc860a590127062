"""Long texts in pieces: loss and gradient are those of the whole text, and truncation cuts where it should."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

transformers = pytest.importorskip("transformers")

import models
from models import make, tokens

import segattn
from segattn.bench.speed.measure import peak_bytes
from segattn.infini.huggingface.pieces import backward_in_pieces, loss_in_pieces, read_in_pieces

L = 16
# a whole number of segments, and two that are not
LENGTHS = (2 * L, 23, 7)


def converted(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return models.converted(name, L, **changes).to(dtype).train()


def gradient(model: Any) -> Tensor:
    """Return the gradient of all parameters as one vector, and reset it."""
    found = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    model.zero_grad()
    return found


def whole_gradient(model: Any, ids: Tensor, labels: Tensor | None = None) -> Tensor:
    logits = model(ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), (ids if labels is None else labels)[:, 1:].flatten()).backward()
    return gradient(model)


def share(error: Tensor, of: Tensor) -> float:
    return (error.norm() / of.norm()).item()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_gradient_is_that_of_the_whole_text(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, ids = converted(name, dtype), tokens(2, 75)
    wanted = whole_gradient(model, ids)
    for length in LENGTHS:
        backward_in_pieces(model, ids, length)
        assert share(gradient(model) - wanted, wanted) < tolerance
    backward_in_pieces(model, ids, 23, truncate=4)
    assert share(gradient(model) - wanted, wanted) < tolerance
    # a cut that changed nothing would be none
    backward_in_pieces(model, ids, 23, truncate=1)
    assert share(gradient(model) - wanted, wanted) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("truncate", [None, 2])
def test_gradient_checkpointing_changes_nothing(name: str, truncate: int | None) -> None:
    model, ids = converted(name), tokens(2, 75)
    backward_in_pieces(model, ids, 23, truncate=truncate)
    wanted = gradient(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    backward_in_pieces(model, ids, 23, truncate=truncate)
    assert share(gradient(model) - wanted, wanted) < 1e-6


def test_layers_that_slide_keep_their_keys_between_pieces() -> None:
    kinds = ["sliding_attention", "full_attention"]
    model, ids = converted("gemma3_text", sliding_window=11, layer_types=kinds), tokens(2, 75)
    wanted = whole_gradient(model, ids)
    backward_in_pieces(model, ids, 23)
    assert share(gradient(model) - wanted, wanted) < 1e-5


def test_loss_loses_no_token() -> None:
    model, ids = converted(), tokens(3, 75)
    labels = ids.masked_fill(torch.rand(3, 75) < 0.3, -100)
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    for given, targets in ((None, ids[:, 1:]), (labels, labels[:, 1:])):
        wanted = F.cross_entropy(logits, targets.flatten())
        for length in (*LENGTHS, 1, 75, 100):
            assert loss_in_pieces(model, ids, length, labels=given).item() == pytest.approx(wanted.item(), rel=1e-5)
        # pieces may hold none
        assert sum(piece.tokens for piece in read_in_pieces(model, ids, 1, labels=given)) == (targets != -100).sum()
        read = backward_in_pieces(model, ids, 23, labels=given, truncate=1)
        assert read.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert read.tokens == (targets != -100).sum()


def test_labels_and_text_may_be_int32() -> None:
    model, ids = converted(), tokens(1, 40)
    labels = ids.clone()
    labels[:, :9] = -100
    wanted = loss_in_pieces(model, ids, L, labels=labels)
    assert torch.equal(loss_in_pieces(model, ids, L, labels=labels.int()), wanted)
    assert torch.equal(loss_in_pieces(model, ids.int(), L), loss_in_pieces(model, ids, L))
    assert torch.equal(backward_in_pieces(model, ids.int(), L, labels=labels.int()).loss, wanted.detach())


def test_scale_multiplies_the_gradient_alone() -> None:
    model, ids = converted(), tokens(2, 50)
    plain = backward_in_pieces(model, ids, 23)
    wanted = gradient(model)
    scaled = backward_in_pieces(model, ids, 23, scale=0.25, truncate=3)
    assert scaled.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert share(4 * gradient(model) - wanted, wanted) < 1e-6


def test_padded_rows_count_as_alone() -> None:
    model, ids = converted(), tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :37] = 0
    alone = [loss_in_pieces(model, ids[:1, 37:], 23) * 22, loss_in_pieces(model, ids[1:], 23) * 59]
    for length in LENGTHS:
        together = loss_in_pieces(model, ids, length, attention_mask=mask)
        assert together.item() == pytest.approx((sum(alone) / 81).item(), rel=1e-5)


def test_logits_and_cache_are_those_of_one_reading() -> None:
    model, ids = converted().eval(), tokens(2, 75)
    with torch.no_grad():
        wanted = model(ids, use_cache=True)
        pieces = list(read_in_pieces(model, ids, 23, keep_logits=True))
        assert [piece.logits.shape[1] for piece in pieces] == [23, 23, 23, 6]
        found = torch.cat([piece.logits for piece in pieces], 1)
        torch.testing.assert_close(found, wanted.logits, rtol=1e-4, atol=1e-4)
        assert all(piece.logits is None for piece in read_in_pieces(model, ids, 23))
        # caches given and left are values: what is read later is not seen in them
        first = next(read_in_pieces(model, ids[:, :40], 40)).cache
        again = [list(read_in_pieces(model, ids[:, 40:], 9, cache=first, keep_logits=True)) for _ in range(2)]
        assert first.get_seq_length() == 40
        for pieces in again:
            found = torch.cat([piece.logits for piece in pieces], 1)
            torch.testing.assert_close(found, wanted.logits[:, 40:], rtol=1e-4, atol=1e-4)
            assert [piece.cache.get_seq_length() for piece in pieces] == [49, 58, 67, 75]


def test_nothing_flows_back_beyond_a_cut() -> None:
    model, ids = converted(), tokens(1, 6 * L)
    read: list[Tensor] = []

    def keep(module: Any, arguments: Any, output: Tensor) -> Tensor:
        read.append(output.detach().requires_grad_())
        return read[-1]

    model.get_input_embeddings().register_forward_hook(keep)
    losses = [piece.loss_sum for piece in read_in_pieces(model, ids, L, detach_every=2)]
    for index, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, read, retain_graph=True, allow_unused=True)
        reached = [grad is not None and bool(grad.abs().sum() > 0) for grad in grads]
        assert reached == [index // 2 * 2 <= piece <= index for piece in range(6)]
    uncut = list(read_in_pieces(model, ids, L))[-1]
    assert all((torch.autograd.grad(uncut.loss_sum, x, retain_graph=True)[0] != 0).any() for x in read[6:])


def test_a_cache_is_cut_only_by_its_owner() -> None:
    model, ids = converted(), tokens(1, 4 * L)
    labels = ids.clone()
    # which neither half predicts
    labels[:, 2 * L] = -100
    wanted = whole_gradient(model, ids, labels)
    first, second = ids.split(2 * L, dim=1)
    before = next(read_in_pieces(model, first, 2 * L))
    after = next(read_in_pieces(model, second, 2 * L, cache=before.cache))
    ((before.loss_sum + after.loss_sum) / (4 * L - 2)).backward()
    assert share(gradient(model) - wanted, wanted) < 1e-5
    before = next(read_in_pieces(model, first, 2 * L))
    after = next(read_in_pieces(model, second, 2 * L, cache=before.cache.detach()))
    ((before.loss_sum + after.loss_sum) / (4 * L - 2)).backward()
    assert share(gradient(model) - wanted, wanted) > 1e-3
    left = backward_in_pieces(model, ids, L).cache
    assert not any(x.requires_grad for state in left.states.values() for x in state.tensors())


def test_truncation_bounds_what_is_held() -> None:
    model = converted()

    def peak(segments: int, truncate: int | None) -> int:
        ids = tokens(1, segments * L)
        return peak_bytes(lambda: backward_in_pieces(model, ids, L, truncate=truncate), torch.device("cpu"))

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert peak(24, 2) < 1.1 * peak(8, 2)
    assert peak(24, None) > 2 * peak(8, None)


def test_checkpointing_that_would_lose_gradients_is_refused() -> None:
    model, ids = converted(), tokens(1, 40)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="model must checkpoint gradients with use_reentrant=False"):
        backward_in_pieces(model, ids, L)
    # nothing is lost where there is no gradient
    with torch.no_grad():
        loss_in_pieces(model, ids, L)
    loss_in_pieces(model.eval(), ids, L)
    kinds = ["sliding_attention", "full_attention"]
    mixed = converted("gemma3_text", sliding_window=11, layer_types=kinds)
    mixed.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"must not checkpoint gradients while layers \[0\] are not converted"):
        read_in_pieces(mixed, ids, L)


def checkpointed(model: Any, way: str) -> Any:
    """Return the model with gradient checkpointing that runs layers without gradients first."""
    if way == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    else:
        wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
        layers = model.model.layers
        for index, layer in enumerate(layers):
            layers[index] = wrap(layer)
    return model


@pytest.mark.parametrize("way", ["transformers", "torch"])
def test_reentrant_checkpointing_is_refused_wherever_a_state_is_kept(way: str) -> None:
    model, ids = checkpointed(converted(), way), tokens(1, 40)
    message = "model must checkpoint gradients with use_reentrant=False where past_key_values is kept"
    with pytest.raises(ValueError, match=message):
        backward_in_pieces(model, ids, L)
    with pytest.raises(ValueError, match=message):
        model(ids, use_cache=True)
    cache = segattn.InfiniCache(model)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    before = cache.states
    with pytest.raises(ValueError, match=message):
        model(ids[:, 20:], past_key_values=cache)
    assert cache.get_seq_length() == 20
    assert all(x is y for layer in before for x, y in zip(cache.states[layer], before[layer], strict=True))
    # a text by itself leaves no state
    wanted = whole_gradient(converted(), ids)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    assert share(whole_gradient(model, ids) - wanted, wanted) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_checkpointing_that_drops_the_keys_of_other_layers_is_refused(name: str) -> None:
    model, ids = segattn.convert(make(name), L, layers=[1], quiet=True).train(), tokens(1, 40)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cache = segattn.InfiniCache(model)
    with pytest.raises(RuntimeError, match=r"layers \[0\], which are not converted, left no keys"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"piece_len": 0}, ValueError, "piece_len must be at least 1, got 0"),
        ({"piece_len": 2.0}, TypeError, "piece_len must be an int"),
        ({"detach_every": 0}, ValueError, "detach_every must be at least 1, got 0"),
        ({"input_ids": torch.ones(40, dtype=torch.long)}, ValueError, r"input_ids must be integers \[B, T\]"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, ValueError, "input_ids must be .* at least one token"),
        ({"input_ids": torch.ones(1, 9)}, ValueError, "input_ids must be integers .* got torch.float32"),
        (
            {"input_ids": torch.ones(1, 9, dtype=torch.uint8)},
            ValueError,
            "input_ids must be integers .* got torch.uint8",
        ),
        ({"input_ids": [[1, 2]]}, TypeError, r"input_ids must be a tensor of integers \[B, T\], got list"),
        ({"attention_mask": [[1, 1]]}, TypeError, r"attention_mask must be a tensor of integers \[B, T\], got list"),
        ({"labels": torch.ones(1, 39, dtype=torch.long)}, ValueError, r"labels must be .*\[1, 40\], got \[1, 39\]"),
        ({"attention_mask": torch.ones(1, 39)}, ValueError, r"attention_mask must be \[1, 40\], got \[1, 39\]"),
        ({"labels": torch.full((1, 40), -100)}, ValueError, "labels must hold a token to predict"),
        ({"labels": torch.ones(1, 40)}, TypeError, "labels must be an int32 or int64 tensor, got torch.float32"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input_ids": tokens(1, 40), "piece_len": L} | arguments
    with pytest.raises(error, match=message):
        loss_in_pieces(converted(), **given)
    if "detach_every" not in arguments:
        with pytest.raises(error, match=message):
            backward_in_pieces(converted(), **given)


def test_models_that_cannot_are_named() -> None:
    with pytest.raises(ValueError, match="model must be converted"):
        loss_in_pieces(make(), tokens(1, 40), L)
    with pytest.raises(TypeError, match="model must return logits"):
        loss_in_pieces(converted().model, tokens(1, 40), L)
    with pytest.raises(ValueError, match="truncate must be at least 1, got 0"):
        backward_in_pieces(converted(), tokens(1, 40), L, truncate=0)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, 20:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        loss_in_pieces(converted(), tokens(1, 40), L, attention_mask=mask)
