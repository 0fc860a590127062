"""Long texts over processes: the steps are a plain loop's, whatever the number of processes, and can be resumed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
typer_testing = pytest.importorskip("typer.testing")

import finetune_ranks as ranks
from forks import fork
from models import make, open_gates, tokens

import segattn
from segattn.cli.finetune import finetune
from segattn.cli.main import app
from segattn.infini.evaluate.loading import ByteTokenizer
from segattn.infini.sharding import shard_batch
from segattn.infini.train import checkpoints, stream
from segattn.infini.train.model import build_model
from segattn.infini.train.processes import joined, mesh_of
from segattn.infini.train.run import Outputs
from segattn.infini.train.settings import MAY_CHANGE, SOURCES, TrainSettings
from segattn.infini.train.stream import Position, in_order, pieces_of_dataset, pieces_of_file
from segattn.infini.train.trainer import LossSum, Trainer
from segattn.runs.checkpoint import whole
from segattn.runs.errors import SettingError
from segattn.runs.text import generate_text

L, LENGTH, STEPS, LR, GATE_LR, WARMUP = 8, 57, 20, 3e-3, 1e-2, 3
SAVE_EVERY, DIES, STOPS = 5, 20, 18


class Run(NamedTuple):
    """How a run ended, what it said, and where its files are."""

    code: int | None
    said: str
    out: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Outputs.of(self.out).log.read_text().splitlines()]

    @property
    def losses(self) -> torch.Tensor:
        return torch.tensor([line["loss"] for line in self.log], dtype=torch.float64)

    @property
    def checkpoints(self) -> list[str]:
        return [path.name for path in checkpoints.whole(Outputs.of(self.out).checkpoints)]


def invoke(out: Path, *arguments: object) -> Run:
    """The command, in this process alone."""
    done = typer_testing.CliRunner().invoke(app, ["finetune", *map(str, arguments), "--out", str(out)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Run(done.exit_code, done.output, out)


def by_hand(out: Path, event: str, size: int, *arguments: object) -> list[Run]:
    """The command on processes that nobody ends but themselves."""
    asked, said = [*map(str, arguments), "--out", str(out)], out.with_name(f"{out.name}-said")
    said.mkdir()
    ended = fork(size, ranks.main, *asked, folder=said, timeout=200, **{ranks.EVENT: event})
    return [Run(*rank, out) for rank in ended]


def by_torchrun(out: Path, event: str, size: int, *arguments: object) -> Run:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, ranks.__file__]
    command = [*map(str, [*command, *arguments]), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", ranks.EVENT: event}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    return Run(done.returncode, done.stdout + done.stderr, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes, and a text."""
    root = tmp_path_factory.mktemp("long")
    make("llama", vocab_size=256).save_pretrained(root / "plain")
    lines = "\n".join(generate_text(60, seed) for seed in range(10))
    (root / "text.txt").write_text(f"Ein Maß, écrit.\n{lines}\n", encoding="utf-8")
    return root


def options(folder: Path, **changed: object) -> list[object]:
    """Of the run that all of these tests are about; None leaves one out."""
    given: dict[str, object] = {
        "text": folder / "text.txt",
        "stream": True,
        "tokenizer": "bytes",
        "segment-len": L,
        "length": LENGTH,
        "batch": 2,
        "steps": STEPS,
        "lr": LR,
        "gate-lr": GATE_LR,
        "warmup": WARMUP,
        "device": "cpu",
        "save-every": SAVE_EVERY,
    }
    given |= {name.replace("_", "-"): value for name, value in changed.items()}
    found: list[object] = [given.pop("model", folder / "plain")]
    for name, value in given.items():
        if value is True:
            found.append(f"--{name}")
        elif value is not None:
            found += [f"--{name}", value]
    return [argument for argument in found if argument is not None]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    """One process, undisturbed."""
    return invoke(folder / "alone", *options(folder))


