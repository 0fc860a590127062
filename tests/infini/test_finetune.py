"""Fine-tuning in one process: steps are those of a plain loop, a run can be stopped and resumed, and its model used."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
commands = pytest.importorskip("segattn.cli.main")

from models import make
from rich.console import Console
from typer.testing import CliRunner

import segattn
from segattn.cli import finetune as command
from segattn.infini.evaluate.loading import ByteTokenizer, load
from segattn.infini.evaluate.settings import Source
from segattn.infini.huggingface.saving import from_pretrained, save_pretrained
from segattn.infini.huggingface.settings import conversion_of
from segattn.infini.train import settings as settings_module
from segattn.infini.train.model import build_model, save_model
from segattn.infini.train.processes import joined, mesh_of
from segattn.infini.train.run import Outputs, resumed, run_training
from segattn.infini.train.settings import TrainSettings
from segattn.infini.train.stream import Rows, in_order, pieces_of_dataset, pieces_of_file, shuffled
from segattn.infini.train.trainer import Trainer
from segattn.runs.errors import SettingError, UntrainedMemoryWarning
from segattn.runs.figures import read_text
from segattn.runs.interrupts import InterruptedRunError
from segattn.runs.text import generate_text

L, LENGTH = 16, 75
CPU = torch.device("cpu")


class Quiet:
    """A listener that keeps the figures, and may press Ctrl-C after a step."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.interrupt_after = interrupt_after
        self.lines: list[Mapping[str, Any]] = []

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        self.lines.append(figures)
        if step == self.interrupt_after:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text; a plain model, one with dropout, one with dropout of attention, and a converted one, all of bytes."""
    root = tmp_path_factory.mktemp("finetune")
    (root / "text.txt").write_text(generate_text(300, 0), encoding="utf-8")
    make("llama", vocab_size=256).save_pretrained(root / "plain")
    make("gpt2", vocab_size=256, resid_pdrop=0.2).save_pretrained(root / "dropping")
    make("gpt2", vocab_size=256, attn_pdrop=0.2).save_pretrained(root / "forbidden")
    save_pretrained(segattn.convert(make("llama", vocab_size=256), L, "linear", quiet=True), root / "converted")
    return root


@pytest.fixture
def settings(folder: Path) -> TrainSettings:
    return TrainSettings(
        model=str(folder / "plain"),
        text=str(folder / "text.txt"),
        tokenizer="bytes",
        segment_len=L,
        length=LENGTH,
        piece=23,
        steps=3,
        lr=1e-3,
        warmup=1,
        batch=2,
    )


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process."""
    with joined("cpu", 60):
        yield


def build(settings: TrainSettings) -> tuple[Trainer, Rows]:
    """A run before its first step."""
    model, tokenizer = build_model(settings)
    return Trainer(model, settings, mesh_of(CPU, None), CPU), Rows(settings, tokenizer)


