"""`segattn convert-report`: perplexities are those of the models themselves, and rows are kept."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
commands = pytest.importorskip("segattn.cli.main")
from matplotlib.figure import Figure
from models import make, make_of_bytes
from typer.testing import CliRunner, Result

import segattn
from segattn.infini.evaluate import conversions, plots
from segattn.infini.evaluate.conversions import FULL, arguments_of, run_conversions
from segattn.infini.evaluate.settings import CONVERSIONS, Checkpoint, Conversions
from segattn.infini.huggingface.saving import save_pretrained
from segattn.infini.huggingface.settings import conversion_of
from segattn.runs.errors import SettingError
from segattn.runs.silence import Silent
from segattn.runs.text import generate_text

TOKENS = 203


def tiny() -> Any:
    return make_of_bytes(256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, plain and converted, and running text."""
    folder: Path = tmp_path_factory.mktemp("models")
    tiny().save_pretrained(folder / "plain")
    save_pretrained(segattn.convert(tiny(), 24, quiet=True), folder / "converted")
    (folder / "text.txt").write_text(generate_text(400, seed=1), encoding="utf-8")
    return folder


class Lines(Silent):
    """Keep what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def finished(self, what: Any) -> None:
        self.lines.append(what)


def nats(model: Any, folder: Path) -> Tensor:
    """Return the losses of a text's tokens but the first, by one forward."""
    tokens = torch.tensor([list((folder / "text.txt").read_bytes())[:TOKENS]])
    with torch.no_grad():
        return F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none").double()


def invoke(folder: Path, out: Path, *arguments: str) -> Result:
    given = ["convert-report", str(folder / "plain"), "--text", str(folder / "text.txt"), "--tokens", str(TOKENS)]
    return CliRunner().invoke(
        commands.app,
        [*given, "--tokenizer", "bytes", "--device", "cpu", "--out", str(out), *arguments],
        env={"COLUMNS": "200"},
    )


def test_rows_are_the_perplexities_of_the_models(folder: Path, tmp_path: Path) -> None:
    said = invoke(
        folder,
        tmp_path,
        "--conversions",
        "256 gate=0, 24  gate=-20,24 gate=1.5 update=linear,24 gate=-20 lookback=1 sinks=3",
    )
    assert said.exit_code == 0, said.output
    figures = json.loads((tmp_path / "convert-report.json").read_text())
    rows = {row["conversion"]: row for row in figures["rows"]}
    linear = segattn.convert(tiny(), 24, "linear", 1.5, quiet=True)
    window = segattn.convert(tiny(), 24, lookback=1, sinks=3, gate_init=-20, quiet=True)
    models = {FULL: tiny(), "24 gate=1.5 update=linear": linear, "24 gate=-20 lookback=1 sinks=3": window}
    assert list(rows) == [FULL, "256 gate=0", "24 gate=-20", *list(models)[1:]]
    for name, model in models.items():
        wanted = nats(model, folder)
        # of 202 tokens, since the first is not predicted
        quarters = [part.mean().exp().item() for part in wanted.split([50, 51, 50, 51])]
        ends = [202 * number // 16 for number in range(17)]
        parts = [wanted[begin:end] for begin, end in pairwise(ends)]
        assert rows[name]["quarters"] == pytest.approx(quarters, rel=1e-5)
        assert rows[name]["perplexity"] == pytest.approx(wanted.mean().exp().item(), rel=1e-5)
        assert [x["perplexity"] for x in rows[name]["by_position"]] == pytest.approx(
            [part.mean().exp().item() for part in parts], rel=1e-5
        )
        for value in (rows[name]["perplexity"], *rows[name]["quarters"]):
            assert f"{value:.4g}" in said.output
    # a segment that holds the whole text is full attention
    assert rows["256 gate=0"]["perplexity"] == pytest.approx(rows[FULL]["perplexity"], rel=1e-6)
    # segments without memory are texts of their own at positions that begin anew, but predict on from the last one
    assert rows["24 gate=-20"]["perplexity"] != pytest.approx(rows[FULL]["perplexity"], rel=1e-3)
    # keys and values of two layers, two heads of four channels, of each token but the last
    assert rows[FULL]["cache_bytes"] == 2 * 2 * 2 * 4 * 4 * (TOKENS - 1)
    assert (tmp_path / "convert-report.png").stat().st_size > 1000


def test_kept_rows_are_not_measured_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(folder, tmp_path, "--conversions", "24 gate=0").exit_code == 0
    again = invoke(folder, tmp_path, "--conversions", "24 gate=0")
    assert again.exit_code == 2
    assert "must not hold figures of an earlier run" in again.output
    path = tmp_path / "convert-report.json"
    figures = json.loads(path.read_text())
    figures["rows"][1]["perplexity"] = 12345.0
    path.write_text(json.dumps(figures))
    assert invoke(folder, tmp_path, "--conversions", "24 gate=-2,24 gate=0", "--resume").exit_code == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["conversion"] for row in rows] == [FULL, "24 gate=-2", "24 gate=0"]
    assert rows[2]["perplexity"] == 12345.0
    assert rows[0] == figures["rows"][0]
    other = invoke(folder, tmp_path, "--conversions", "24 gate=0", "--resume", "--tokens", "100")
    assert other.exit_code == 2
    assert "--tokens must be the earlier run's" in other.output


