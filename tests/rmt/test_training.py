"""Tests of both memories under Hugging Face's Trainer, and of checkpointing by the names that it calls."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import models

from segattn.rmt.associative.memory import AssociativeMemory
from segattn.rmt.recurrent.memory import RecurrentMemory

M, L = 2, 5
MEMORIES: list[Callable[[], Any]] = [
    lambda: RecurrentMemory(models.make(), M, L),
    lambda: AssociativeMemory(models.make(), M, L, d_mem=4),
]


def trained(memory: Any, folder: Path, loss: Any = None, **options: Any) -> dict[str, Tensor]:
    """Train for three steps, and return the parameters."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in models.tokens(6, 3 * L + 2)]
    transformers.Trainer(memory, arguments, train_dataset=data, compute_loss_func=loss).train()
    return {name: p.detach() for name, p in memory.named_parameters()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", MEMORIES, ids=["recurrent", "associative"])
def test_the_trainer_trains_and_checkpoints_what_it_trains(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = make()
    begin = {name: p.detach().clone() for name, p in plain.named_parameters()}
    expected = trained(plain, tmp_path)
    torch.manual_seed(0)
    memory = make()
    found = trained(memory, tmp_path, gradient_checkpointing=True)
    assert memory.checkpoint
    assert not plain.checkpoint
    for name, parameter in expected.items():
        assert not torch.equal(parameter, begin[name]), name
        torch.testing.assert_close(found[name], parameter, rtol=1e-5, atol=1e-6, msg=name)


def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )


@pytest.mark.parametrize("make", MEMORIES, ids=["recurrent", "associative"])
def test_the_trainers_label_smoothing_is_refused_by_name_and_a_loss_of_ones_own_is_trained(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    memory = make()
    with pytest.raises(AttributeError, match=r"label_smoothing_factor must be 0 .*: pass compute_loss_func"):
        trained(memory, tmp_path, label_smoothing_factor=0.1)
    assert not hasattr(memory, "config")
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        memory.nothing  # noqa: B018
    begin = {name: p.detach().clone() for name, p in memory.named_parameters()}
    for name, parameter in trained(memory, tmp_path, loss=smoothed).items():
        assert not torch.equal(parameter, begin[name]), name


@pytest.mark.parametrize("make", MEMORIES, ids=["recurrent", "associative"])
def test_the_trainer_adds_noise_to_embeddings(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    memory, noisy = make(), make()
    noisy.load_state_dict(memory.state_dict())
    embedding = noisy.get_input_embeddings()
    assert embedding is noisy.model.get_input_embeddings()
    plain, found = trained(memory, tmp_path), trained(noisy, tmp_path, neftune_noise_alpha=5.0)
    assert any(not torch.equal(found[name], parameter) for name, parameter in plain.items())
    assert not embedding._forward_hooks


@pytest.mark.parametrize("make", MEMORIES, ids=["recurrent", "associative"])
def test_the_trainer_of_the_readme_predicts(make: Callable[[], Any], tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[2] / "rmt" / "README.md").read_text(encoding="utf-8")
    block = readme[readme.index("  ```python\n  class MemoryTrainer") :].split("```")[1].removeprefix("python\n")
    scope: dict[str, Any] = {"transformers": transformers, "torch": torch}
    exec(textwrap.dedent(block), scope)
    memory, ids = make().eval(), models.tokens(4, 2 * L + 1)
    with torch.no_grad():
        expected = memory(ids, labels=ids, output_logits=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = scope["MemoryTrainer"](
        memory, arguments, compute_metrics=lambda seen: {"first": seen.predictions[0, 0, 0]}
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    found = trainer.predict(data)
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected.logits)
    assert found.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert trainer.evaluate(data)["eval_first"] == pytest.approx(expected.logits[0, 0, 0].item(), rel=1e-5)
    plain = transformers.Trainer(memory, arguments, eval_dataset=data, compute_metrics=lambda seen: {})
    blank = [{"input_ids": row} for row in ids]
    for call in (plain.evaluate, lambda: plain.predict(data), lambda: plain.predict(blank)):
        with pytest.raises(
            TypeError, match="for compute_metrics and predict, Hugging Face's Trainer needs the predict"
        ):
            call()
    loss_alone = transformers.Trainer(memory, arguments, eval_dataset=data).evaluate()["eval_loss"]
    assert loss_alone == pytest.approx(expected.loss.item(), rel=1e-5)
    unlabelled = trainer.predict(blank)
    torch.testing.assert_close(torch.from_numpy(unlabelled.predictions), expected.logits)


@pytest.mark.parametrize("make", MEMORIES, ids=["recurrent", "associative"])
def test_checkpointing_is_switched_by_transformers_names(make: Callable[[], Any]) -> None:
    memory = make()
    for name in ("activation", "gradient"):
        enable: Any = getattr(memory, f"{name}_checkpointing_enable")
        enable({"use_reentrant": False})
        assert memory.checkpoint
        assert getattr(memory, f"is_{name}_checkpointing")
        getattr(memory, f"{name}_checkpointing_disable")()
        assert not memory.checkpoint
        assert not getattr(memory, f"is_{name}_checkpointing")
        for message, bad in (
            ("every_n_layers must be 1 for a (Recurrent|Associative)Memory, got 2", {"every_n_layers": 2}),
            ("offload must be False for a .*, got True", {"offload": True}),
        ):
            with pytest.raises(ValueError, match=message):
                enable(**bad)
        with pytest.raises(ValueError, match=r"activation_checkpointing_kwargs must be \{\} .*, got \{'debug': True\}"):
            enable({"use_reentrant": False, "debug": True})
        assert not memory.checkpoint


class Summing(nn.Module):
    """A model that is not of Hugging Face, which applies the masks of a `RecurrentMemory`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, width)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return inputs_embeds + attention_mask[:, 0].to(inputs_embeds) @ inputs_embeds.tanh()


def with_adapters() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(models.make(), config)


def eager() -> nn.Module:
    model = models.make().model
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        (lambda: Summing(32), eager, {"kind": "decoder"}),
        (eager, lambda: Summing(32), {"kind": "decoder"}),
        (models.make, models.make, {"attention": "segattn"}),
        (models.make, with_adapters, {"mask": "causal"}),
    ],
)
def test_a_model_in_anothers_place_is_read_with_as_by_a_memory_of_its_own(
    first: Callable[[], nn.Module], second: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    embedding = nn.Embedding(models.VOCABULARY, 32)
    head = nn.Linear(32, 7)
    given = {**options, "embedding": embedding, "head": head}
    memory, other, ids = RecurrentMemory(first(), M, L, **given), second(), models.tokens(2, 3 * L + 1)
    memory.model = other
    with torch.no_grad():
        found = memory(ids)
        own = RecurrentMemory(other, M, L, **given)
        own.memory = memory.memory
        expected = own(ids)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.state.memory, expected.state.memory)


def test_an_associative_memory_finds_the_layers_of_a_model_in_anothers_place() -> None:
    memory, other, ids = AssociativeMemory(models.make(), M, L, d_mem=4), with_adapters(), models.tokens(2, 3 * L + 1)
    memory.model = other
    with torch.no_grad():
        own = AssociativeMemory(other, M, L, d_mem=4)
        own.memory_tokens, own.memories = memory.memory_tokens, memory.memories
        assert torch.equal(memory(ids).logits, own(ids).logits)


def test_a_model_that_does_not_fit_leaves_the_first_in_its_place() -> None:
    wide = models.make(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    short = models.make(num_hidden_layers=1)
    for memory, model, message in (
        (MEMORIES[0](), wide, "model must be as wide as the memory, 32, got 48: make a new RecurrentMemory"),
        (MEMORIES[0](), Summing(32), "model must have input embeddings, got Summing without: pass embedding="),
        (MEMORIES[1](), wide, "at least 2 layers and be as wide as the memory, 32, got 2 and 48"),
        (MEMORIES[1](), short, "at least 2 layers and be as wide as the memory, 32, got 1 and 32"),
        (MEMORIES[1](), torch.compile(models.make()), "must be neither compiled nor wrapped"),
    ):
        ids = models.tokens(1, 2 * L)
        with torch.no_grad():
            before = memory(ids).logits
            with pytest.raises(ValueError, match=message):
                memory.model = model
            assert torch.equal(memory(ids).logits, before)


def compiled_trunk() -> nn.Module:
    model = models.make()
    model.model = torch.compile(model.model)
    return model


@pytest.mark.parametrize(
    "wrap", [lambda: torch.compile(models.make()), compiled_trunk, lambda: nn.DataParallel(models.make())]
)
def test_a_compiled_or_wrapped_model_is_refused_by_an_associative_memory(wrap: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="wrap the AssociativeMemory, and compile layers in place"):
        AssociativeMemory(wrap(), M, L)


@pytest.mark.parametrize("kind", [RecurrentMemory, AssociativeMemory])
def test_a_plain_model_of_a_converted_ones_folder_is_taken(kind: Callable[..., Any], tmp_path: Path) -> None:
    converted, ids = models.converted(segment_len=8), models.tokens(1, 2 * L)
    converted.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    plain.load_state_dict(converted.state_dict(), strict=False)
    model = models.make()
    torch.manual_seed(0)
    expected = kind(model, M, L)(ids).logits
    torch.manual_seed(0)
    torch.testing.assert_close(kind(plain, M, L)(ids).logits, expected)
    with pytest.raises(ValueError, match=r"got one that segattn.convert changed: segattn.revert first"):
        kind(converted, M, L)
    # it shares the converted model's configuration, its attention with it
    with pytest.raises(ValueError, match=r"configuration: make it from type\(config\).from_dict\(config.to_dict\(\)\)"):
        kind(type(plain)(converted.config), M, L)
    config = type(converted.config).from_dict(converted.config.to_dict())
    kind(type(plain)(config), M, L)(ids)