def run(settings: TrainSettings, out: Path, listener: Quiet, **options: Any) -> dict[str, Any]:
    return run_training(settings, out, listener, CPU, **options)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(mine: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def text_rows(settings: TrainSettings) -> torch.Tensor:
    held = list(Path(str(settings.text)).read_bytes())
    count = len(held) // LENGTH
    return torch.tensor(held[: count * LENGTH]).view(count, LENGTH)


def test_every_end_of_a_line_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("ab\r\n\r\ncdé\rf\n\r\n".encode())
    row, _ = next(in_order(pieces_of_file(path, ByteTokenizer()), 12))
    assert bytes(row.tolist()).decode() == read_text(path) == "ab\n\ncdé\nf\n\n"


def test_files_are_cut_into_rows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdéfg", encoding="utf-8")
    pieces = pieces_of_file(path, ByteTokenizer())
    made = in_order(pieces, 3)
    assert [next(made)[0].tolist() for _ in range(3)] == [[97, 98, 99], [100, 195, 169], [97, 98, 99]]
    assert next(in_order(pieces, 8))[0].tolist() == list("abcdéfg".encode())
    with pytest.raises(SettingError, match="length must be at most the 8 tokens of the text, got 9"):
        next(in_order(pieces, 9))


def test_data_sets_are_laid_end_to_end(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    tokenizer = ByteTokenizer()
    tokenizer.prefix = [0]
    data = datasets.Dataset.from_dict({"story": ["ab", "", "c"], "number": [1, 2, 3]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "split")

    def tokens(name: str, split: str, column: str) -> torch.Tensor:
        return torch.cat([part for _, part in pieces_of_dataset(str(tmp_path / name), tokenizer, split, column)(0)])

    for name, split in (("one", "train"), ("split", "test")):
        assert tokens(name, split, "story").tolist() == [0, 97, 98, 0, 0, 99]
    for name, split, column, message in (
        ("one", "train", "text", "column must be one of story, number, got 'text'"),
        ("one", "train", "number", "column must hold text, got 'number', which holds int"),
        ("split", "train", "story", "split must be one of test, got 'train'"),
        ("none", "train", "story", "dataset must lead to a data set, got"),
    ):
        with pytest.raises(SettingError, match=message):
            tokens(name, split, column)


@pytest.mark.parametrize("piece", [23, None])
def test_steps_are_those_of_a_plain_loop(settings: TrainSettings, alone: None, piece: int | None) -> None:
    trainer, rows = build(replace(settings, accumulate=2, piece=piece))
    model = segattn.convert(make("llama", vocab_size=256), L, quiet=True).train()
    optimizer = torch.optim.AdamW(segattn.parameter_groups(model, 1e-3), betas=(0.9, 0.95))
    bases = [group["lr"] for group in optimizer.param_groups]
    text = text_rows(settings)
    assert len(text) >= 12
    order = np.random.default_rng((0, 0)).permutation(len(text))
    # one step of warm-up, then a cosine over two
    for step, share in enumerate((0.5, 1.0, 0.5)):
        taken = text[order[4 * step : 4 * step + 4]]
        loss = F.cross_entropy(model(taken, use_cache=False).logits[:, :-1].flatten(0, 1), taken[:, 1:].flatten())
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = share * base
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        figures = trainer.advance(rows.read)
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert figures["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert figures["tokens"] == 4 * LENGTH * (step + 1)
        assert (figures["lr"], figures["gate_lr"]) == pytest.approx((share * 1e-3, share * 1e-2))
    wanted = weights(model)
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-4, msg=name)
    shares = torch.cat([value.sigmoid() for name, value in wanted.items() if "segattn_gate" in name])
    found = torch.tensor([figures[f"gate_{name}"] for name in ("least", "mean", "largest")])
    # as β, since shares begin at 0.018, where they move little
    moved = torch.stack([shares.min(), shares.mean(), shares.max()]).logit()
    assert found.logit().tolist() == pytest.approx(moved.tolist(), abs=4e-4)
    assert moved[2] - moved[0] > 4e-3


def test_every_row_comes_once_before_any_comes_again() -> None:
    count = 12
    table = torch.arange(count)[:, None].expand(-1, 2)
    made = [row for row, _ in zip(shuffled(table, 0), range(2 * count), strict=False)]
    seen = [int(row[0]) for row, _ in made]
    assert sorted(seen[:count]) == sorted(seen[count:]) == list(range(count))
    assert seen[:count] != seen[count:]
    assert [int(row[0]) for (row, _), _ in zip(shuffled(table, 1), range(count), strict=False)] != seen[:count]
    # from any of them on
    for index, (_, position) in enumerate(made[:-1]):
        assert int(next(shuffled(table, 0, position))[0][0]) == seen[index + 1]


def test_rates_rise_and_fall(settings: TrainSettings) -> None:
    rates = [replace(settings, steps=104, warmup=3).rate(step) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert replace(settings, steps=1, warmup=0).rate(0) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_held_out_rows_are_not_trained_on(settings: TrainSettings, alone: None, stream: bool) -> None:
    settings = replace(settings, eval_rows=4, stream=stream)
    text = text_rows(settings)
    rows = Rows(settings, ByteTokenizer())
    assert torch.equal(rows.held_out(), text[:4])
    count = len(text) - 4
    seen = [row.tolist() for row in torch.cat([rows.read(1) for _ in range(2 * count)])]
    wanted = text[4:].tolist()
    assert sorted(seen[:count]) == sorted(seen[count:]) == sorted(wanted)
    assert (seen[:count] == wanted) is stream
    # and from any of them on
    again = Rows(settings, ByteTokenizer())
    again.read(count + 2)
    later = Rows(settings, ByteTokenizer(), again.position)
    assert later.read(1)[0].tolist() == seen[count + 2]
    assert later.fingerprint == rows.fingerprint
    too_many = len(text) - len(text) % 2
    if too_many == len(text):
        with pytest.raises(SettingError, match=f"eval_rows must be below the {len(text)} rows of the text, got"):
            Rows(replace(settings, eval_rows=too_many), ByteTokenizer())
    with pytest.raises(SettingError, match=f"eval_rows must be below the {len(text)} rows of the text, got 998"):
        Rows(replace(settings, eval_rows=998), ByteTokenizer())


@pytest.mark.parametrize("piece", [23, None])
def test_loss_of_held_out_rows(settings: TrainSettings, folder: Path, tmp_path: Path, alone: None, piece: Any) -> None:
    # dropout must be off while they are read
    settings = replace(settings, model=str(folder / "dropping"), piece=piece, steps=5, eval_rows=4, eval_every=2)
    listener = Quiet()
    figures = run(settings, tmp_path, listener)
    assert [line["step"] for line in listener.lines if "eval_loss" in line] == [2, 4, 5]
    assert list(figures["eval_loss"]) == [2, 4, 5]
    model, held = from_pretrained(tmp_path / "model", quiet=True), text_rows(settings)[:4]
    wanted = F.cross_entropy(model(held, use_cache=False).logits[:, :-1].flatten(0, 1), held[:, 1:].flatten()).item()
    assert figures["eval_loss"][5] == listener.lines[-1]["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    assert json.loads(Outputs.of(tmp_path).figures.read_text())["eval_loss"]["5"] == figures["eval_loss"][5]


def test_interrupted_run_goes_on_to_the_same_weights(
    settings: TrainSettings, folder: Path, tmp_path: Path, alone: None
) -> None:
    # dropout draws PyTorch's random numbers
    settings = replace(settings, model=str(folder / "dropping"), steps=5, truncate=2)
    whole, part, resumed = Quiet(), Quiet(interrupt_after=2), Quiet()
    run(settings, tmp_path / "whole", whole)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError):
        run(settings, tmp_path / "part", part)
    assert signal.getsignal(signal.SIGINT) is handler
    outputs = Outputs.of(tmp_path / "part")
    assert not outputs.model.exists()
    # a line that was written after the checkpoint
    with outputs.log.open("a") as log:
        log.write('{"step": 4}\n')
    with pytest.raises(SettingError, match="out must not hold"):
        run(settings, tmp_path / "part", Quiet())
    run(settings, tmp_path / "part", resumed, resume=True)
    assert [line["loss"] for line in [*part.lines, *resumed.lines]] == [line["loss"] for line in whole.lines]
    logged = [json.loads(line) for line in outputs.log.read_text().splitlines()]
    assert logged == [*part.lines, *resumed.lines]
    models = [from_pretrained(tmp_path / name / "model", quiet=True) for name in ("part", "whole")]
    assert_equal(*map(weights, models))
    assert not torch.equal(models[0].transformer.wpe.weight, make("gpt2", vocab_size=256).transformer.wpe.weight)


@pytest.mark.parametrize("piece", [23, None])
def test_checkpointed_gradients_are_the_same(settings: TrainSettings, alone: None, piece: int | None) -> None:
    norms = []
    for on in (False, True):
        trainer, rows = build(replace(settings, gradient_checkpointing=on, piece=piece))
        norms.append(trainer.advance(rows.read)["gradient_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def moved(settings: TrainSettings) -> set[str]:
    """Names of the parameters that a step changes."""
    trainer, rows = build(settings)
    before = weights(trainer.model)
    trainer.advance(rows.read)
    return {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}


def test_gates_alone(settings: TrainSettings, alone: None) -> None:
    names = moved(replace(settings, freeze_but_gates=True))
    assert all("segattn_gate" in name for name in names)
    assert len(names) == 2


def test_adapters_and_gates_alone(settings: TrainSettings, alone: None) -> None:
    pytest.importorskip("peft")
    names = moved(replace(settings, lora=3, weights="bfloat16"))
    # the first matrix of an adapter has no gradient before the second has left 0
    assert all("segattn_gate" in name or "lora_B" in name for name in names)
    # seven linear layers and a gate, in each of two
    assert len(names) == 2 * 8


@pytest.mark.parametrize("model", ["plain", "dropping"])
def test_adapters_are_resumed_and_merged(
    settings: TrainSettings, folder: Path, tmp_path: Path, alone: None, model: str
) -> None:
    pytest.importorskip("peft")
    settings = replace(settings, model=str(folder / model), lora=3, lr=1e-2, steps=4)
    whole = Quiet()
    run(settings, tmp_path / "whole", whole)
    with pytest.raises(InterruptedRunError):
        run(settings, tmp_path / "part", Quiet(interrupt_after=1))
    run(settings, tmp_path / "part", Quiet(), resume=True)
    models = [from_pretrained(tmp_path / name / "model", quiet=True) for name in ("part", "whole")]
    assert_equal(*map(weights, models))
    # to what the model with its adapters gives after the last step
    trainer, rows = build(settings)
    losses = [trainer.advance(rows.read)["loss"] for _ in range(4)]
    assert losses == [line["loss"] for line in whole.lines]
    ids = text_rows(settings)[:2]
    with torch.no_grad():
        wanted, found = trainer.model.eval()(ids).logits, models[1](ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / model).state_dict()
    changed = {name for name, value in models[1].state_dict().items() if not torch.equal(value, plain.get(name, value))}
    assert changed
    assert all("proj" in name or ".c_" in name for name in changed), changed


@pytest.mark.parametrize("name", ["lora", "log"])
def test_what_is_not_installed_is_named(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda package: None)
    value, package = {"lora": (4, "peft"), "log": ("wandb", "wandb")}[name]
    with pytest.raises(SettingError, match=f"{name} needs {package}: pip install {package}"):
        replace(settings, **{name: value})


def test_a_folder_of_a_package_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "segattn_no_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_spec("segattn_no_package") is not None
    assert not settings_module.is_installed("segattn_no_package")
    assert settings_module.is_installed("segattn")


class Tracker:
    """Stands for TensorBoard's writer and for a run of Weights & Biases."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.numbers: list[tuple[str, float, int]] = []
        self.closed = 0

    def make(self, *args: Any, **kwargs: Any) -> Tracker:
        self.made.append((args, kwargs))
        return self

    def add_scalar(self, name: str, number: float, step: int) -> None:
        self.numbers.append((name, number, step))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.numbers += [(name, number, step) for name, number in numbers.items()]

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_figures_go_to_a_tracker(
    settings: TrainSettings, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tracker = Tracker()
    for name, function in (("torch.utils.tensorboard", "SummaryWriter"), ("wandb", "init")):
        module = ModuleType(name)
        setattr(module, function, tracker.make)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(settings_module, "is_installed", lambda package: True)
    settings = replace(settings, log=kind, eval_rows=2, eval_every=3)
    with pytest.raises(InterruptedRunError):
        run(settings, tmp_path, Quiet(interrupt_after=1))
    assert (len(tracker.made), tracker.closed) == (1, 1)
    run(settings, tmp_path, Quiet(), resume=True)
    assert (len(tracker.made), tracker.closed) == (2, 2)
    log = [json.loads(line) for line in Outputs.of(tmp_path).log.read_text().splitlines()]
    for name in ("loss", "gate_mean", "lr", "tokens_per_second", "eval_loss"):
        wanted = [(name, line[name], line["step"]) for line in log if name in line]
        assert [entry for entry in tracker.numbers if entry[0] == name] == wanted
    assert len([entry for entry in tracker.numbers if entry[0] == "eval_loss"]) == 1


def test_tensorboard_reads_what_is_written(settings: TrainSettings, tmp_path: Path, alone: None) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    listener = Quiet()
    run(replace(settings, log="tensorboard"), tmp_path, listener)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in listener.lines]


def test_converted_models_stay_as_they_were_converted(settings: TrainSettings, folder: Path) -> None:
    settings = replace(settings, model=str(folder / "converted"), segment_len=None)
    model, _ = build_model(settings)
    assert conversion_of(model).settings.update == "linear"
    build_model(replace(settings, segment_len=L, update="linear"))
    with pytest.raises(SettingError, match="update must be the model's, 'linear', or left out, got 'delta'"):
        build_model(replace(settings, update="delta"))


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    """Also where they come as two tensors, as from several ranks."""
    model = segattn.convert(make("gemma3_text", vocab_size=256), 16, quiet=True)
    save_model(model, ByteTokenizer(), {name: x.clone() for name, x in model.state_dict().items()}, tmp_path)
    safetensors = pytest.importorskip("safetensors.torch")
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" in model.state_dict()
    assert set(saved) == set(dict(model.named_parameters()))
    again = from_pretrained(tmp_path, quiet=True)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_memory_behind_a_lookback_needs_longer_rows(settings: TrainSettings, tmp_path: Path, alone: None) -> None:
    settings = replace(settings, segment_len=LENGTH // 2, lookback=1, piece=None, steps=1)
    said = rf"length must be more than \(1 \+ lookback\) · segment_len, {LENGTH // 2 * 2}, for a row .*, got"
    with pytest.warns(segattn.UntrainedMemoryWarning, match=said):
        run(replace(settings, length=LENGTH // 2 * 2), tmp_path / "short", Quiet())
    run(replace(settings, length=LENGTH // 2 * 2 + 1), tmp_path / "longer", Quiet())


def test_pieces_of_rows_with_a_lookback_and_sinks_train_like_the_whole(settings: TrainSettings, alone: None) -> None:
    settings = replace(settings, lookback=1, sinks=3, memory_maps=True, memory_layers="-1")
    losses = []
    for piece in (None, 23):
        trainer, rows = build(replace(settings, piece=piece))
        losses.append([trainer.advance(rows.read)["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    trainer, rows = build(replace(settings, sinks=0))
    assert trainer.advance(rows.read)["loss"] != pytest.approx(losses[0][0], rel=1e-5)


def test_a_checkpoint_from_before_some_options_of_conversion(
    settings: TrainSettings, tmp_path: Path, alone: None
) -> None:
    whole = Quiet()
    run(settings, tmp_path / "whole", whole)
    with pytest.raises(InterruptedRunError):
        run(settings, tmp_path / "part", Quiet(interrupt_after=1))
    [path] = tmp_path.glob("part/checkpoints/*/run.json")
    kept = json.loads(path.read_text())
    for name in ("gate_init", "lookback", "sinks", "memory_maps", "memory_layers"):
        del kept["settings"][name]
    path.write_text(json.dumps(kept))
    going_on, steps = resumed(tmp_path / "part", {})
    assert (going_on, steps) == (settings, 1)
    run(going_on, tmp_path / "part", Quiet(), resume=True)
    assert_equal(*(weights(from_pretrained(tmp_path / name / "model", quiet=True)) for name in ("part", "whole")))
    with pytest.raises(SettingError, match="sinks must be the checkpoint's with --resume, None, got 2"):
        run(replace(settings, sinks=2), tmp_path / "part", Quiet(), resume=True)


def test_layers_that_slide_stay_as_they_are(settings: TrainSettings, folder: Path, alone: None) -> None:
    sliding = make("gemma3_text", vocab_size=256, layer_types=["sliding_attention", "full_attention"])
    sliding.save_pretrained(folder / "sliding")
    figures = []
    for piece in (None, 23):
        trainer, rows = build(replace(settings, model=str(folder / "sliding"), piece=piece))
        assert conversion_of(trainer.model).native == (0,)
        figures.append(trainer.advance(rows.read))
    for name in ("loss", "gradient_norm"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-4)


@pytest.mark.parametrize("piece", [23, None])
def test_dtypes(settings: TrainSettings, alone: None, piece: int | None) -> None:
    settings = replace(settings, piece=piece, lr=1e-6, gate_lr=1e-6)
    losses = []
    for changed in ({}, {"dtype": "bfloat16"}, {"weights": "bfloat16"}):
        trainer, rows = build(replace(settings, **changed))
        losses.append(trainer.advance(rows.read)["loss"])
        dtypes = {p.dtype for name, p in trainer.model.named_parameters() if "segattn_gate" not in name}
        assert dtypes == {torch.bfloat16 if "weights" in changed else torch.float32}
        assert all(gate.bias.dtype == torch.float32 for gate in trainer.gates)
    assert len(set(losses)) == 3
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=0.05)
    with pytest.raises(SettingError, match="dtype must be auto, that of the weights, for --weights float16"):
        replace(settings, weights="float16", dtype="bfloat16")


def test_a_loss_that_is_no_number_stops_the_run(settings: TrainSettings, alone: None) -> None:
    trainer, rows = build(settings)
    with torch.no_grad():
        trainer.model.lm_head.weight[0] = math.nan
    before = weights(trainer.model)
    with pytest.raises(SettingError, match="lr must be lower, or --dtype wider: step 1 has a loss of nan"):
        trainer.advance(rows.read)
    after = weights(trainer.model)
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def test_rows_that_read_no_memory_are_warned_of(settings: TrainSettings, tmp_path: Path, alone: None) -> None:
    said = f"no memory is trained: length must be more than segment_len, {LENGTH}, for a row .*, got {LENGTH}"
    with pytest.warns(UntrainedMemoryWarning, match=said) as caught:
        run(replace(settings, segment_len=LENGTH, steps=2), tmp_path / "all", Quiet())
    assert len([one for one in caught if one.category is UntrainedMemoryWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedMemoryWarning)
        run(replace(settings, segment_len=LENGTH - 1, steps=1), tmp_path / "less", Quiet())


def test_bar_follows_a_run(settings: TrainSettings, tmp_path: Path, alone: None) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with command.Steps(console) as bar:
        run(settings, tmp_path, bar)
        assert bar.bars.tasks[0].finished
    assert "gates 0." in console.file.getvalue()


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["finetune", str(folder / "plain"), "--text", str(folder / "text.txt"), "--tokenizer", "bytes"]
    return [*given, *f"--segment-len {L} --length 75 --steps 4 --device cpu --out {out}".split(), *more]


def test_command_writes_a_model_and_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(commands.app, arguments(folder, tmp_path / "whole"))
    assert result.exit_code == 0, result.output
    assert "step 4 of 4: loss" in result.stdout
    for path in Outputs.of(tmp_path / "whole"):
        assert str(path) in result.stdout
        assert path.exists()
    # the model says that it is of bytes
    for place in ("whole", "whole/model"):
        loaded = load(Source(str(tmp_path / place), device="cpu"))
        assert isinstance(loaded.tokenizer, ByteTokenizer)
    trained = command.Steps.trained

    def interrupt(self: Any, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        trained(self, step, steps, figures)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(command.Steps, "trained", interrupt)
        result = CliRunner().invoke(commands.app, arguments(folder, tmp_path / "part"))
    again = f"segattn finetune --resume --out {tmp_path / 'part'}"
    assert result.exit_code == 130
    assert result.stderr == f"segattn finetune: stopped, checkpoint written; go on with: {again}\n"
    result = CliRunner().invoke(commands.app, again.split()[1:])
    assert result.exit_code == 0, result.output
    models = [from_pretrained(tmp_path / name / "model", quiet=True) for name in ("part", "whole")]
    assert_equal(*map(weights, models))
    assert "already done: 4 steps; --steps goes on to more" not in result.stdout
    result = CliRunner().invoke(commands.app, again.split()[1:])
    assert result.exit_code == 0, result.output
    assert "already done: 4 steps; --steps goes on to more" in result.stdout
    result = CliRunner().invoke(commands.app, [*again.split()[1:], "--weight-decay", "1"])
    assert result.exit_code == 2
    assert "--weight-decay must be the checkpoint's with --resume, 0.01, got 1.0" in result.stderr
    (tmp_path / "other.txt").write_text(generate_text(300, 1))
    result = CliRunner().invoke(commands.app, [*again.split()[1:], "--text", str(tmp_path / "other.txt")])
    assert "--text must hold the tokens of the checkpoint's with --resume, got others" in result.stderr
    (Outputs.of(tmp_path / "part").checkpoints / "step-4" / "run.json").write_bytes(b"not a checkpoint")
    result = CliRunner().invoke(commands.app, again.split()[1:])
    assert "--resume needs a checkpoint of segattn finetune; " in result.stderr


def test_both_spellings_of_the_warmup_are_taken(folder: Path, tmp_path: Path) -> None:
    for option in ("--warmup", "--warm-up"):
        result = CliRunner().invoke(commands.app, arguments(folder, tmp_path / option.strip("-"), option, "-1"))
        assert "--warmup must be at least 0, got -1" in result.stderr
        result = CliRunner().invoke(commands.app, ["rmt", "train", "detect", option, "0"])
        assert "--warm-up must be at least 1, got 0" in result.stderr


def test_a_run_is_resumed_from_any_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "plain", tmp_path / "here" / "tiny")
    shutil.copy(folder / "text.txt", tmp_path / "here" / "text.txt")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = f"finetune tiny --text text.txt --tokenizer bytes --segment-len {L} --length 75 --device cpu"
    result = CliRunner().invoke(commands.app, [*given.split(), "--steps", "2", "--out", "run"])
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(tmp_path / "there")
    result = CliRunner().invoke(commands.app, "finetune --resume --out ../here/run --steps 3 --device cpu".split())
    assert result.exit_code == 0, result.output
    assert "step 3 of 3" in result.stdout


def test_checkpoints_of_another_version_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"settings": {}}, tmp_path / "checkpoint.pt")
    result = CliRunner().invoke(commands.app, ["finetune", "--resume", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--resume needs a checkpoint of this version, got" in result.stderr
    assert "checkpoint.pt', of another version" in result.stderr
    path = Outputs.of(tmp_path).checkpoints / "step-5"
    path.mkdir(parents=True)
    (path / ".metadata").touch()
    about = {"step": 5, "position": [0, 0, 0], "rows": "", "settings": {"model": "tiny", "sequence_ranks": 2}}
    (path / "run.json").write_text(json.dumps(about))
    result = CliRunner().invoke(commands.app, ["finetune", "--resume", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "step-5', of another version" in result.stderr


def test_command_says_once_that_no_memory_is_trained(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(commands.app, arguments(folder, tmp_path / "out", "--segment-len", "75"))
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "segattn finetune: no memory is trained: length must be more than segment_len, 75, for a row to read its "
        "memory, got 75\n"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--truncate", "0"], "--truncate must be at least 1, got 0"),
        (["--truncate", "2"], "--truncate must come with --piece, got 2 without"),
        (["--lr", "nan"], "--lr must be 0 or more, got nan"),
        (["--seed", str(2**32)], f"--seed must be below 2**32, got {2**32}"),
        (["--update", "sum"], "--update must be one of"),
        (["--segment-len", "1"], "--segment-len must be at least 2, got 1"),
        (["--length", "100000"], "--length must be at most the"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--weights", "int8"], "--weights must be one of"),
        (["--log", "paper"], "--log must be one of none, tensorboard, wandb, got 'paper'"),
        (["--batch", "2", "--eval-rows", "3"], "--eval-rows must be a multiple of --batch, 2, got 3"),
        (["--eval-rows", "1000"], "--eval-rows must be below the"),
        (["--lora", "0"], "--lora must be at least 1, got 0"),
        (["--lora", "2", "--freeze-but-gates"], "--lora must come without --freeze-but-gates, got 2 with it"),
        (["--device", "abacus"], "--device must be one that PyTorch can use here"),
        (["--text", "no-such-file"], "--text must be a file that can be read"),
        (["--dataset", "more"], "--text must be given, or else --dataset, got both"),
        (["--resume"], "--resume needs a checkpoint in the output folder, and there is no"),
    ],
)
def test_command_names_what_is_wrong(folder: Path, tmp_path: Path, more: list[str], message: str) -> None:
    result = CliRunner().invoke(commands.app, arguments(folder, tmp_path / "out", *more))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"segattn finetune: {message}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "MODEL must be given: a folder, or a name of the hub"),
        ("nowhere", "MODEL must be a folder or name of a causal language model, got"),
        ("forbidden", "MODEL must have no dropout of attention, got attn_pdrop of 0.2: set it to 0 in its config.json"),
    ],
)
def test_command_names_models_that_cannot_be(folder: Path, tmp_path: Path, model: str | None, message: str) -> None:
    given = arguments(folder, tmp_path / "out")
    given[1:2] = [] if model is None else [str(folder / model)]
    result = CliRunner().invoke(commands.app, given)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"segattn finetune: {message}")
    assert not (tmp_path / "out").exists()
