"""Fine-tuning: steps are those of a plain loop, a run can be stopped at any of them, and what it writes can be used."""

from __future__ import annotations

import io
import json
import math
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
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
from segattn.infini.evaluate.loading import ByteTokenizer
from segattn.infini.finetune.finetuner import Finetuner, FinetuneSettings
from segattn.infini.finetune.runs import Outputs, build, run_finetune
from segattn.infini.finetune.text import rows_of, tokens_of_dataset, tokens_of_file
from segattn.infini.huggingface.saving import from_pretrained, save_pretrained
from segattn.runs.checkpoint import InterruptedRunError, SettingError
from segattn.runs.text import generate_text

L, LENGTH = 16, 75


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
    """A text; a plain model, one with dropout, and a converted one, all of bytes."""
    root = tmp_path_factory.mktemp("finetune")
    (root / "text.txt").write_text(generate_text(300, 0), encoding="utf-8")
    make("llama", vocab_size=256).save_pretrained(root / "plain")
    make("gpt2", vocab_size=256, resid_pdrop=0.2).save_pretrained(root / "dropping")
    make("gpt2", vocab_size=256, attn_pdrop=0.2).save_pretrained(root / "forbidden")
    save_pretrained(segattn.convert(make("llama", vocab_size=256), L, "linear", quiet=True), root / "converted")
    return root


