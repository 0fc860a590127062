"""RULER and BABILong by lm-evaluation-harness itself: its runner asks the model, on texts that are made here."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")
commands = pytest.importorskip("segattn.cli.main")
import numpy as np
from models import make_of_bytes
from typer.testing import CliRunner, Result

import segattn
from segattn.infini.evaluate import harness, ruler
from segattn.infini.evaluate.benchmarks import Benchmark, babilong, evaluate, measure
from segattn.infini.evaluate.benchmarks import ruler as ruler_benchmark
from segattn.infini.evaluate.harness_model import UNBOUNDED, SegattnLM, tokenizer_of
from segattn.infini.evaluate.loading import TOKENIZER, ByteTokenizer, Loaded, load
from segattn.infini.evaluate.runs import run_benchmark
from segattn.infini.evaluate.settings import Source, Tasks
from segattn.infini.huggingface.saving import save_pretrained
from segattn.rmt.tasks.babilong import Stories
from segattn.runs.errors import SettingError

L = 96
BYTES = tokenizer_of(Loaded(nn.Module(), ByteTokenizer(), {}))


def count(text: str) -> int:
    return len(BYTES(text).input_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of two models of bytes, converted and plain."""
    made: Path = tmp_path_factory.mktemp("models")
    model = make_of_bytes(300)
    setattr(model.config, TOKENIZER, "bytes")
    model.save_pretrained(made / "plain")
    segattn.convert(model, L, quiet=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.segattn_gate.bias)
    save_pretrained(model, made / "converted")
    return made


@pytest.fixture(scope="module")
def stories() -> Stories:
    return Stories(("qa1", "qa4"))


@pytest.fixture(scope="module")
def babilong_benchmark(stories: Stories) -> Benchmark:
    return babilong(("qa1", "qa4"), stories.documents)


@pytest.fixture(scope="module")
def uneven(stories: Stories) -> list[dict[str, Any]]:
    """Samples of unlike lengths."""
    lengths = (500, 900, 2000, 700, 1300)
    return [stories.documents("qa1", count, length, 1, seed)[0] for seed, length in enumerate(lengths)]