def test_a_model_is_converted_once_for_each_row_and_shares_its_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    count: list[Any] = []

    def note(model: Any, name: str, *arguments: Any) -> Any:
        measured.append(model)
        return measure(model, name, *arguments)

    measure, convert = conversions.measure, conversions.convert
    monkeypatch.setattr(conversions, "measure", note)
    monkeypatch.setattr(conversions, "convert", lambda model, *x, **y: (count.append(y), convert(model, *x, **y))[1])
    checkpoint, text = Checkpoint(str(folder / "plain"), "bytes", device="cpu"), str(folder / "text.txt")
    run_conversions(checkpoint, Conversions(text, ("24 gate=3", "32 gate=-1"), TOKENS), tmp_path)
    assert [options["segment_len"] for options in count] == [24, 32]
    plain, *converted = measured
    weights = {name: weight.data_ptr() for name, weight in plain.named_parameters()}
    assert not any("segattn" in name for name in weights)
    for model, (size, gate) in zip(converted, ((24, 3.0), (32, -1.0)), strict=True):
        assert conversion_of(model).settings.segment_len == size
        of_model = dict(model.named_parameters())
        assert {name: of_model[name].data_ptr() for name in weights} == weights
        assert {x for name in of_model.keys() - weights.keys() for x in of_model[name].tolist()} == {gate}


def test_the_order_of_conversions_is_of_no_account(folder: Path, tmp_path: Path) -> None:
    def order(*names: str) -> dict[str, float]:
        settings = Conversions(str(folder / "text.txt"), names, TOKENS)
        checkpoint = Checkpoint(str(folder / "plain"), "bytes", device="cpu")
        rows = run_conversions(checkpoint, settings, tmp_path / names[0])["rows"]
        return {row["conversion"]: row["perplexity"] for row in rows}

    assert order("24 gate=3", "32 gate=-1") == order("32 gate=-1", "24 gate=3")


