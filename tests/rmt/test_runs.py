"""Tests of runs of memory tasks: the curriculum, stopping and resuming, extrapolation, attention maps, commands."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
commands = pytest.importorskip("segattn.cli.main")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from segattn.cli import rmt as command
from segattn.cli.progress import Reading
from segattn.rmt.runs import published
from segattn.rmt.runs.attention_maps import Sample, attention_of, find_facts, run_attention, sentences_of
from segattn.rmt.runs.curriculum import WINDOW, Recipe, Stage, Step, Trainer
from segattn.rmt.runs.evaluation import Grid, run_evaluation
from segattn.rmt.runs.folder import Run, RunFiles, build, load_run, trained_tokens
from segattn.rmt.runs.plots import plot_accuracy
from segattn.rmt.runs.settings import TrainSettings
from segattn.rmt.runs.training import run_training
from segattn.rmt.tasks import answers as answers_module
from segattn.rmt.tasks import make as tasks
from segattn.rmt.tasks.answers import answer, chance, interval, length_of, right, samples_of
from segattn.rmt.tasks.facts import generate_questions
from segattn.rmt.tasks.make import make_task
from segattn.rmt.tasks.vocabulary import CLS, SEP
from segattn.runs.checkpoint import load_checkpoint
from segattn.runs.errors import SettingError, UntrainedMemoryWarning
from segattn.runs.interrupts import InterruptedRunError
from segattn.runs.text import generate_text

# no word of the text is in the vocabulary, so that the task is quickly learnt
TINY = TrainSettings(
    "memorize",
    vocabulary=0,
    encoder="modernbert",
    layers=1,
    width=16,
    heads=2,
    memory=3,
    segment_len=19,
    short=(),
    segments=(1, 2),
    steps=5,
    batch=4,
    device="cpu",
    test_samples=7,
    noise=0.3,
)
TOKENS = replace(TINY, task="copy", segment_len=7, vocabulary=4000, encoder="bert")
# with the default sizes, which a pretrained model does not use
PRETRAINED = replace(TOKENS, task="memorize", layers=2, width=64, heads=4)
RETRIEVAL = replace(TOKENS, task="retrieval", segment_len=None, segments=(2, 3), noise=0.0, rewrite=True)
SMALL = "--vocabulary 0 --layers 1 --width 16 --heads 2 --memory 3 --segment-len 19 --device cpu"
COPY = replace(TOKENS, noise=0.1, bptt=1)
KINDS = {
    "encoder": TINY,
    "bert": replace(TINY, encoder="bert"),
    "decoder": COPY,
    "armt": replace(RETRIEVAL, architecture="armt", d_mem=5),
}
STOPPED = KINDS | {"short": replace(TINY, task="detect", short=(17,), short_segments=(2,), segments=(2,))}


class Quiet:
    """A listener that shows nothing, but may press Ctrl-C after so many steps or pieces."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.interrupt_after, self.heard = interrupt_after, 0

    def trained(self, stage: Stage, done: int, step: Step) -> None:
        self.hear()

    def begin(self, tokens: int) -> None:
        return None

    def read(self, tokens: int) -> None:
        self.hear()

    def finished(self, figures: dict[str, Any]) -> None:
        return None

    def hear(self) -> None:
        self.heard += 1
        if self.heard == self.interrupt_after:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module", autouse=True)
def little_text() -> Iterator[None]:
    """Generate less text and fewer stories, since every run generates them again."""
    with pytest.MonkeyPatch.context() as patch:
        text = generate_text(6000, seed=0)
        patch.setattr(tasks, "generate_text", lambda words, seed: text)
        patch.setattr(tasks, "generate_questions", lambda form, split: generate_questions(form, split, 100))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of few steps."""
    folder = tmp_path_factory.mktemp("tiny")
    run_training(TINY, folder, Quiet())
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that learns its task in seconds."""
    folder = tmp_path_factory.mktemp("learnt")
    lasting = {"width": 32, "memory": 4, "steps": 500, "batch": 32, "lr": 3e-3, "later_lr": 3e-3, "test_samples": 60}
    run_training(replace(TINY, noise=0.0, **lasting), folder, Quiet())
    return folder


def test_intervals_solve_wilsons_equation() -> None:
    for hits, samples in ((0, 7), (3, 7), (99, 100), (100, 100)):
        low, high = interval(hits, samples)
        share = hits / samples
        assert 0 <= low <= share <= high <= 1
        for bound in (low, high):
            # both bounds are so far from the share that it is 1.96 of their own standard errors
            distance = 1.959964 * math.sqrt(bound * (1 - bound) / samples)
            assert abs(share - bound) == pytest.approx(distance, abs=1e-6)


def test_right_asks_for_every_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert right(logits, torch.tensor([1, 1])).tolist() == [True, False]
    labels = torch.tensor([[-100, -100, 2, 0], [-100, -100, 2, 0], [-100, -100, 1, 0]])
    # what is said one place before
    said = torch.tensor([[1, 2, 0, 1], [1, 2, 2, 0], [1, 1, 0, 2]])
    assert right(torch.nn.functional.one_hot(said, 3).float(), labels).tolist() == [True, False, True]