def said(lm: SegattnLM, benchmark: Benchmark, task: str, documents: list[dict[str, Any]]) -> list[str]:
    """Return what the model answers to each document, by lm-eval's own log."""
    samples = evaluate(lm, benchmark, task, documents)["samples"][benchmark.tasks[task]]
    return [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


class Knowing(SegattnLM):
    """Answers what is right to a share of the requests, and nothing to the others."""

    def __init__(self, loaded: Loaded, every: int = 1) -> None:
        super().__init__(loaded)
        self.every = every
        self.prompts: list[str] = []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.prompts = [request.args[0] for request in requests]
        right = [request.doc.get("target") or ", ".join(request.doc["outputs"]) for request in requests]
        return [f" It is {answer}." if i % self.every == 0 else "no" for i, answer in enumerate(right)]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(Source(str(folder / "converted"), device="cpu"))


def test_bytes_as_a_tokenizer_of_transformers() -> None:
    text = "Call me  Ishmael.\n\ttoo: é, 鯨 <s>"
    assert BYTES(text).input_ids == list(text.encode())
    assert BYTES.decode(list(text.encode())) == text
    assert BYTES.pad_token_id == BYTES.eos_token_id == 0


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_cwe", "ruler_fwe"])
def test_texts_of_ruler_depend_on_their_arguments_alone(task: str) -> None:
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    length = 8192 if task == "ruler_cwe" else 4096
    made = ruler.documents(task, BYTES, length, 2, seed=1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.random()
    assert ruler.documents(task, BYTES, length, 2, seed=1) == made
    assert ruler.documents(task, BYTES, length, 2, seed=2) != made
    assert len({document["input"] for document in made}) == 2
    for document in made:
        assert length // 2 < count(document["input"]) <= length
        assert all(answer in document["input"] for answer in document["outputs"])


def test_chains_of_variables_need_a_tokenizer_of_longer_tokens() -> None:
    """With tokens of bytes lm-eval's generator would look for a short enough text without end."""
    with pytest.raises(ValueError, match=r"task ruler_vt needs an example of at most 500 tokens, got \d+"):
        ruler.documents("ruler_vt", BYTES, 8192, 1, 0)

    class Words:
        def __call__(self, text: str) -> Any:
            return transformers.BatchEncoding({"input_ids": text.split()})

    made = ruler.documents("ruler_vt", Words(), 1024, 2, 0)
    assert [len(document["outputs"]) for document in made] == [5, 5]
    assert all(600 < len(document["input"].split()) <= 1024 for document in made)


@pytest.mark.parametrize(("task", "length"), [("niah_single_1", 200), ("ruler_cwe", 1024), ("ruler_fwe", 512)])
def test_a_length_that_holds_no_text_is_refused(task: str, length: int) -> None:
    with pytest.raises(ValueError, match=rf"length must .*{task}.* got {length}"):
        ruler.documents(task, BYTES, length, 1, 0)


def test_stories_stand_in_order_in_the_book(stories: Stories) -> None:
    made = stories.documents("qa1", count, 3000, 8, seed=5)
    assert made == stories.documents("qa1", count, 3000, 8, seed=5)
    assert made != stories.documents("qa1", count, 3000, 8, seed=6)
    questions = {(question.text, question.answer): [] for question in stories.questions["qa1"]}
    for question in stories.questions["qa1"]:
        questions[question.text, question.answer].append(question.facts)
    places = []
    for document in made:
        assert 2500 < count(document["input"]) <= 3000
        found = [
            at
            for facts in questions[document["question"], document["target"]]
            if sorted(at := [document["input"].find(fact) for fact in facts]) == at and at[0] >= 0
        ]
        assert found
        places += [at / 3000 for at in found[0]]
    assert min(places) < 0.3
    assert max(places) > 0.7
    with pytest.raises(ValueError, match=r"length must be at least \d+ to hold a story, got 20"):
        stories.documents("qa1", count, 20, 1, 0)


def test_a_text_longer_than_the_book_begins_it_again(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(f"Sentence {number} of a book." for number in range(30)))
    document = Stories(("qa1",), book=tmp_path / "book.txt").documents("qa1", count, 2000, 1, 0)[0]
    assert document["input"].count("Sentence 29 of a book.") > 5
    assert "Sentence 0 of" not in document["input"]


def test_scores_are_those_of_the_answers(loaded: Loaded, babilong_benchmark: Benchmark) -> None:
    for every, score in ((1, 1.0), (2, 0.5)):
        lm = Knowing(loaded, every)
        # 1024 is none of the lengths that lm-eval's files name
        for length in (1024, 4096):
            cell = measure(lm, ruler_benchmark(), "niah_single_1", length, samples=4)
            assert (cell.score, cell.samples, cell.length) == (score, 4, length)
        assert measure(lm, babilong_benchmark, "qa1", 600, samples=6).score == score
    # lm-eval's own instructions and examples
    assert lm.prompts[0].startswith("I will give you context with the facts about positions of different persons")
    assert lm.prompts[0].count("The most recent location of Charlie is balcony.") == 1


def test_batches_give_the_same_answers(
    loaded: Loaded, babilong_benchmark: Benchmark, uneven: list[dict[str, Any]]
) -> None:
    one = said(SegattnLM(loaded), babilong_benchmark, "qa1", uneven)
    assert len(set(one)) > 1
    for batch in (4, "auto"):
        assert said(SegattnLM(loaded, batch_size=batch), babilong_benchmark, "qa1", uneven) == one
    assert said(SegattnLM(loaded, piece=L), babilong_benchmark, "qa1", uneven) == one
    assert said(SegattnLM(loaded, piece=100 * L), babilong_benchmark, "qa1", uneven) == one


def test_answers_are_those_of_the_model(
    loaded: Loaded, babilong_benchmark: Benchmark, uneven: list[dict[str, Any]]
) -> None:
    """The memory is there: what the converted model itself says to lm-eval's prompts."""
    lm = Knowing(loaded)
    said(lm, babilong_benchmark, "qa1", uneven)
    answers = said(SegattnLM(loaded), babilong_benchmark, "qa1", uneven)
    model: Any = loaded.model
    for prompt, answer in zip(lm.prompts, answers, strict=True):
        ids = torch.tensor([list(prompt.encode())])
        new = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=0)[0, ids.shape[1] :]
        assert answer == BYTES.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("batch", [1, 2, "auto"])
def test_no_pass_grows_with_the_length(
    loaded: Loaded, babilong_benchmark: Benchmark, stories: Stories, batch: int | str
) -> None:
    lm, model = SegattnLM(loaded, batch_size=batch, max_batch_size=8), loaded.model
    sizes: list[int] = []
    # the trunk: transformers 4 calls the forward of the model around it, past its hooks
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        said(lm, babilong_benchmark, "qa1", stories.documents("qa1", count, 20_000, 2, 0))
    finally:
        hook.remove()
    assert sum(sizes) > 40_000
    assert max(sizes) <= 4096
    assert lm.longest > 20_000


def test_lm_eval_makes_the_model_by_its_name(
    folder: Path, babilong_benchmark: Benchmark, uneven: list[dict[str, Any]]
) -> None:
    """Its own way, by arguments in a string, as its command takes them."""
    assert harness.harness_class() is harness.harness_class() is SegattnLM
    registry = pytest.importorskip("lm_eval.api.registry")
    lm = registry.get_model("segattn").create_from_arg_string(
        f"pretrained={folder / 'converted'},max_length=900", {"batch_size": 2, "device": "cpu"}
    )
    assert segattn.InfiniCache(lm.model).settings.segment_len == L
    assert (lm.max_length, lm.batch_size) == (900, 2)
    lm.longest = 0
    lm.generate_until([], disable_tqdm=True)
    said(lm, babilong_benchmark, "qa1", uneven[2:3])
    assert lm.longest == 900 - 16


def test_a_converted_model_has_no_longest_text(folder: Path) -> None:
    plain = str(folder / "plain")
    assert SegattnLM(str(folder / "converted"), device="cpu").max_length == UNBOUNDED
    assert SegattnLM(plain, device="cpu").max_length == 300
    with pytest.raises(SettingError, match=r"max_length must be at most the 300 positions .*, got 301: convert it"):
        SegattnLM(plain, 301, device="cpu")
    lm = SegattnLM(plain, convert=True, segment_len=32, device="cpu")
    assert (lm.max_length, segattn.InfiniCache(lm.model).settings.segment_len) == (UNBOUNDED, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"peft": "adapters"},
            "peft must be left out, got 'adapters': with it lm_eval loads the model itself, without",
        ),
        ({"parallelize": True}, "parallelize must be left out, got True"),
        ({"backend": "seq2seq"}, "backend must be left out, got 'seq2seq'"),
        ({"piece": L + 1}, f"piece must be a positive multiple of the model's segments of {L} tokens, got {L + 1}"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_what_would_lose_the_memory_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegattnLM(str(folder / "converted"), device="cpu", **options)


def test_the_harness_command_takes_no_model_without_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--model", "hf"], ["run", "-M", "hf"], ["--model=hf"], []):
        monkeypatch.setattr(sys, "argv", ["harness", *arguments, "--tasks", "ruler"])
        assert harness.main() == 2
        said = capsys.readouterr().err
        assert said == "harness: --model must be segattn, got hf, which loads a model without its memory\n"
    called: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: called.append(sys.argv))
    for arguments in (["--model", "segattn", "--tasks", "ruler"], ["ls", "tasks"], ["--config", "a.yaml", "-t", "b"]):
        monkeypatch.setattr(sys, "argv", ["harness", *arguments])
        assert harness.main() == 0
    assert len(called) == 3