@pytest.fixture
def settings(folder: Path) -> FinetuneSettings:
    return FinetuneSettings(
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
        device="cpu",
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(mine: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def test_files_are_cut_into_rows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdéfg", encoding="utf-8")
    tokens = tokens_of_file(path, ByteTokenizer())
    assert tokens.tolist() == list("abcdéfg".encode())
    assert rows_of(tokens, 3).tolist() == [[97, 98, 99], [100, 195, 169]]
    assert rows_of(tokens, 8).shape == (1, 8)
    with pytest.raises(SettingError, match="length must be at most the 8 tokens of the text, got 9"):
        rows_of(tokens, 9)


def test_data_sets_are_laid_end_to_end(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    tokenizer = ByteTokenizer()
    tokenizer.prefix = [0]
    data = datasets.Dataset.from_dict({"story": ["ab", "", "c"], "number": [1, 2, 3]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "split")
    for name, split in (("one", "train"), ("split", "test")):
        tokens = tokens_of_dataset(str(tmp_path / name), tokenizer, split, "story")
        assert tokens.tolist() == [0, 97, 98, 0, 0, 99]
    for name, split, column, message in (
        ("one", "train", "text", "column must be one of story, number, got 'text'"),
        ("one", "train", "number", "column must hold text, got 'number', which holds int"),
        ("split", "train", "story", "split must be one of test, got 'train'"),
        ("none", "train", "story", "dataset must lead to a data set, got"),
    ):
        with pytest.raises(SettingError, match=message):
            tokens_of_dataset(str(tmp_path / name), tokenizer, split, column)


def test_steps_are_those_of_a_plain_loop(settings: FinetuneSettings) -> None:
    settings = replace(settings, accumulate=2)
    tuner, _, _ = build(settings)
    model = segattn.convert(make("llama", vocab_size=256), L, quiet=True).train()
    optimiser = torch.optim.AdamW(segattn.parameter_groups(model, 1e-3), betas=(0.9, 0.95))
    bases = [group["lr"] for group in optimiser.param_groups]
    rows = tokens_of_file(str(settings.text), ByteTokenizer())[: len(tuner.rows) * LENGTH].view(-1, LENGTH)
    assert len(rows) >= 12
    order = np.random.default_rng((0, 0)).permutation(len(rows))
    # one step of warm-up, then a cosine over two
    for step, share in enumerate((0.5, 1.0, 0.5)):
        taken = rows[order[4 * step : 4 * step + 4]]
        loss = F.cross_entropy(model(taken, use_cache=False).logits[:, :-1].flatten(0, 1), taken[:, 1:].flatten())
        for group, base in zip(optimiser.param_groups, bases, strict=True):
            group["lr"] = share * base
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        figures = tuner.advance()
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert figures["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert figures["tokens"] == 4 * LENGTH * (step + 1)
        assert (figures["lr"], figures["gate_lr"]) == pytest.approx((share * 1e-3, share * 1e-2))
    wanted = weights(model)
    for name, value in weights(tuner.model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-4, msg=name)
    shares = torch.cat([value.sigmoid() for name, value in wanted.items() if "segattn_gate" in name])
    found = [figures[f"gate_{name}"] for name in ("least", "mean", "largest")]
    assert found == pytest.approx([shares.min().item(), shares.mean().item(), shares.max().item()], abs=1e-4)
    assert figures["gate_largest"] - figures["gate_least"] > 1e-3


def test_every_row_comes_once_before_any_comes_again(settings: FinetuneSettings) -> None:
    tuner, _, _ = build(settings)
    count = len(tuner.rows)
    rows = torch.arange(count)[:, None].expand(-1, LENGTH)
    tuner = Finetuner(tuner.model, rows, settings)
    seen = torch.cat([tuner._batch(index)[:, 0] for index in range(count)]).tolist()
    assert sorted(seen[:count]) == sorted(seen[count:]) == list(range(count))
    assert seen[:count] != seen[count:]
    other = Finetuner(tuner.model, rows, replace(settings, seed=1))
    assert [int(other._batch(index)[0, 0]) for index in range(4)] != seen[:8:2]


def test_rates_rise_and_fall(settings: FinetuneSettings) -> None:
    rates = [replace(settings, steps=104, warmup=3).rate(step) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert replace(settings, steps=1, warmup=0).rate(0) == 1


def test_interrupted_run_goes_on_to_the_same_weights(settings: FinetuneSettings, folder: Path, tmp_path: Path) -> None:
    # dropout draws PyTorch's random numbers
    settings = replace(settings, model=str(folder / "dropping"), steps=5, truncate=2)
    whole, part, resumed = Quiet(), Quiet(interrupt_after=2), Quiet()
    run_finetune(settings, tmp_path / "whole", whole)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError):
        run_finetune(settings, tmp_path / "part", part)
    assert signal.getsignal(signal.SIGINT) is handler
    outputs = Outputs.of(tmp_path / "part")
    assert not outputs.model.exists()
    # a line that was written after the checkpoint
    with outputs.log.open("a") as log:
        log.write('{"step": 3}\n')
    with pytest.raises(SettingError, match="out must not hold"):
        run_finetune(settings, tmp_path / "part", Quiet())
    run_finetune(settings, tmp_path / "part", resumed, resume=True)
    assert [line["loss"] for line in [*part.lines, *resumed.lines]] == [line["loss"] for line in whole.lines]
    logged = [json.loads(line) for line in outputs.log.read_text().splitlines()]
    assert logged == [*part.lines, *resumed.lines]
    models = [from_pretrained(tmp_path / name / "model", quiet=True) for name in ("part", "whole")]
    assert_equal(*map(weights, models))
    assert not torch.equal(models[0].transformer.wpe.weight, make("gpt2", vocab_size=256).transformer.wpe.weight)


def test_checkpointed_gradients_are_the_same(settings: FinetuneSettings) -> None:
    plain, again = (build(replace(settings, gradient_checkpointing=on))[0] for on in (False, True))
    assert again.advance()["gradient_norm"] == pytest.approx(plain.advance()["gradient_norm"], rel=1e-5)


def test_gates_alone(settings: FinetuneSettings) -> None:
    tuner, _, _ = build(replace(settings, gates_only=True))
    before = weights(tuner.model)
    tuner.advance()
    moved = {name for name, value in weights(tuner.model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "segattn_gate" in name}
    assert len(moved) == 2


def test_converted_models_stay_as_they_were_converted(settings: FinetuneSettings, folder: Path) -> None:
    settings = replace(settings, model=str(folder / "converted"), segment_len=None)
    tuner, _, _ = build(settings)
    assert segattn.infini.huggingface.settings.conversion_of(tuner.model).settings.update == "linear"
    build(replace(settings, segment_len=L, update="linear"))
    with pytest.raises(SettingError, match="update must be the model's, 'linear', or left out, got 'delta'"):
        build(replace(settings, update="delta"))


def test_a_loss_that_is_no_number_stops_the_run(settings: FinetuneSettings) -> None:
    tuner, _, _ = build(settings)
    with torch.no_grad():
        tuner.model.lm_head.weight[0] = math.nan
    before = weights(tuner.model)
    with pytest.raises(SettingError, match="lr must be lower, or --dtype wider: step 1 has a loss of nan"):
        tuner.advance()
    after = weights(tuner.model)
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def test_bar_follows_a_run(settings: FinetuneSettings, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with command._Bar(console) as bar:
        run_finetune(settings, tmp_path, bar)
        assert bar.progress.tasks[0].finished
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
    trained = command._Lines.trained

    def interrupt(self: Any, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        trained(self, step, steps, figures)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(command._Lines, "trained", interrupt)
        result = CliRunner().invoke(commands.app, arguments(folder, tmp_path / "part"))
    again = f"segattn finetune --resume --out {tmp_path / 'part'}"
    assert result.exit_code == 130
    assert result.stderr == f"segattn finetune: stopped, checkpoint written; go on with: {again}\n"
    result = CliRunner().invoke(commands.app, again.split()[1:])
    assert result.exit_code == 0, result.output
    models = [from_pretrained(tmp_path / name / "model", quiet=True) for name in ("part", "whole")]
    assert_equal(*map(weights, models))
    result = CliRunner().invoke(commands.app, [*again.split()[1:], "--lr", "1"])
    assert result.exit_code == 2
    assert "--lr must be the checkpoint's with resume, 2e-05, got 1.0" in result.stderr
    (tmp_path / "other.txt").write_text(generate_text(300, 1))
    result = CliRunner().invoke(commands.app, [*again.split()[1:], "--text", str(tmp_path / "other.txt")])
    assert "--text must hold the tokens of the checkpoint's with resume, got others" in result.stderr
    Outputs.of(tmp_path / "part").checkpoint.write_bytes(b"not a checkpoint")
    result = CliRunner().invoke(commands.app, again.split()[1:])
    assert "--resume needs a checkpoint of segattn finetune; " in result.stderr


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