@pytest.mark.parametrize("count", [16, 17, 33, 64, 90])
def test_parts_of_short_texts_are_even(folder: Path, count: int) -> None:
    tokens = list((folder / "text.txt").read_bytes()[:count])
    row = conversions.measure(tiny(), "short", tokens)
    with torch.no_grad():
        nats = F.cross_entropy(
            tiny()(torch.tensor([tokens])).logits[0, :-1], torch.tensor(tokens[1:]), reduction="none"
        )
    for perplexities, parts in ((row.quarters, 4), ([x["perplexity"] for x in row.by_position], min(16, count - 1))):
        wanted = [nats[i * (count - 1) // parts : (i + 1) * (count - 1) // parts].double() for i in range(parts)]
        assert max(map(len, wanted)) - min(map(len, wanted)) <= 1
        assert perplexities == pytest.approx([part.mean().exp().item() for part in wanted], rel=1e-5)
    assert row.by_position[0]["begin"] == 1
    assert row.by_position[-1]["end"] == count
    assert [x["end"] for x in row.by_position[:-1]] == [x["begin"] for x in row.by_position[1:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conversions", "24 gates=1"], "--conversions must be tokens per segment and words"),
        (["--conversions", "24 gate=low"], "got '24 gate=low'"),
        (["--conversions", "24 lookback=2"], "lookback must be 0 or 1"),
        (["--conversions", "1 gate=0"], "segment_len must be at least 2"),
        (["--conversions", " ,"], "--conversions must name at least one"),
        (["--tokens", "3"], "--tokens must be at least 16"),
        (["--tokens", "257"], "--tokens must be at most the 256 positions"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    said = invoke(folder, tmp_path, *arguments)
    assert said.exit_code == 2, said.output
    assert message in " ".join(said.output.split())


def test_a_model_takes_what_it_can_of_the_usual_conversions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learnt positions leave no room for a lookback; what was chosen is refused before anything is measured."""
    config = transformers.GPT2Config(vocab_size=256, n_positions=256, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    usual = ("24 lookback=1", "24 gate=-20", "24 sinks=4")
    monkeypatch.setattr(conversions, "CONVERSIONS", usual)
    checkpoint, text = Checkpoint(str(tmp_path / "gpt2"), "bytes", device="cpu"), str(folder / "text.txt")
    found = run_conversions(checkpoint, Conversions(text, conversions=usual, tokens=100), tmp_path / "a")
    assert [row["conversion"] for row in found["rows"]] == ["full attention", "24 gate=-20"]
    monkeypatch.setattr(conversions, "CONVERSIONS", ())
    monkeypatch.setattr(conversions, "measure", None)
    with pytest.raises(SettingError, match="must be what the model can be converted to, got '24 lookback=1'"):
        run_conversions(checkpoint, Conversions(text, conversions=usual, tokens=100), tmp_path / "b")


@pytest.fixture
def short(tmp_path: Path) -> Checkpoint:
    """A model of bytes with 64 learnt positions, fewer than a segment of any usual conversion."""
    make("gpt2", vocab_size=256).save_pretrained(tmp_path / "gpt2")
    return Checkpoint(str(tmp_path / "gpt2"), "bytes", device="cpu")


def test_a_model_that_no_usual_conversion_fits_is_told_to_name_others(
    folder: Path, tmp_path: Path, short: Checkpoint
) -> None:
    text, said = str(folder / "text.txt"), Lines()
    with pytest.raises(SettingError) as refused:
        run_conversions(short, Conversions(text, tokens=50), tmp_path / "none", said)
    too_long = "segment_len must be at most the 64 learnt positions of the model, which begin anew with each segment"
    assert str(refused.value) == (
        'conversions must be given, as none of the usual ones fits this model: for "256 gate=-20", '
        f'{too_long}, got 256. Name some that fit, such as --conversions "32"'
    )
    assert [line.split(" is left out: ")[0] for line in said.lines] == [*CONVERSIONS]
    assert said.lines[0] == f"256 gate=-20 is left out: {too_long}, got 256"
    # the remedy is one
    rows = run_conversions(short, Conversions(text, ("32",), tokens=50), tmp_path / "named")["rows"]
    assert [row["conversion"] for row in rows] == [FULL, "32"]


def test_what_is_chosen_and_refused_is_named(folder: Path, tmp_path: Path, short: Checkpoint) -> None:
    """With what to choose for learnt positions, and for a model that cannot be converted at all."""
    text = str(folder / "text.txt")
    with pytest.raises(
        SettingError,
        match=r"got '16 sinks=4': lookback and sinks must be 0 for a model with learnt positions, got 0 and 4, .*: "
        r"choose lookback=0 and sinks=0 \(--lookback 0 --sinks 0\), and a longer segment_len where more",
    ):
        run_conversions(short, Conversions(text, ("16 sinks=4",), tokens=50), tmp_path / "sinks")
    make("bloom", vocab_size=256).save_pretrained(tmp_path / "bloom")
    bloom = Checkpoint(str(tmp_path / "bloom"), "bytes", device="cpu")
    said = Lines()
    with pytest.raises(SettingError, match="model must know positions by rotary or learnt embedding"):
        run_conversions(bloom, Conversions(text, tokens=50), tmp_path / "biases", said)
    assert said.lines == []


def test_texts_and_models_must_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Call me.")
    checkpoint = Checkpoint(str(folder / "plain"), "bytes", device="cpu")
    with pytest.raises(SettingError, match="tokens must be at most those of the text, 8 after --skip, got 100"):
        run_conversions(checkpoint, Conversions(str(tmp_path / "short.txt"), tokens=100), tmp_path / "a")
    converted = Checkpoint(str(folder / "converted"), "bytes", device="cpu")
    with pytest.raises(SettingError, match=r"model must be plain, got '.*converted', which is converted already"):
        run_conversions(converted, Conversions(str(folder / "text.txt"), tokens=100), tmp_path / "b")


def test_words_are_arguments_of_convert() -> None:
    assert arguments_of("256 gate=-4 lookback=1 sinks=4 update=linear") == {
        "segment_len": 256,
        "gate_init": -4.0,
        "lookback": 1,
        "sinks": 4,
        "update": "linear",
    }
    assert arguments_of("segment_len=128") == {"segment_len": 128}
    assert math.isclose(arguments_of("12 gate=1e-3")["gate_init"], 1e-3)


def test_the_picture_has_a_curve_for_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: drawn.append(figure))
    buckets = [{"begin": 16 * i, "end": 16 * (i + 1), "perplexity": 2.0 + i} for i in range(3)]
    rows = [{"conversion": str(i), "perplexity": 3.0, "by_position": buckets} for i in range(41)]
    plots.plot_conversions(tmp_path / "rows.png", rows, "forty-one")
    assert [line.get_label() for line in drawn[0].axes[0].lines] == [f"{i}: 3" for i in range(41)]