def test_the_harness_command_runs_where_no_gpu_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm-eval's own default is the first GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    registry = pytest.importorskip("lm_eval.api.registry")
    called = []

    def evaluate() -> None:
        called.append(sys.argv)
        device = sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cuda:0"
        registry.get_model("segattn").create_from_arg_string(f"pretrained={folder / 'converted'}", {"device": device})

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    given = ["harness", "--model", "segattn", "--tasks", "ruler"]
    monkeypatch.setattr(sys, "argv", [*given])
    assert harness.main() == 0
    monkeypatch.setattr(sys, "argv", [*given, "--device", "cpu:0:0"])
    assert harness.main() == 2
    assert called == [[*given, "--device", "cpu"], [*given, "--device", "cpu:0:0"]]
    assert capsys.readouterr().err.endswith(
        "harness: device must be one that PyTorch can use here, such as 'cpu', got "
        "'cpu:0:0' (Invalid device string: 'cpu:0:0')\n"
    )


def invoke(command: str, folder: Path, out: Path, *arguments: str) -> Result:
    base = ["evaluate", command, str(folder), "--out", str(out), "--device", "cpu", "--samples", "2"]
    return CliRunner().invoke(commands.app, [*base, *arguments])


def test_command_ruler_writes_and_goes_on(folder: Path, tmp_path: Path) -> None:
    tasks = ["--tasks", "niah_single_1,ruler_fwe"]
    result = invoke("ruler", folder / "converted", tmp_path, "--lengths", "1K", *tasks)
    assert result.exit_code == 0, result.output
    first = json.loads((tmp_path / "ruler.json").read_text())
    assert [(cell["task"], cell["length"]) for cell in first["cells"]] == [("niah_single_1", 1024), ("ruler_fwe", 1024)]
    assert first["model"]["conversion"]["segment_len"] == L
    result = invoke(
        "ruler", folder / "converted", tmp_path, "--lengths", "1K,2K", *tasks, "--resume", "--batch", "auto"
    )
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "ruler.json").read_text())
    cells = {(cell["task"], cell["length"]): cell for cell in figures["cells"]}
    assert len(cells) == 4
    assert figures["settings"]["lengths"] == [1024, 2048]
    for cell in first["cells"]:
        assert cells[cell["task"], cell["length"]] == cell
    assert result.stdout.count("2048 tokens: ") == 2
    assert "1024 tokens: " not in result.stdout
    assert "RULER, right in %" in result.stdout
    if sys.platform == "linux":
        assert "most memory held, MiB" in result.stdout
        assert all(cell["peak_bytes"] > 2**20 for cell in figures["cells"])
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")
    result = invoke("ruler", folder / "converted", tmp_path, "--lengths", "1K", *tasks, "--resume", "--seed", "1")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--seed must be the earlier run's with --resume, 0, got 1" in result.stderr


