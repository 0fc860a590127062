"""Training of converted models: gradients, checkpointing, half precision, Trainer, Accelerate, DDP and FSDP2."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import ranks
from forks import fork
from models import CHOSEN, NAMES, converted, make, tokens
from sharding import HALF

import segattn

L = 16


def training(name: str = "llama") -> Any:
    """Return a converted model in training mode."""
    return converted(name, L).train()


def gradients(model: Any, ids: Tensor, **arguments: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **arguments).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal_gradients(mine: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert mine.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(mine[name], grad, rtol=tolerance, atol=tolerance * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("name", CHOSEN)
def test_gradients_reach_gates_and_cross_segments(name: str) -> None:
    model = training(name)
    embeddings = model.get_input_embeddings()(tokens(1, 3 * L)).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits[:, -1].square().sum().backward()
    assert (embeddings.grad[0, :L].abs().amax(1) > 0).all()
    gates = [p.grad for n, p in model.named_parameters() if "segattn_gate" in n]
    assert len(gates) == 2
    assert all((grad != 0).all() for grad in gates)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model, ids = training(name), tokens(2, 3 * L + 5)
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_gradients(gradients(model, ids), plain)


def test_half_precision_under_autocast_and_in_the_weights() -> None:
    model, ids = training(), tokens(2, 3 * L + 5)
    plain = gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        under = gradients(model, ids)
    model.to(torch.bfloat16)
    gate = model.model.layers[0].self_attn.segattn_gate.bias
    assert gate.dtype == torch.float32
    inside = gradients(model, ids)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.segattn_gate.bias"):
        for mine in (under[name], inside[name].float()):
            assert torch.cosine_similarity(mine.flatten(), plain[name].flatten(), 0) > 0.95


def warned(call: Any) -> list[str]:
    """Return the texts of the warnings of untrained memory that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if one.category is segattn.UntrainedMemoryWarning]


def test_texts_that_read_no_memory_are_warned_of_once(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )

    def train(model: Any, time: int) -> None:
        rows = [{"input_ids": row, "labels": row} for row in tokens(8, time)]
        transformers.Trainer(model, arguments, train_dataset=rows).train()

    said = (
        f"input_ids must be longer than segment_len, {L}, for a text to read its memory, got texts of at most {L} tok"
    )
    model = training()
    [message] = warned(lambda: train(model, L))
    assert said in message
    assert not warned(lambda: train(model, L))
    assert not warned(lambda: train(training(), L + 1))


def test_texts_that_read_no_memory_are_warned_of_only_in_training_without_a_cache() -> None:
    model, ids = training(), tokens(2, 3 * L)

    def quiet() -> None:
        model(ids)
        segattn.backward_in_pieces(model, ids, L)
        model(ids[:, :L], use_cache=True)
        with torch.no_grad():
            model(ids[:, :L])
        model.eval()(ids[:, :L])
        torch._dynamo.reset()
        torch.compile(model.train(), fullgraph=True, backend="aot_eager")(ids[:, :L], use_cache=False)

    assert not warned(quiet)
    # padding is no text
    mask = torch.ones_like(ids)
    mask[:, L:] = 0
    [message] = warned(lambda: model(ids, attention_mask=mask))
    assert f"at most {L} tokens" in message


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q", "max_length_q"])
def test_packed_texts_that_read_no_memory_are_warned_of(how: str) -> None:
    def packed(*lengths: int) -> dict[str, Any]:
        if how == "position_ids":
            return {how: torch.cat([torch.arange(n) for n in lengths])[None]}
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {"cu_seq_lens_q": bounds} | ({how: max(lengths)} if how == "max_length_q" else {})

    model, ids = training(), tokens(1, 3 * L)
    assert not warned(lambda: model(ids, **packed(L + 1, L, L - 1)))
    assert len(warned(lambda: model(ids, **packed(L, L - 1, L, 1)))) == 1


def test_training_compiles_whole() -> None:
    model = training()
    ids = tokens(2, 3 * L)
    plain = gradients(model, ids)
    torch._dynamo.reset()
    assert_equal_gradients(
        gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), ids),
        {f"_orig_mod.{n}": g for n, g in plain.items()},
    )


def test_groups_of_an_optimiser() -> None:
    groups = segattn.parameter_groups(training(), 1e-4)
    rates = {group["lr"]: group for group in groups if group["lr"] == 1e-2}
    assert [p.shape for p in rates[1e-2]["params"]] == [(4,), (4,)]
    assert rates[1e-2]["weight_decay"] == 0


def test_trainer_moves_saves_and_does_not_decay_the_gates(tmp_path: Path) -> None:
    model = training()
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 3 * L)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.5,
        report_to=[],
        use_cpu=True,
        save_steps=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        disable_tqdm=True,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "segattn_gate" in n}
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    decayed = next(group for group in trainer.optimizer.param_groups if group["weight_decay"])["params"]
    assert not {id(p) for n, p in model.named_parameters() if "segattn_gate" in n} & {id(p) for p in decayed}
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for name, gate in before.items():
        assert (saved[name] != gate).all()


def test_accelerate_trains_the_gates() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = training()
    optimizer = torch.optim.AdamW(segattn.parameter_groups(model, 1e-3))
    model, optimizer = accelerator.prepare(model, optimizer)
    gate = accelerator.unwrap_model(model).model.layers[0].self_attn.segattn_gate.bias
    before, losses = gate.detach().clone(), []
    for _ in range(6):
        with accelerator.accumulate(model):
            ids = tokens(2, 3 * L)
            loss = model(ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert (gate != before).all()
    assert losses[-1] < losses[0]


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Train with DDP on texts of one segment, and with FSDP2 on longer ones, whose gates the first rank then saves."""
    for rank in fork(2, ranks.train, 2, str(tmp_path), folder=tmp_path, timeout=600):
        assert rank.code == 0, rank.said[-3000:]
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for step in range(3):
        assert_equal_gradients(results[f"ddp {step}"], gradients(training(), tokens(2, L - 3, step)))
    whole = gradients(training(), tokens(2, 3 * L + 5))
    for kind in ("plain", "checkpointed", "pieces"):
        assert_equal_gradients(results[f"fsdp {kind}"], whole)
    for way in HALF:
        for name, grad in results[f"half {way}"].items():
            assert torch.cosine_similarity(grad.flatten().float(), whole[name].flatten(), 0) > 0.95, name
    assert not (tmp_path / "gates of rank 1").exists()
    loaded = segattn.load_gates(make(), tmp_path / "gates of rank 0", quiet=True)
    for name, gate in converted(segment_len=L).named_parameters():
        if "segattn_gate" in name:
            assert torch.equal(loaded.get_parameter(name), gate)