@pytest.fixture(scope="module")
def killed(folder: Path) -> list[Run]:
    """Four ranks, two rows of two, of which the last dies while the last checkpoint is written."""
    event = f"save 3 {DIES} {int(signal.SIGKILL)}"
    asked = options(folder, sequence_ranks=2, gradient_checkpointing=True, timeout=60)
    return by_hand(folder / "killed", event, 4, *asked)


@pytest.fixture(scope="module")
def stopped(folder: Path, killed: list[Run]) -> Run:
    """What was killed, resumed by torchrun on two ranks that share a row, one of which is told to end."""
    shutil.copytree(killed[0].out, folder / "stopped")
    event = f"step 1 {STOPS} {int(signal.SIGTERM)}"
    return by_torchrun(folder / "stopped", event, 2, "--resume", "--sequence-ranks", 2, "--keep", 1)


@pytest.fixture(scope="module")
def finished(folder: Path, stopped: Run) -> Run:
    """What was stopped, resumed in one process."""
    shutil.copytree(stopped.out, folder / "finished")
    return invoke(folder / "finished", "--resume", "--sequence-ranks", 1)


def plain_rows(folder: Path, count: int) -> torch.Tensor:
    text = list((folder / "text.txt").read_bytes())
    found = [text[LENGTH * row : LENGTH * (row + 1)] for row in range(len(text) // LENGTH)]
    return torch.tensor([found[row % len(found)] for row in range(count)])


def converted(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain")
    return segattn.convert(model, L, quiet=True).train()


class Leg(NamedTuple):
    """Steps of a run up to one, by a schedule of so many steps."""

    until: int = STEPS
    steps: int = STEPS
    lr: float = LR
    gate_lr: float = GATE_LR
    warmup: int = WARMUP

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))


def plain_losses(folder: Path, *legs: Leg) -> list[float]:
    """Of a loop without any of what is tested."""
    model, losses = converted(folder), []
    optimiser = torch.optim.AdamW(segattn.parameter_groups(model, LR, GATE_LR, 0.01), betas=(0.9, 0.95))
    of_gates = [group["lr"] == GATE_LR for group in optimiser.param_groups]
    for step, ids in enumerate(plain_rows(folder, 2 * legs[-1].until).split(2)):
        leg = next(leg for leg in legs if step < leg.until)
        for group, gates in zip(optimiser.param_groups, of_gates, strict=True):
            group["lr"] = leg.factor(step) * (leg.gate_lr if gates else leg.lr)
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_one_process_is_a_plain_loop(alone: Run, folder: Path) -> None:
    assert alone.code == 0, alone.said
    wanted = torch.tensor(plain_losses(folder, Leg()), dtype=torch.float64)
    assert wanted[-1] < 0.9 * wanted[0]
    assert (alone.losses - wanted).abs().max() < 1e-5


def test_four_ranks_are_one_process(killed: list[Run], alone: Run) -> None:
    assert len(killed[0].losses) == DIES == STEPS
    assert (killed[0].losses - alone.losses).abs().max() < 1e-5
    norms = [[line["gradient_norm"] for line in run.log] for run in (killed[0], alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_when_a_rank_dies_the_others_end_and_say_how_to_go_on(killed: list[Run]) -> None:
    assert [run.code for run in killed] == [1, 1, 1, -signal.SIGKILL]
    for rank, run in enumerate(killed[:3]):
        assert f"process {rank} of 4 ends" in run.said
        assert re.search(
            r"go on, with as many processes as you like: segattn finetune --resume --out \S+killed", run.said
        )
        assert "Error" in run.said


def test_the_checkpoint_before_is_intact(killed: list[Run]) -> None:
    assert killed[0].checkpoints == ["step-10", "step-15"]
    assert (Outputs.of(killed[0].out).checkpoints / "step-20").is_dir()


def test_it_resumes_on_two_ranks_and_sigterm_of_one_leaves_a_checkpoint(stopped: Run, alone: Run) -> None:
    assert stopped.code == 1
    assert "stopped, checkpoint written; go on" in stopped.said
    assert stopped.checkpoints == [f"step-{STOPS}"]
    assert len(stopped.losses) == STOPS
    assert (stopped.losses - alone.losses[:STOPS]).abs().max() < 1e-5


def test_it_resumes_on_one_and_ends_as_if_undisturbed(finished: Run, alone: Run) -> None:
    assert finished.code == 0, finished.said
    assert (finished.losses - alone.losses).abs().max() < 1e-5
    one, other = (segattn.from_pretrained(Outputs.of(run.out).model, quiet=True) for run in (finished, alone))
    for (name, mine), (_, wanted) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (mine - wanted).abs().max() < 1e-4, name


def test_speed_and_memory_are_those_of_the_ranks_of_the_last_step(finished: Run) -> None:
    figures, log = json.loads(Outputs.of(finished.out).figures.read_text()), finished.log
    wanted = [{"dp": 2, "sp": 2}] * 15 + [{"dp": 1, "sp": 2}] * (STOPS - 15) + [{"dp": 1, "sp": 1}] * 2
    assert [line["ranks"] for line in log] == wanted
    assert figures["ranks"] == wanted[-1]
    assert (figures["steps"], figures["timed_steps"]) == (STEPS, 2)
    rate = 2 * LENGTH / statistics.median(line["seconds"] for line in log[-2:])
    assert figures["tokens_per_second"] == figures["tokens_per_second_and_rank"] == pytest.approx(rate)
    assert figures["peak_bytes"] == max(line["peak_bytes"] for line in log[-2:])


def test_figures_of_a_run_that_is_done_stay_those_of_its_ranks(killed: list[Run], folder: Path) -> None:
    """Also where what goes on with it is of other ranks, and has nothing to do."""
    out = shutil.copytree(killed[0].out, folder / "done")
    assert invoke(out, "--resume", "--sequence-ranks", 1, "--steps", 15).code == 0
    figures = json.loads(Outputs.of(out).figures.read_text())
    log = Run(0, "", out).log
    assert (len(log), figures["ranks"]) == (15, {"dp": 2, "sp": 2})
    assert figures["peak_bytes"] == max(line["peak_bytes"] for line in log)
    assert figures["tokens_per_second_and_rank"] == pytest.approx(figures["tokens_per_second"] / 4)


def test_a_run_that_is_done_goes_on_to_more_steps_by_the_rates_given_now(folder: Path, alone: Run) -> None:
    out = shutil.copytree(alone.out, folder / "more")
    legs = Leg(), Leg(23, 24, 1e-3, 2e-2, 22), Leg(26, 26, 1e-3, 2e-2, 22)
    first = invoke(out, "--resume", "--steps", 24, "--lr", 1e-3, "--gate-lr", 2e-2, "--warmup", 22, "--save-every", 23)
    assert (first.code, len(first.log)) == (0, 24)
    shutil.rmtree(Outputs.of(out).checkpoints / "step-24")
    again = invoke(out, "--resume", "--steps", 26)
    assert (again.code, again.checkpoints) == (0, ["step-23", "step-26"])
    assert (again.losses - torch.tensor(plain_losses(folder, *legs))).abs().max() < 1e-5
    assert again.log[23]["lr"] == pytest.approx(1e-3 * legs[2].factor(23))
    assert json.loads(Outputs.of(out).figures.read_text())["settings"]["steps"] == 26


def test_resuming_in_one_process_is_exact(folder: Path, alone: Run) -> None:
    shutil.copytree(alone.out, folder / "again")
    shutil.rmtree(Outputs.of(folder / "again").checkpoints / "step-20")
    again = invoke(folder / "again", "--resume")
    assert torch.equal(again.losses, alone.losses)
    one, other = (segattn.from_pretrained(Outputs.of(run.out).model, quiet=True) for run in (again, alone))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_figures_follow_from_the_log_and_the_model(alone: Run, folder: Path) -> None:
    figures = json.loads(Outputs.of(alone.out).figures.read_text())
    model = segattn.from_pretrained(Outputs.of(alone.out).model, quiet=True)
    shares = torch.cat([p.sigmoid() for name, p in model.named_parameters() if "segattn_gate" in name])
    log = alone.log
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["ranks"] == {"dp": 1, "sp": 1}
    assert (figures["conversion"]["update"], figures["conversion"]["segment_len"]) == ("delta", L)
    assert figures["dtype"] == "float32"
    assert (figures["steps"], figures["tokens"]) == (STEPS, STEPS * 2 * LENGTH)
    assert figures["loss"] == log[-1]["loss"]
    assert figures["seconds"] == pytest.approx(sum(line["seconds"] for line in log))
    median = statistics.median(line["seconds"] for line in log)
    assert figures["tokens_per_second"] == pytest.approx(2 * LENGTH / median)
    assert figures["peak_bytes"] == max(line["peak_bytes"] for line in log) > 16 * figures["parameters"]
    for step, line in enumerate(log):
        assert (line["step"], line["tokens"]) == (step + 1, (step + 1) * 2 * LENGTH)
        assert line["tokens_per_second"] == pytest.approx(2 * LENGTH / line["seconds"])
    assert [log[-1][f"gate_{which}"] for which in ("least", "mean", "largest")] == pytest.approx(
        [shares.min().item(), shares.mean().item(), shares.max().item()]
    )
    assert [line["lr"] for line in log[:5]] == pytest.approx([LR / 4, LR / 2, 3 * LR / 4, LR, 0.99148 * LR], rel=1e-5)


def test_what_is_said_and_written(alone: Run) -> None:
    assert f"step {STEPS} of {STEPS}: loss {alone.log[-1]['loss']:.4f}" in alone.said
    assert alone.checkpoints == ["step-15", "step-20"]


@pytest.fixture
def mesh() -> Iterator[Any]:
    with joined("cpu", 60) as device:
        yield mesh_of(device, None)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_losses_in_pieces_of_logits_are_those_of_the_model(mesh: Any, kind: str) -> None:
    model = segattn.convert(make(kind).double(), L, quiet=True).train()
    open_gates(model)
    ids = tokens(2, LENGTH)
    inputs = shard_batch({"input_ids": ids}, mesh["sp"], L)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # five tokens of the two rows at a time
    summed = LossSum(model, logits=10 * model.config.vocab_size)(**inputs)
    found = torch.autograd.grad(summed, parameters, allow_unused=True)
    logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert summed.item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, other in zip(found, wanted, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert (mine - other).norm() < 1e-4 * other.norm() + 1e-5


def settings_of(folder: Path, **changed: Any) -> TrainSettings:
    given: dict[str, Any] = {
        "model": str(folder / "plain"),
        "text": str(folder / "text.txt"),
        "tokenizer": "bytes",
        "segment_len": L,
        "length": LENGTH,
        "batch": 2,
        "warmup": 0,
    }
    return TrainSettings(**(given | changed))


def stepped(settings: TrainSettings, mesh: Any, ids: torch.Tensor) -> tuple[Trainer, list[float], list[float]]:
    """Two steps: the trainer, losses, norms of gradients."""
    model, _ = build_model(settings)
    trainer = Trainer(model, settings, mesh, torch.device("cpu"))
    rows = iter(ids.split(settings.batch))
    figures = [trainer.advance(lambda count: next(rows)) for _ in range(2)]
    return trainer, *([line[name] for line in figures] for name in ("loss", "gradient_norm"))


def test_weights_are_float32_under_products_in_bfloat16(mesh: Any, folder: Path) -> None:
    ids = plain_rows(folder, 4)
    (_, wide, _), (trainer, half, _) = (
        stepped(settings_of(folder, lr=1e-6, gate_lr=1e-6, dtype=dtype), mesh, ids) for dtype in ("float32", "bfloat16")
    )
    begun = dict(converted(folder).named_parameters())
    for name, parameter in trainer.model.named_parameters():
        value = whole(parameter).detach()
        assert value.dtype == torch.float32
        # which weights in bfloat16 could not take: none of them would move
        assert 0 < (value - begun[name]).abs().max() < 1e-5, name
    assert wide[0] != half[0]
    assert half == pytest.approx(wide, abs=0.05)


def test_batches_that_are_accumulated_are_one(mesh: Any, folder: Path) -> None:
    ids = plain_rows(folder, 8)
    one, *at_once = stepped(settings_of(folder, batch=4), mesh, ids)
    other, *in_turn = stepped(settings_of(folder, batch=2, accumulate=2), mesh, ids)
    for found, wanted in zip(in_turn, at_once, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for mine, its in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert (mine - its).abs().max() < 2e-6


def test_dropout_depends_on_the_step_alone(mesh: Any, folder: Path) -> None:
    make("gpt2", vocab_size=256, resid_pdrop=0.3).save_pretrained(folder / "dropping")
    settings = settings_of(folder, model=str(folder / "dropping"))
    ids = plain_rows(folder, 2).repeat(2, 1)
    _, first, _ = stepped(settings, mesh, ids)
    torch.randn(5)
    trainer, second, _ = stepped(settings, mesh, ids)
    assert first == second
    trainer.step = 0
    for parameter in trainer.trained:
        parameter.requires_grad_(True)
    assert trainer.advance(lambda count: ids[:2])["loss"] != second[1]


def test_the_gates_alone_and_tied_embeddings(folder: Path) -> None:
    make("llama", vocab_size=256, tie_word_embeddings=True).save_pretrained(folder / "tied")
    asked = options(folder, model=folder / "tied", steps=3, save_every=2, freeze_but_gates=True)
    run = invoke(folder / "gates", *asked)
    shutil.rmtree(Outputs.of(run.out).checkpoints / "step-3")
    again = invoke(folder / "gates", "--resume")
    assert again.losses[2] == run.losses[2]
    model = segattn.from_pretrained(Outputs.of(run.out).model, quiet=True)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder / "tied").state_dict()
    for name, value in model.state_dict().items():
        assert ("segattn_gate" in name and value.any()) or torch.equal(value, before[name]), name


def test_a_model_from_scratch_begins_at_chance(folder: Path) -> None:
    asked = options(folder, model=None, layers=1, width=16, heads=2, steps=2, tokenizer=None, update="linear")
    run = invoke(folder / "scratch", *asked)
    assert run.code == 0, run.said
    assert run.losses[0] == pytest.approx(math.log(256), abs=0.1)
    model = segattn.from_pretrained(Outputs.of(run.out).model, quiet=True)
    assert model.config.segment_attention["update"] == "linear"
    assert model.lm_head.weight.shape == (256, 16)


def test_rows_of_a_file_go_on_from_any_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STRETCH", 7)
    text = "äb\n\ncdefgh ijk\nlmnopqrst\nu\nvwxyzé"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    tokenizer = ByteTokenizer()
    tokenizer.prefix = [1, 2]
    pieces = pieces_of_file(tmp_path / "text", tokenizer)
    held = [1, 2, *text.encode()]
    for length in (1, 4, 5, 9, len(held)):
        each = len(held) // length
        wanted = torch.tensor(held[: each * length]).view(each, length).repeat(3, 1)
        position = stream.START
        seen = [position]
        made = in_order(pieces, length)
        for row in wanted:
            found, position = next(made)
            seen.append(position)
            assert found.tolist() == row.tolist()
        for index, begin in enumerate(seen[:-1]):
            assert next(in_order(pieces, length, begin))[0].tolist() == wanted[index].tolist()
        assert seen[-1].epoch == 2
    with pytest.raises(SettingError, match=f"length must be at most the {len(held)} tokens of the text, got 99"):
        next(in_order(pieces, 99))


def test_rows_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    data = datasets.Dataset.from_dict({"story": ["ab", "", "cdefg"], "number": [1, 2, 3]})
    data.save_to_disk(tmp_path / "data")
    tokenizer = ByteTokenizer()
    tokenizer.prefix = [0]
    made = in_order(pieces_of_dataset(str(tmp_path / "data"), tokenizer, "train", "story"), 4)
    (first, then), (second, last), (third, _) = (next(made) for _ in range(3))
    assert [first.tolist(), second.tolist(), third.tolist()] == [[0, 97, 98, 0], [0, 99, 100, 101], [0, 97, 98, 0]]
    assert (then, last) == (Position(0, 1, 1), Position(0, 2, 4))
    for column, said in (("text", "be one of story, number"), ("number", "hold text, got 'number', which holds int")):
        with pytest.raises(SettingError, match=f"column must {said}"):
            next(in_order(pieces_of_dataset(str(tmp_path / "data"), tokenizer, "train", column), 4))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text": None}, "--text must be given, or else --dataset, got neither"),
        ({"text": "nowhere.txt"}, "--text must be a file that can be read"),
        ({"length": 99999}, "--length must be at most the"),
        ({"length": 1}, "--length must be at least 2, got 1"),
        ({"sequence_ranks": 2}, "--sequence-ranks must divide the number of processes, 1, got 2"),
        ({"sequence_ranks": 0}, "--sequence-ranks must be at least 1, got 0"),
        ({"device": "tpu"}, "--device must be one that PyTorch can use here, such as 'cpu', got 'tpu'"),
        ({"dtype": "float16"}, "--dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ({"timeout": 0}, "--timeout must be more than 0 seconds, got 0.0"),
        ({"keep": 0}, "--keep must be at least 1, got 0"),
        ({"model": None, "width": 8}, "--layers must be given for a model from scratch"),
        ({"layers": 2}, "--layers must be left out for a model that is there"),
        (
            {"model": None, "layers": 2, "width": 30, "heads": 4},
            "--width must be a multiple of twice the 4 heads, got 30",
        ),
        (
            {"model": None, "layers": 2, "width": 8, "heads": 2, "tokenizer": "x"},
            "--tokenizer must be bytes for a model",
        ),
        ({"model": "/no/model/here"}, "MODEL must be a folder or name of a causal language model"),
        ({"segment_len": 1}, "--segment-len must be at least 2, got 1"),
        ({"lr": 1e30}, "--lr must be lower, or --dtype wider: step"),
        ({"resume": True}, "--resume needs a checkpoint in the output folder"),
    ],
)
def test_settings_that_cannot_be(folder: Path, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    run = invoke(tmp_path / "out", *options(folder, **changed))
    assert run.code == 2, run.said
    assert f"segattn finetune: {said}" in run.said
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight_decay": 0.5}, "--weight-decay must be the checkpoint's with --resume, 0.01, got 0.5"),
        ({"batch": 4}, "--batch must be the checkpoint's with --resume, 2, got 4"),
        ({"steps": 15}, "--steps must be at least the 20 of the checkpoint with --resume, got 15"),
        ({"text": "other.txt"}, "--text must hold the tokens of the checkpoint's with --resume, got others"),
        ({"model": "wider"}, "MODEL must be the checkpoint's with --resume"),
    ],
)
def test_resuming_something_else(folder: Path, alone: Run, changed: dict[str, Any], said: str) -> None:
    (folder / "other.txt").write_text("another text " * 30)
    make("llama", vocab_size=256, hidden_size=40).save_pretrained(folder / "wider")
    changed = {name: folder / value if isinstance(value, str) else value for name, value in changed.items()}
    before = Outputs.of(alone.out).log.read_text()
    run = invoke(alone.out, *options(folder, **changed), "--resume")
    assert run.code == 2, run.said
    assert f"segattn finetune: {said}" in run.said
    assert Outputs.of(alone.out).log.read_text() == before


def test_the_help_names_what_may_change() -> None:
    said = re.search("With --resume.*?hold the same", finetune.__doc__ or "", re.DOTALL)
    assert said is not None
    wanted = {f"--{name.replace('_', '-')}" for name in MAY_CHANGE if name not in SOURCES}
    assert set(re.findall(r"--[a-z-]+", said[0])) == wanted | {"--resume"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text": "nowhere.txt"}, "--text must be a file that can be read, got "),
        ({"piece": 9}, "--piece must be left out on 2 processes, each of which reads its run of a row at once, got 9"),
        (
            {"sinks": 2},
            "--sequence-ranks must be 1 for a model with lookback or sinks, got 2: no rank sees the tokens of others",
        ),
        (
            {"weights": "bfloat16"},
            "--weights must be float32 on 2 processes, over which they are spread, got",
        ),
    ],
)
def test_several_ranks_say_once_what_is_wrong(
    folder: Path, tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    first, second = by_hand(tmp_path / "wrong", "none 0 0 0", 2, *options(folder, **changed))
    assert (first.code, second.code) == (2, 2)
    assert first.said.startswith(f"segattn finetune: {said}")
    assert (first.said.count("\n"), second.said) == (1, "")


@pytest.mark.parametrize(("model", "sequence_ranks"), [("plain", 2), ("sliding", 1)])
def test_adapters_and_held_out_rows_on_two_ranks(folder: Path, tmp_path: Path, model: str, sequence_ranks: int) -> None:
    """Also layers that are not converted, where ranks share no rows."""
    pytest.importorskip("peft")
    kinds = ["sliding_attention", "full_attention"]
    make("gemma3_text", vocab_size=256, layer_types=kinds).save_pretrained(folder / "sliding")
    asked = options(folder, model=folder / model, stream=None, lora=2, eval_rows=4, steps=4, lr=1e-2)
    alone = invoke(tmp_path / "alone", *asked)
    ranks_asked = [*asked, "--sequence-ranks", sequence_ranks]
    together, _ = by_hand(tmp_path / "together", "none 0 0 0", 2, *ranks_asked)
    assert (alone.code, together.code) == (0, 0), together.said
    assert (together.losses - alone.losses).abs().max() < 1e-5
    assert together.log[-1]["eval_loss"] == pytest.approx(alone.log[-1]["eval_loss"], abs=1e-5)
    one, other = (segattn.from_pretrained(Outputs.of(run.out).model, quiet=True) for run in (together, alone))
    begun = transformers.AutoModelForCausalLM.from_pretrained(folder / model).state_dict()
    for (name, mine), (_, wanted) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (mine - wanted).abs().max() < 1e-4, name
        if "_proj" in name:
            assert (mine - begun[name]).abs().max() > 1e-3, name


def test_a_text_that_goes_wrong_later_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STRETCH", 2 * LENGTH)
    (folder / "half.txt").write_bytes(b"a line\n" * 60 + b"\xff\n" * 60)
    run = invoke(folder / "half", *options(folder, text=folder / "half.txt", save_every=2))
    assert run.code == 2
    assert "--text must be a file of UTF-8 text" in run.said
    assert (len(run.losses), run.checkpoints) == (3, ["step-2"])


def test_an_earlier_run_is_not_overwritten(folder: Path, alone: Run) -> None:
    run = invoke(alone.out, *options(folder))
    assert run.code == 2
    assert "--out must not hold figures of an earlier run" in run.said


def test_a_run_that_is_done_is_not_gone_on_with(alone: Run) -> None:
    again = invoke(alone.out, "--resume")
    assert again.code == 0
    assert len(again.losses) == STEPS