def test_ruler_from_python(folder: Path, tmp_path: Path) -> None:
    source, given = Source(str(folder / "converted"), device="cpu"), ("niah_single_1",)
    figures = run_benchmark(source, Tasks(given, (1024,), samples=3, batch=2), ruler_benchmark(), tmp_path)
    assert json.loads((tmp_path / "ruler.json").read_text()) == json.loads(json.dumps(figures))
    assert (figures["settings"]["batch"], figures["cells"][0]["samples"]) == ("2", 3)


def test_command_babilong_reads_files(folder: Path, tmp_path: Path) -> None:
    babi, book = tmp_path / "babi", tmp_path / "book.txt"
    babi.mkdir()
    (babi / "qa1_single-supporting-fact_test.txt").write_text(
        "1 Ahab went to the cabin.\n2 Starbuck moved to the hold.\n3 Where is Ahab? \tcabin\t1\n"
    )
    book.write_text(" ".join(f"Sentence {number} of a book." for number in range(200)))
    given = ["--tasks", "qa1", "--babi", str(babi), "--book", str(book), "--lengths", "500,1000"]
    result = invoke("babilong", folder / "converted", tmp_path / "out", *given)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out" / "babilong.json").read_text())
    assert [cell["length"] for cell in figures["cells"]] == [500, 1000]
    # lm-eval's instructions and two examples come on top
    assert all(cell["tokens"] > cell["length"] for cell in figures["cells"])
    assert figures["settings"]["book"] == str(book)
    book.write_text(book.read_text() + " And one more.")
    result = invoke("babilong", folder / "converted", tmp_path / "out", *given, "--resume")
    assert result.exit_code == 2
    assert f"--book must be the earlier run's with --resume, got '{book}', which holds another text" in result.stderr


@pytest.mark.parametrize(
    ("command", "model", "arguments", "message"),
    [
        ("ruler", "converted", ["--tasks", "niah_single_2"], "--tasks must be among niah_single_1, niah_multikey_2"),
        ("ruler", "converted", ["--tasks", ","], "--tasks must name at least one, got none"),
        (
            "ruler",
            "converted",
            ["--tasks", "ruler_vt", "--lengths", "8K"],
            "--tasks ruler_vt needs an example of at most",
        ),
        ("ruler", "converted", ["--lengths", "300"], "--lengths must hold a text of niah_single_1, got 300"),
        ("ruler", "converted", ["--lengths", "1k1"], "--lengths must be numbers from 1 on with commas"),
        ("ruler", "converted", ["--batch", "0"], "--batch must be auto or at least 1, got '0'"),
        ("ruler", "converted", ["--piece", "100"], "--piece must be a positive multiple of the model's segments of 96"),
        ("ruler", "plain", ["--lengths", "1K"], "--lengths must be at most the 300 positions of a model that is not"),
        (
            "babilong",
            "plain",
            ["--tasks", "qa4", "--lengths", "200"],
            "--lengths must leave prompts of at most 284 tokens to a model",
        ),
        ("babilong", "converted", ["--tasks", "qa3"], "--tasks must be one of qa1, qa2, qa4, got 'qa3'"),
        ("babilong", "converted", ["--babi", "nowhere"], "--babi must be a folder that holds one file qa1_*_test.txt"),
        ("babilong", "converted", ["--book", "nowhere"], "--book must be a text file in UTF-8, got 'nowhere'"),
        ("babilong", "converted", ["--lengths", "20"], "--lengths must be at least"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, command: str, model: str, arguments: list[str], message: str
) -> None:
    result = invoke(command, folder / model, tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"segattn evaluate {command}: {message}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_without_lm_eval_a_line_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        harness.harness_class()
    result = invoke("ruler", folder / "converted", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "segattn evaluate ruler: needs lm_eval: pip install 'segattn[lm-eval]'\n"