def test_lengths_are_of_samples_that_there_are() -> None:
    retrieval, copy = make_task("retrieval", key_digits=3), make_task("copy", copies=2)
    assert [length_of(retrieval, n * 5) for n in (2, 3, 9)] == [10, 15, 45]
    for tokens in range(4, 40):
        length = length_of(copy, tokens)
        assert tokens - 2 <= length <= tokens
        assert copy.batch(1, length, seed=0, index=0).input_ids.shape == (1, length)
    assert (chance(retrieval), chance(copy)) == (0.1, 0.0)
    assert chance(build(TINY).task) == 1 / 6 == chance(make_task("qa1"))


@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_pieces_is_reading_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(KINDS[kind])
    run.memory.eval()
    length = length_of(run.task, 5 * run.settings.tokens)
    batch = samples_of(run.task, 0, 30, length, seed=3)
    with torch.inference_mode():
        whole = run.memory(batch.input_ids, output_logits=True)
    read: list[int] = []
    for piece in (1, 2, 16):
        monkeypatch.setattr(answers_module, "PIECE", piece)
        answers = answer(run.memory, batch, run.settings.tokens, read.append)
        assert torch.equal(answers.right, right(whole.logits, batch.labels))
        assert sum(read) == batch.input_ids.numel()
        read.clear()
    numbers = {"encoder": 3 * 16, "bert": 3 * 16, "decoder": 3 * 16, "armt": (16 + 1) * 2 * 3 * 5}
    assert answers.state_bytes == 4 * numbers[kind]


def test_samples_are_the_same_in_whatever_batches() -> None:
    task = build(TINY).task
    whole = samples_of(task, 0, 5, 40, seed=1)
    parts = [samples_of(task, a, b, 40, seed=1) for a, b in ((0, 2), (2, 5))]
    for column in range(2):
        assert torch.equal(whole[column], torch.cat([part[column] for part in parts]))
    assert len(set(map(tuple, whole.input_ids.tolist()))) == 5


def test_stages_follow_each_other() -> None:
    task = make_task("detect", vocabulary_size=0)
    recipe = Recipe(short=(20, 31), segments=(1, 3), steps=40, lr=0.5, later_lr=0.25, anneal=8, warm_up=4)
    plan = recipe.plan(task, 37)
    assert [(stage.length, stage.segments, stage.steps) for stage in plan] == [
        (20, 1, 40),
        (31, 1, 40),
        (37, 1, 40),
        (111, 3, 40),
        (111, 3, 8),
    ]
    assert [stage.annealed for stage in plan] == [False] * 4 + [True]
    assert [plan[0].rate(step, 4) for step in (0, 1, 3, 4, 39)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    assert [plan[4].rate(step, 4) for step in (0, 4, 7)] == [0.25, 0.125, 0.03125]


def test_a_curriculum_that_trains_no_memory_is_warned_of(tmp_path: Path) -> None:
    said = r"no memory is trained: segments must go beyond 1 for a text to read its memory, got \(1,\)"
    with pytest.warns(UntrainedMemoryWarning, match=said) as caught:
        run_training(replace(TINY, segments=(1,)), tmp_path / "one", Quiet())
    assert len([one for one in caught if one.category is UntrainedMemoryWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedMemoryWarning)
        run_training(replace(TINY, steps=2), tmp_path / "two", Quiet())


def test_short_segments_come_before_whole_ones() -> None:
    settings = replace(TINY, task="detect", short=(16, 18), short_segments=(2, 4), segments=(1, 3), steps=2)
    run = build(settings)
    read: list[tuple[int, int]] = []
    segment = run.memory._segment
    run.memory._segment = lambda x, *rest: read.append(tuple(x.shape[1:2])) or segment(x, *rest)
    trainer = Trainer(run.memory, run.task, 19, settings.recipe(), seed=0)
    stages = [(stage.length, stage.segments, stage.segment_len) for stage in trainer.plan]
    assert stages == [(16, 1, 19), (18, 1, 19), (36, 2, 18), (72, 4, 18), (19, 1, 19), (57, 3, 19)]
    for length, segments, segment_len in stages:
        read.clear()
        assert trainer.advance().length == length
        assert len(read) == segments
        assert {x for (x,) in read} == {min(length, segment_len)}
        assert trainer.advance().length <= length
        trainer.next_stage({})
    assert run.memory.settings.segment_len == 19


def test_every_other_batch_is_of_a_random_length() -> None:
    settings = replace(TINY, task="detect", short=(18,), segments=(3,), steps=30)
    run = build(settings)
    trainer = Trainer(run.memory, run.task, 19, settings.recipe(), seed=0)
    for segments in (1, 3):
        lengths = [trainer.advance().length for _ in range(30)]
        own = 18 if segments == 1 else 57
        assert lengths[::2] == [own] * 15
        allowed = set(range(run.task.shortest, 19)) if segments == 1 else {19, 38, 57}
        assert set(lengths[1::2]) <= allowed
        assert len(set(lengths[1::2])) >= 3
        trainer.next_stage({})
    run = build(replace(settings, vary=False))
    trainer = Trainer(run.memory, run.task, 19, run.settings.recipe(), seed=0)
    assert {trainer.advance().length for _ in range(5)} == {18}


def test_a_stage_ends_with_its_accuracy() -> None:
    run = build(TINY)
    trainer = Trainer(run.memory, run.task, 19, Recipe(short=(), segments=(1,), steps=1000, threshold=0.9), seed=0)

    def take(length: int, accuracy: float) -> None:
        own = [*trainer._own(), *([accuracy] if length == 19 else [])][-WINDOW:]
        trainer.log.append(Step(length, 0.0, accuracy, sum(own) / len(own)))

    take(19, 0.0)
    for _ in range(WINDOW - 1):
        take(19, 0.92)
        # shorter ones do not count
        take(12, 0.0)
        assert not trainer.stage_over
    for accuracy in (0.92, 0.4):
        take(19, accuracy)
        assert trainer.stage_over == (accuracy == 0.92)


def test_a_task_is_learnt_and_kept_in_memory(learnt: Path) -> None:
    run = load_run(learnt, device="cpu")
    figures = json.loads(RunFiles.of(learnt).figures.read_text())
    assert figures["complete"]
    assert [stage["converged"] for stage in figures["stages"]] == [True, True]
    for stage in figures["stages"]:
        # the test once more, sample by sample and whole
        hits = 0
        for index in range(60):
            ids, label = run.task.batch(1, stage["tokens"], seed=0, index=index, split="test")
            with torch.inference_mode():
                hits += int(run.memory(ids).logits.argmax() == label)
        assert hits / 60 == stage["test_accuracy"] > 0.9
        assert stage["loss"][0] > 1 > stage["loss"][-1]
    batch = samples_of(run.task, 0, 100, 38, seed=5)
    whole = answer(run.memory, batch, 19).right.float().mean()
    # the fact is at the beginning, the question at the end
    alone = answer(run.memory, batch._replace(input_ids=batch.input_ids[:, 19:]), 19).right.float().mean()
    assert whole > 0.9
    assert alone < 0.4


@pytest.mark.parametrize("kind", STOPPED)
@pytest.mark.parametrize("step", [2, 7])
def test_an_interrupted_run_goes_on_exactly(kind: str, step: int, tmp_path: Path) -> None:
    settings = replace(STOPPED[kind], anneal=2)
    whole = run_training(settings, tmp_path / "whole", Quiet())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError):
        run_training(settings, tmp_path / "part", Quiet(interrupt_after=step))
    assert signal.getsignal(signal.SIGINT) is handler
    outputs = RunFiles.of(tmp_path / "part")
    assert load_checkpoint(outputs.checkpoint)["trainer"]["index"] == step
    torch.manual_seed(123)
    resumed = run_training(settings, tmp_path / "part", Quiet(), resume=True)
    assert resumed["steps"] == whole["steps"] == 5 * (len(whole["stages"]) - 1) + 2
    for before, after in zip(whole["stages"], resumed["stages"], strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
    weights = [load_file(RunFiles.of(tmp_path / name).weights) for name in ("whole", "part")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert json.loads(outputs.figures.read_text()) == resumed
    begun = build(settings).memory.state_dict()
    assert not torch.equal(begun["memory" if kind != "armt" else "memory_tokens"], weights[0].popitem()[1])


@pytest.mark.parametrize("kind", ["encoder", "armt"])
def test_a_run_starts_from_an_earlier_ones_weights(kind: str, tmp_path: Path) -> None:
    first, second, out = (tmp_path / name for name in ("first", "second", "out"))
    earlier = run_training(replace(KINDS[kind], anneal=2), first, Quiet())
    settings = replace(KINDS[kind], start=str(first), lr=0.0, later_lr=0.0, seed=7)
    figures = run_training(settings, second, Quiet())
    assert earlier["before"] is None
    assert figures["before"] == earlier
    assert len(figures["stages"]) == 2
    assert figures["steps"] == 10
    # nothing is learnt at a rate of zero
    weights = [load_file(RunFiles.of(folder).weights) for folder in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert RunFiles.of(second).vocabulary.read_text() == RunFiles.of(first).vocabulary.read_text()
    for name, other in (("width", 20), ("heads", 4), ("memory", 4)):
        with pytest.raises(SettingError, match=f"{name} must be the earlier run's with start, .*, got {other}"):
            run_training(replace(settings, **{name: other}), out, Quiet())
    with pytest.raises(SettingError, match="start must be one that segattn rmt train wrote, got 'nowhere'"):
        run_training(replace(settings, start="nowhere"), out, Quiet())
    assert not out.exists()
    # what it started from is not needed to go on
    shutil.rmtree(first)
    longer = run_training(replace(settings, segments=(*settings.segments, 4)), second, Quiet(), resume=True)
    assert longer["before"] == earlier
    assert longer["steps"] == 15
    assert trained_tokens(second) == longer["stages"][-1]["tokens"]


def test_resume_takes_further_stages_but_no_other_run(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny, folder)
    before = json.loads(RunFiles.of(folder).figures.read_text())
    longer = run_training(replace(TINY, segments=(1, 2, 4), bptt=2, later_batch=3), folder, Quiet(), resume=True)
    assert [(stage["bptt"], stage["later_batch"]) for stage in longer["stages"]] == [(None, None), (None, None), (2, 3)]
    assert longer["stages"][:2] == before["stages"]
    assert [stage["segments"] for stage in longer["stages"]] == [1, 2, 4]
    with pytest.raises(
        SettingError,
        match=r"segments must begin as the checkpoint's with --resume, with stages of 19 \(19 a segment\), ",
    ):
        run_training(replace(TINY, segments=(1, 3, 4)), folder, Quiet(), resume=True)
    for name, other in (("lr", 0.5), ("seed", 8), ("batch", 5), ("width", 20), ("beta2", 0.9)):
        with pytest.raises(SettingError, match=f"{name} must be the checkpoint's with --resume"):
            run_training(replace(TINY, **{name: other}), folder, Quiet(), resume=True)
    book = tmp_path / "book.txt"
    book.write_text("The whale swam on and on. " * 50, encoding="utf-8")
    with pytest.raises(SettingError, match="book and --babi must hold what they held before with --resume"):
        run_training(replace(TINY, book=str(book)), folder, Quiet(), resume=True)
    with pytest.raises(SettingError, match=r"out must not hold figures of an earlier run, got .* with checkpoint\.pt"):
        run_training(TINY, folder, Quiet())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_damaged_checkpoints_are_named(content: bytes, tmp_path: Path) -> None:
    RunFiles.of(tmp_path).checkpoint.write_bytes(content)
    with pytest.raises(SettingError, match="is another file, or damaged"):
        run_training(TINY, tmp_path, Quiet(), resume=True)


def test_a_loss_that_is_no_number_names_the_rate_that_made_it(tmp_path: Path) -> None:
    first = replace(TINY, lr=1e30, warm_up=1)
    with pytest.raises(SettingError, match=r"^lr must be lower, in a new run: step 2 has a loss of nan"):
        run_training(first, tmp_path / "first", Quiet())
    later = replace(TINY, later_lr=1e30, warm_up=1)
    with pytest.raises(SettingError, match="later_lr must be lower: step 7 has a loss of nan; go on with --resume"):
        run_training(later, tmp_path / "later", Quiet())
    figures = run_training(replace(later, later_lr=1e-3), tmp_path / "later", Quiet(), resume=True)
    assert figures["complete"]
    assert all(math.isfinite(loss) for stage in figures["stages"] for loss in stage["loss"])


def test_resume_does_not_take_a_stage_for_another_of_its_length(tmp_path: Path) -> None:
    # two segments of 19 tokens, and then one of 38
    settings = replace(TINY, task="detect", segment_len=38, short=(19,), short_segments=(2,), segments=(1,))
    with pytest.raises(InterruptedRunError):
        run_training(settings, tmp_path, Quiet(interrupt_after=8))
    with pytest.raises(SettingError, match=r"stages of 19 \(19 a segment\), 38 \(19 a segment\) tokens, got others"):
        run_training(replace(settings, short_segments=()), tmp_path, Quiet(), resume=True)
    assert len(run_training(settings, tmp_path, Quiet(), resume=True)["stages"]) == 3


def test_an_evaluation_counts_what_it_says(learnt: Path, tmp_path: Path) -> None:
    figures = run_evaluation(learnt, Grid((2, 5), (11, 6), (4,), seed=2), Quiet(), out=tmp_path, device="cpu")
    run = load_run(learnt, device="cpu")
    for cell, samples in zip(figures["lengths"], (11, 6), strict=True):
        hits = 0
        for index in range(samples):
            ids, label = run.task.batch(1, cell["segments"] * 19, seed=2, index=index, split="test")
            with torch.inference_mode():
                hits += int(run.memory(ids).logits.argmax() == label)
        assert (cell["right"], cell["samples"], cell["accuracy"]) == (hits, samples, hits / samples)
        assert cell["tokens"] == cell["segments"] * 19
        assert cell["interval"] == list(interval(hits, samples))
        assert cell["seconds_per_token"] == pytest.approx(cell["seconds"] / samples / cell["tokens"])
        assert cell["state_bytes"] == 4 * 4 * 32
    assert figures["complete"]
    assert figures["trained_segments"] == 2
    assert json.loads(RunFiles.of(tmp_path).evaluation.read_text()) == figures


@pytest.fixture
def heeded() -> Iterator[None]:
    """Let Ctrl-C raise, even where the tests run in the background of a shell that ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("heeded")
def test_an_interrupted_evaluation_goes_on(tiny: Path, tmp_path: Path) -> None:
    def measured(figures: dict[str, Any]) -> list[tuple[int, ...]]:
        return [tuple(cell[name] for name in ("segments", "samples", "right")) for cell in figures["lengths"]]

    grid = Grid((3, 2), (9,), (2,))
    whole = run_evaluation(tiny, grid, Quiet(), out=tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(tiny, grid, Quiet(interrupt_after=13), out=tmp_path / "part", device="cpu")
    written = RunFiles.of(tmp_path / "part").evaluation
    part = json.loads(written.read_text())
    assert not part["complete"]
    # the batch that was broken into is not counted
    assert [cell[:2] for cell in measured(part)] == [(2, 9), (3, 2)]
    with pytest.raises(SettingError, match="out must not hold figures of an earlier run"):
        run_evaluation(tiny, grid, Quiet(), out=tmp_path / "part", device="cpu")
    listener = Quiet()
    resumed = run_evaluation(tiny, grid, listener, out=tmp_path / "part", device="cpu", resume=True)
    # two pieces of each of four batches
    assert listener.heard == 8
    assert measured(resumed) == measured(whole)
    more = run_evaluation(tiny, Grid((3, 1), (12, 2)), Quiet(), out=tmp_path / "part", device="cpu", resume=True)
    assert [cell[:2] for cell in measured(more)] == [(1, 2), (2, 9), (3, 12)]
    with pytest.raises(SettingError, match="seed must be of the earlier seed, 0, got 1"):
        run_evaluation(tiny, replace(grid, seed=1), Quiet(), out=tmp_path / "part", device="cpu", resume=True)
    written.write_text(json.dumps(part | {"data_sha256": "a097b1"}))
    with pytest.raises(SettingError, match="book and --babi must hold what they held before with --resume, got other"):
        run_evaluation(tiny, grid, Quiet(), out=tmp_path / "part", device="cpu", resume=True)
    written.write_text("{}")
    with pytest.raises(SettingError, match="is another file, or damaged"):
        run_evaluation(tiny, grid, Quiet(), out=tmp_path / "part", device="cpu", resume=True)


def test_an_evaluation_says_how_far_the_run_has_come(tmp_path: Path) -> None:
    settings = replace(TINY, segments=(1, 2, 4))
    with pytest.raises(InterruptedRunError):
        run_training(settings, tmp_path, Quiet(interrupt_after=12))
    grid = Grid((2,), (3,))
    assert run_evaluation(tmp_path, grid, Quiet(), device="cpu")["trained_segments"] == 2
    run_training(settings, tmp_path, Quiet(), resume=True)
    with pytest.raises(
        SettingError, match=r"resume needs the weights of .*evaluation\.json', which have changed since"
    ):
        run_evaluation(tmp_path, grid, Quiet(), device="cpu", resume=True)
    figures = run_evaluation(tmp_path, grid, Quiet(), device="cpu", out=tmp_path / "again")
    assert figures["trained_segments"] == 4
    # the paper's segments were of 499 tokens
    assert figures["published"] == {}


def first_layer(run: Run, tokens: Tensor) -> Tensor:
    """Compute the attention [heads, T, T] of a ModernBERT's first layer over its first segment from its weights."""
    model: Any = run.memory.model
    words = model.get_input_embeddings().weight
    memory: Any = run.memory.memory
    rows = torch.cat((words[[CLS]], memory, words[[SEP]], words[tokens], words[[SEP]]))
    x = torch.nn.functional.layer_norm(rows, rows.shape[1:], model.model.embeddings.norm.weight)
    q, k, _ = model.model.layers[0].attn.Wqkv(x).view(len(rows), 3, 2, -1).permute(1, 2, 0, 3)
    half = q.shape[-1] // 2
    angle = torch.arange(len(rows))[:, None] * 160_000.0 ** -(torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.complex(part[..., :half], part[..., half:]) * turn for part in (q, k))
    return ((q @ k.mH).real / math.sqrt(2 * half)).softmax(-1)


def test_attention_is_the_models_own(learnt: Path) -> None:
    run = load_run(learnt, device="cpu")
    ids = samples_of(run.task, 0, 1, 38, seed=0).input_ids
    with torch.no_grad():
        before = run.memory(ids).logits
        expected = first_layer(run, ids[0, :19])
    found, _ = attention_of(run.memory, ids, 0, 19)
    assert found.shape == (1, 2, 26, 26)
    assert (found[0] - expected).abs().max() < 1e-5
    later, logits = attention_of(run.memory, ids, 1, 19)
    assert (later.sum(-1) - 1).abs().max() < 1e-5
    assert (logits - before).abs().max() < 1e-4
    model: Any = run.memory.model
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(run.memory(ids).logits, before)


def test_facts_are_found_where_they_stand() -> None:
    run = build(replace(TINY, task="qa1", encoder="bert", segment_len=200, segments=(1,)))
    ids = samples_of(run.task, 3, 4, 200, seed=0).input_ids[0]
    spans = find_facts(sentences_of(run), ids)
    vocabulary: Any = run.task.vocabulary
    told = [vocabulary.decode(ids[begin:end]) for begin, end in spans]
    # in a vocabulary of the facts' words alone, all else is unknown, but for stray words of the filler
    assert all(sentence.endswith(" .") and "the" in sentence for sentence in told)
    assert vocabulary.decode(ids).count(" the ") >= len(spans) >= 2


def test_attention_maps_show_writing_and_reading(learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, x, **k: (drawn.append(x), imshow(self, x, **k))[1])
    figures = run_attention(learnt, Sample(2, 4), out=tmp_path, device="cpu")
    run = load_run(learnt, device="cpu")
    ids = run.task.batch(1, 38, seed=0, index=4, split="test").input_ids
    (fact,) = figures["facts"]
    assert fact[0] == 0
    writing, reading = (attention_of(run.memory, ids, segment, 19)[0][0] for segment in (0, 1))
    # rows are [CLS | 4 of memory | SEP | tokens | SEP]
    share = [head[1:5, 6 : 6 + fact[1]].sum(1).mean().item() for head in writing]
    assert figures["parts"][0]["share"] == [pytest.approx(share)]
    share = [head[0, 1:5].sum().item() for head in reading]
    assert figures["parts"][1]["share"] == [pytest.approx(share)]
    assert figures["answered_right"]
    assert max(figures["parts"][0]["share"][0]) > 2 * figures["parts"][0]["even"]
    assert figures["parts"][0]["even"] == fact[1] / 26
    for picture, expected in zip(drawn, [*writing, *reading], strict=True):
        assert abs(picture - expected.numpy() ** 0.5).max() < 1e-6
    assert json.loads((tmp_path / "attention.json").read_text()) == figures


def test_a_decoders_rows_see_what_its_mask_lets_them() -> None:
    run = build(replace(TINY, task="qa1", encoder="bert", segment_len=120, segments=(1,)))
    run.memory.eval()
    ids = samples_of(run.task, 0, 1, 240, seed=0).input_ids
    found, _ = attention_of(run.memory, ids, 1, 120)
    i, j = torch.arange(126)[:, None], torch.arange(126)
    visible = (j <= i) | (j < 3) | (i >= 123)
    assert torch.equal(found > 0, visible.expand_as(found))


def test_accuracy_is_drawn_beside_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    names = ("errorbar", "plot", "axvline", "axhline")

    def spy(name: str) -> Any:
        plain = getattr(Axes, name)
        return lambda self, *a, **k: (drawn.setdefault(name, (a, k)), plain(self, *a, **k))[1]

    for name in names:
        monkeypatch.setattr(Axes, name, spy(name))
    cells = [
        {"segments": 2, "tokens": 38, "accuracy": 0.5, "interval": [0.25, 0.625]},
        {"segments": 64, "tokens": 1216, "accuracy": 1.0, "interval": [0.75, 1.0]},
    ]
    figures = {"task": "reasoning", "segment_len": 19, "trained_segments": 3, "chance": 0.125, "lengths": cells}
    plot_accuracy(tmp_path / "picture.png", figures)
    (tokens, shares), options = drawn["errorbar"]
    assert (tokens, shares) == ([38, 1216], [50.0, 100.0])
    assert options["yerr"] == [[25.0, 25.0], [12.5, 0.0]]
    (tokens, shares), _ = drawn["plot"]
    assert dict(zip(tokens, shares, strict=True))[4096 * 499] == pytest.approx(81.9)
    assert len(tokens) == 12
    assert (drawn["axvline"][0], drawn["axhline"][0]) == ((57,), (12.5,))
    drawn.clear()
    plot_accuracy(tmp_path / "picture.png", figures | {"task": "retrieval"})
    assert "plot" not in drawn
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_have_ticks_also_where_only_the_paper_has_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append(self))
    interval = {"accuracy": 0.5, "interval": [0.25, 0.625]}
    cells = [{"segments": n, "tokens": 19 * n, **interval} for n in (2, 3, 64, 65)]
    figures = {"task": "detect", "segment_len": 19, "trained_segments": 3, "chance": 0.125, "lengths": cells}
    plot_accuracy(tmp_path / "picture.png", figures)
    axes = drawn[0].axes[0]
    ticks = [float(label.get_text().replace(",", "")) for label in axes.get_xticklabels()]
    assert ticks == [float(tick) for tick in axes.get_xticks()]
    for length in (*(n * published.SEGMENT_LEN for n in published.SEGMENTS), *(cell["tokens"] for cell in cells)):
        assert min(abs(math.log2(length / tick)) for tick in ticks) <= 2
    # one more segment would stand where the label of 64 is
    (top,) = axes.child_axes
    assert [label.get_text() for label in top.get_xticklabels()] == ["2 segments", "64"]


def test_the_papers_curve_is_of_its_tasks() -> None:
    assert published.curve("detect")[512] == pytest.approx(0.9856)
    assert published.curve("memorize")[64] == pytest.approx(0.9823)
    assert list(published.curve("reasoning")) == list(published.SEGMENTS)
    assert published.curve("copy") == {}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny BERT and its words."""
    folder = tmp_path_factory.mktemp("encoder")
    own = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*own, "the", "where", "is", "to", ".", "?", *letters, *("##" + letter for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=90,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(transformers.__version__.startswith("5.0."), reason="whose BERT tokenizer keeps capital letters")
@pytest.mark.parametrize("freeze", [False, True])
def test_a_pretrained_encoder_is_trained(freeze: bool, encoder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(encoder, source)
    settings = replace(
        PRETRAINED, task="detect", pretrained=str(source), freeze=freeze, segment_len=83, segments=(1, 2)
    )
    begun = build(settings)
    assert begun.encode("Where?") == [begun.source.tokenizer.vocab[word] for word in ("where", "?")]
    assert begun.memory.settings.special_tokens == (2, 3)
    assert begun.memory.settings.extra_rows == 6
    held = load_file(source / "model.safetensors")
    first = "embeddings.word_embeddings.weight"
    assert torch.equal(begun.memory.state_dict()[f"model.bert.{first}"], held[first])
    whole = run_training(settings, tmp_path / "whole", Quiet())
    with pytest.raises(InterruptedRunError):
        run_training(settings, tmp_path / "part", Quiet(interrupt_after=3))
    # the run's folder has all that it takes to go on, dropout's random numbers included
    shutil.rmtree(source)
    run_training(settings, tmp_path / "part", Quiet(), resume=True)
    weights, again = (load_file(RunFiles.of(tmp_path / name).weights) for name in ("whole", "part"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    moved = {name for name, x in weights.items() if not torch.equal(x, begun.memory.state_dict()[name])}
    trunk = {name for name in moved if name.startswith("model.bert.") and ".pooler." not in name}
    assert bool(trunk) != freeze
    assert {"memory", "model.classifier.weight", "model.bert.pooler.dense.weight"} <= moved
    assert whole["trained_parameters"] == (sum(weights[n].numel() for n in moved) if freeze else whole["parameters"])
    figures = run_evaluation(tmp_path / "part", Grid((2,), (3,)), Quiet(), device="cpu")
    assert figures["lengths"][0]["tokens"] == 166


def test_a_folder_without_the_encoders_weights_is_named(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(encoder, folder)
    from safetensors.torch import save_file

    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"pretrained must hold the encoder's weights, got .*query"):
        build(replace(PRETRAINED, pretrained=str(folder), segment_len=83))
    with pytest.raises(SettingError, match="pretrained must be a folder with a tokenizer"):
        build(replace(PRETRAINED, pretrained=str(tmp_path), segment_len=83))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, ["rmt", *arguments])


def test_commands_show_what_they_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "SEGMENT_LEN", 19)
    out = str(tmp_path / "run")
    small = (
        "--vocabulary 0 --layers 1 --width 16 --heads 2 --memory 3 --segment-len 19 --steps 3 --batch 4 --device cpu"
    )
    given = ["detect", *small.split(), "--short", "17", "--segments", "2", "--test-samples", "9", "--anneal", "2"]
    result = invoke("train", *given, "--out", out)
    assert result.exit_code == 0, result.output
    figures = json.loads(RunFiles.of(tmp_path / "run").figures.read_text())
    assert figures["settings"]["later_lr"] == pytest.approx(0.4 * figures["settings"]["lr"])
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row[: -5 - ("annealed" in row)][0] for row in rows] == ["1", "1", "2", "2"]
    assert [(row[-6], row[-2]) for row in rows] == [
        (str(stage["tokens"]), f"{100 * stage['test_accuracy']:.1f}") for stage in figures["stages"]
    ]
    assert [stage["tokens"] for stage in figures["stages"]] == [17, 19, 38, 38]
    again = invoke("train", "--resume", "--segments", "1,2", "--out", out)
    assert again.exit_code == 0, again.output

    result = invoke("evaluate", out, "--segments", "3,2", "--samples", "5,6", "--batch", "3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    figures = json.loads(RunFiles.of(tmp_path / "run").evaluation.read_text())
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row[:4] for row in rows] == [
        [str(cell["segments"]), str(cell["tokens"]), str(cell["samples"]), f"{100 * cell['accuracy']:.1f}"]
        for cell in figures["lengths"]
    ]
    assert rows[0][5] == "100.0"
    assert "state of a text: 192 bytes" in result.stdout

    result = invoke("attention", out, "--segments", "2", "--device", "cpu")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "run" / "attention.json").read_text())
    shown = [line.replace("│", " ").split() for line in result.stdout.splitlines() if line.startswith("│")]
    assert shown == [
        [str(layer), *(f"{100 * share:.1f}" for share in heads)]
        for part in figures["parts"]
        for layer, heads in enumerate(part["share"])
    ]
    assert figures["facts"][0][0] < 19


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Trainer.advance

    def pressed(self: Trainer) -> Step:
        if self.index == 2:
            signal.raise_signal(signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", pressed)
    small = (
        "--vocabulary 0 --layers 1 --width 16 --heads 2 --memory 3 --segment-len 19 --short none --steps 9 --device cpu"
    )
    result = invoke("train", "memorize", *small.split(), "--out", str(tmp_path))
    assert result.exit_code == 130
    expected = f"stopped, checkpoint written; go on with: segattn rmt train --resume --out {tmp_path}"
    assert result.stderr.strip() == f"segattn rmt train: {expected}"
    assert load_checkpoint(RunFiles.of(tmp_path).checkpoint)["trainer"]["index"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TASK must be given, such as detect"),
        (["guess"], "TASK must be one of memorize, detect, "),
        (["detect", "--segments", "2,x"], "--segments must be numbers from 1 on with commas, as 2,8,64, got '2,x'"),
        (["detect", "--segments", "3,2"], "--segments must be rising numbers from 1 on, got 3,2"),
        (["detect", "--segment-len", "5", "--memory", "4", "--short", "none"], "--segments must begin with "),
        (["memorize", "--segment-len", "30", "--memory", "31"], "--segment-len must be at least num_memory_tokens"),
        (["detect", "--short", "499"], "--short must be from "),
        (["detect", "--short", "none", "--short-segments", "2"], "--short-segments must be none without short, got 2"),
        (["detect", "--short-segments", "3,2"], "--short-segments must be rising numbers from 1 on, got 3,2"),
        (["detect", "--short", "17", "--memory", "18", "--short-segments", "2"], "--short must be at least num_memory"),
        (["detect", "--threshold", "1.5"], "--threshold must be above 0 and at most 1, got 1.5"),
        (["detect", "--lr", "-1"], "--lr must be 0 or more, got -1.0"),
        (["detect", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["detect", "--width", "15"], "--width must be a multiple of --heads 4, got 15"),
        (["copy", "--width", "12"], "--width must give even heads, for rotary embedding, got 3"),
        (["detect", "--architecture", "armt"], "--architecture must be rmt for detect, whose model is an encoder"),
        (["copy", "--architecture", "lstm"], "--architecture must be one of rmt, armt, got 'lstm'"),
        (["copy", "--architecture", "armt", "--noise", "0.1"], "--noise is for rmt, got 0.1 with copy and armt"),
        (["detect", "--decoys", "1"], "--decoys must be from 0 to below 1, got 1.0"),
        (["copy", "--decoys", "0.1"], "--decoys is for tasks of text, memorize, "),
        (["detect", "--rewrite"], "--rewrite is for retrieval, got True with detect and rmt"),
        (["copy", "--encoder", "modernbert"], "--encoder is for the small model of tasks of classes, got 'modernbert'"),
        (["detect", "--pretrained", ".", "--layers", "3"], "--layers is for the small model, got 3 with detect and a "),
        (["qa1", "--d-mem", "8"], "--d-mem is for armt, got 8 with qa1 and rmt"),
        (["--start", "nowhere"], "--start must be one that segattn rmt train wrote, got "),
        (["qa2", "--segment-len", "30", "--segments", "3"], "--segments must begin with "),
        (["detect", "--freeze"], "--freeze must come with --pretrained"),
        (["qa1", "--pretrained", "."], "--pretrained is for tasks of classes, memorize, detect, reasoning, got "),
        (["retrieval", "--segment-len", "9"], "--segment-len must be 4 for retrieval, a pair, got 9"),
        (["retrieval", "--segments", "2,102"], "--segments must hold at most 100 pairs, whose keys differ, got 101"),
        (["detect", "--babi", "nowhere"], "--babi must be a folder that holds one file qa1_"),
        (["detect", "--book", "nowhere"], "--book must be a text file in UTF-8"),
        (["detect", "--device", "meta"], "--device must be one that PyTorch can use here, such as 'cpu', got 'meta'"),
        (["detect", "--seed", str(2**32)], f"--seed must be below 2**32, got {2**32}"),
        (["--resume"], "--resume needs a checkpoint in the output folder, and there is no"),
    ],
)
def test_train_names_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = invoke("train", *arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"segattn rmt train: {message}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "FOLDER must be one that segattn rmt train wrote, got 'nowhere'"),
        (["evaluate", "RUN", "--samples", "1,2"], "--samples must be one number, or one for each of 5 lengths, got 2"),
        (["evaluate", "RUN", "--segments", "2,2"], "--segments must differ from each other, got 2,2"),
        (["evaluate", "RUN", "--book", "nowhere"], "--book must be there, got"),
        (["attention", "RUN", "--segments", "0"], "--segments must be at least 1, got 0"),
        (["attention", "RUN", "--sample", "-1"], "--sample must be at least 0, got -1"),
    ],
)
def test_others_name_what_is_wrong(arguments: list[str], message: str, tiny: Path, tmp_path: Path) -> None:
    result = invoke(*(str(tiny) if x == "RUN" else x for x in arguments), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"segattn rmt {arguments[0]}: {message}")
    assert not (tmp_path / "out").exists()


def test_attention_is_of_runs_with_facts_and_a_memory_that_is_seen(tmp_path: Path) -> None:
    run_training(replace(COPY, steps=1), tmp_path, Quiet())
    with pytest.raises(SettingError, match="folder must be a run of a task with facts in text, got one of copy"):
        run_attention(tmp_path, Sample())


@pytest.mark.parametrize("arguments", [["evaluate", "DEMO"], ["attention", "DEMO"], ["train", "--start", "DEMO"]])
def test_the_folder_of_another_command_is_named(arguments: list[str], tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "figures.json").write_text(json.dumps({"settings": {"text": None, "steps": 2, "update": "delta"}}))
    result = invoke(*(str(demo) if x == "DEMO" else x for x in arguments), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    name = "--start" if arguments[0] == "train" else "FOLDER"
    problem = f"must be one that segattn rmt train wrote, got '{demo}' (its figures.json is of another command, or of"
    assert result.stderr.startswith(f"segattn rmt {arguments[0]}: {name} {problem}")
    assert result.stderr.count("\n") == 1


def test_weights_of_another_run_are_not_loaded(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny, folder)
    figures = json.loads(RunFiles.of(folder).figures.read_text())
    figures["settings"]["width"] = 20
    RunFiles.of(folder).figures.write_text(json.dumps(figures))
    with pytest.raises(SettingError, match="folder must be one that segattn rmt train wrote"):
        load_run(folder)


def test_bars_follow_a_run(tmp_path: Path) -> None:
    """Check that a terminal shows a bar for each stage, and one for all that is read, to their ends."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with command.Stages(console) as bars:
        figures = run_training(replace(TINY, anneal=3), tmp_path, bars)
        described = [(task.description, task.total) for task in bars.bars.tasks]
        assert described == [("19 tokens", 5), ("2 × 19 tokens", 5), ("2 × 19 tokens annealed", 3)]
        assert all(task.finished for task in bars.bars.tasks)
        *learnt, annealed = [task.fields["note"] for task in bars.bars.tasks]
        for note, stage in zip(learnt, figures["stages"], strict=False):
            test, training = (100 * stage[f"{name}_accuracy"] for name in ("test", "training"))
            assert note == f"test {test:.1f} %, not converged (training {training:.1f} % < 99 %)"
        assert len(learnt) == 2
        assert annealed == f"test {100 * figures['stages'][2]['test_accuracy']:.1f} %"
    with Reading(console, "evaluate", command.describe_length) as bar:
        run_evaluation(tmp_path, Grid((1, 4), (5,), (2,)), bar, device="cpu")
        (task,) = bar.bars.tasks
        assert task.total == task.completed == 5 * (19 + 4 * 19)
