"""`segattn evaluate`: prompts are exact, pieces equal the whole, cells are kept, and figures are what they say."""

from __future__ import annotations

import io
import json
import math
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
commands = pytest.importorskip("segattn.cli.main")
from models import VERSION, make_of_bytes
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch_defaults import defaults
from typer.testing import CliRunner, Result

import segattn
from segattn.cli import evaluate
from segattn.cli.progress import Reading
from segattn.infini.evaluate import retrieval
from segattn.infini.evaluate.books import measure_books
from segattn.infini.evaluate.gate_map import gate_map
from segattn.infini.evaluate.loading import ByteTokenizer, Loaded, PretrainedTokenizer, fingerprint, load
from segattn.infini.evaluate.needle import NeedleText
from segattn.infini.evaluate.passkey import FILLER, QUESTION, TASK, PasskeyText
from segattn.infini.evaluate.perplexity import (
    Bucket,
    by_position,
    by_segment_position,
    documents_of,
    measure_documents,
    whole,
    widths,
)
from segattn.infini.evaluate.plots import plot_perplexity
from segattn.infini.evaluate.reading import cache_bytes, decode, losses, piece_len, read
from segattn.infini.evaluate.retrieval import RetrievalCell, measure, measure_grid
from segattn.infini.evaluate.runs import Outputs, run_passkey
from segattn.infini.evaluate.settings import Grid, Source
from segattn.infini.huggingface.saving import save_gates, save_pretrained
from segattn.rmt.tasks.books import draw_book
from segattn.rmt.tasks.make import make_task
from segattn.rmt.tasks.traits import PEOPLE, TRAITS
from segattn.runs.errors import SettingError
from segattn.runs.figures import format_length
from segattn.runs.heat_maps import plot_gates, plot_recall
from segattn.runs.text import generate_text

L = 24
BYTES = ["--tokenizer", "bytes", "--device", "cpu"]


def tiny(seed: int = 0) -> Any:
    return make_of_bytes(700, seed)


def converted(segment_len: int = L, seed: int = 0) -> Any:
    model = segattn.convert(tiny(seed), segment_len, quiet=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.segattn_gate.bias)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints without tokenizers, plain and converted, a side file of gates, and running text."""
    folder: Path = tmp_path_factory.mktemp("models")
    tiny().save_pretrained(folder / "plain")
    save_pretrained(converted(), folder / "converted")
    save_gates(converted(), folder / "gates.safetensors")
    (folder / "text.txt").write_text(generate_text(400, seed=1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pretrained() -> PretrainedTokenizer:
    """A tokenizer that joins letters, blanks and digits, and begins texts with <s>."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([f"{FILLER} {TASK} {QUESTION} 12 123 {n} 77" for n in range(1000, 1100)], trainer)
    processor = pytest.importorskip("tokenizers.processors")
    made.post_processor = processor.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PretrainedTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quiet:
    """A listener that counts."""

    def __init__(self) -> None:
        self.total, self.tokens = 0, 0
        self.lines: list[str] = []

    def begin(self, tokens: int) -> None:
        self.total = tokens

    def read(self, tokens: int) -> None:
        self.tokens += tokens

    def finished(self, what: str) -> None:
        self.lines.append(what)


class Answerer(nn.Module):
    """Reads bytes, and says the key that they hold, or another. What was read is its cache."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.wrong = wrong
        self.config = transformers.LlamaConfig(max_position_embeddings=10**9)
        self.parameter = nn.Parameter(torch.zeros(1))
        self.pieces: list[int] = []

    def forward(
        self, tokens: Tensor, past_key_values: Any = None, use_cache: bool = False, logits_to_keep: int = 0
    ) -> Any:
        assert use_cache
        assert logits_to_keep == 1
        self.pieces.append(tokens.shape[1])
        before = past_key_values.rows if past_key_values is not None else [b""] * len(tokens)
        rows = [row + bytes(new) for row, new in zip(before, tokens.tolist(), strict=True)]
        logits = torch.zeros(len(rows), 1, 256)
        for logit, row in zip(logits, rows, strict=True):
            logit[0, self.next_byte(row)] = 1
        return types.SimpleNamespace(
            logits=logits, past_key_values=types.SimpleNamespace(rows=rows, max_bytes=64 * len(rows))
        )

    def next_byte(self, row: bytes) -> int:
        asked, _, said = row.rpartition(b"What is the pass key? The pass key is")
        key = b" " + asked.partition(b"The pass key is ")[2].partition(b".")[0] + b"."
        return key[min(len(said), len(key) - 1)] ^ self.wrong


@pytest.mark.parametrize("length", [300, 307, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_passkey_prompts_of_bytes(length: int, depth: float) -> None:
    prompt = PasskeyText(ByteTokenizer()).prompt(length, depth, generator())
    assert len(prompt.tokens) == length
    text, key = bytes(prompt.tokens).decode(), bytes(prompt.answer).decode()
    assert len(key) == 5
    assert key.isdecimal()
    statement = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    before, after = text.split(statement)
    room = length - len(TASK) - 1 - len(statement) - len(QUESTION) - 2
    assert before == TASK + "\n" + (" ".join([FILLER] * 9))[: round(depth * room)]
    assert prompt.start == len(before)
    assert after.endswith(f"\n{QUESTION} ")
    rest = after.removesuffix(f"\n{QUESTION} ")
    assert len(rest) == room - round(depth * room)
    assert (" ".join([FILLER] * 9)).endswith(rest)


@pytest.mark.parametrize("length", [150, 151, 612])
@pytest.mark.parametrize("depth", [0.0, 0.77, 1.0])
def test_passkey_prompts_of_a_tokenizer(pretrained: PretrainedTokenizer, length: int, depth: float) -> None:
    task = PasskeyText(pretrained)
    places = set()
    for seed in range(5):
        prompt = task.prompt(length, depth, generator(seed))
        assert len(prompt.tokens) == length
        assert prompt.tokens[0] == 0
        key = pretrained.decode(prompt.answer).strip()
        text = pretrained.decode(prompt.tokens)
        assert text.count(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n") == 1
        assert (text + pretrained.decode(prompt.answer)).endswith(f"\n{QUESTION} {key}")
        before = pretrained.decode(prompt.tokens[: prompt.start])
        assert before.startswith(f"<s>{TASK}\n")
        assert "pass key" not in before
        hidden = len(pretrained.encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"))
        head, tail = 1 + len(pretrained.encode(TASK + "\n")), len(pretrained.encode(f"\n{QUESTION} {key}"))
        room = length - head - hidden - (tail - len(prompt.answer))
        assert prompt.start == head + round(depth * room)
        places.add(key)
    assert len(places) == 5


def test_prompts_name_what_is_wrong(pretrained: PretrainedTokenizer) -> None:
    task = PasskeyText(ByteTokenizer())
    assert len(task.prompt(task.shortest, 0.5, generator()).tokens) == task.shortest
    with pytest.raises(ValueError, match=f"length must be at least {task.shortest}, .*, got {task.shortest - 1}"):
        task.prompt(task.shortest - 1, 0.5, generator())
    with pytest.raises(ValueError, match=r"depth must be between 0 and 1, got 1\.2"):
        task.prompt(1000, 1.2, generator())
    with pytest.raises(ValueError, match="digits must be at least 1, got 0"):
        PasskeyText(pretrained, digits=0)
    with pytest.raises(ValueError, match="answer must not be empty, got ' '"):
        NeedleText(pretrained, "text", answer=" ")
    with pytest.raises(ValueError, match="score must be one of 'substring', 'tokens', got 'bleu'"):
        NeedleText(pretrained, "text", score="bleu")
    with pytest.raises(ValueError, match="length must be at least"):
        NeedleText(pretrained, "text").prompt(10, 0.5, generator())


@pytest.mark.parametrize("tokenizer", ["bytes", "pretrained"])
def test_needle_stands_in_running_text(tokenizer: str, pretrained: PretrainedTokenizer) -> None:
    made: Any = ByteTokenizer() if tokenizer == "bytes" else pretrained
    haystack = generate_text(100, seed=3)
    task = NeedleText(made, haystack, needle="Ada hid a cup.", question="Ada hid", answer="a cup")
    for depth, length in ((0.0, 200), (0.4, 501), (1.0, 1503)):
        prompt = task.prompt(length, depth, generator())
        assert len(prompt.tokens) == length
        text = made.decode(prompt.tokens[len(made.prefix) :])
        before, after = text.split("\n\nAda hid a cup.\n\n")
        assert prompt.start == len(made.prefix) + round(depth * (length - task.shortest))
        running, _, question = after.rpartition("\n\n")
        assert question.strip() == "Ada hid"
        ring = haystack * 20
        # without what a token at the cut may have split
        assert before.strip("�")[1:-1] in ring
        assert running.strip("�")[1:-1] in ring
        assert made.decode(prompt.answer).strip() == "a cup"


def test_needle_scores() -> None:
    options: dict[str, Any] = {"needle": "Ada hid a cup.", "question": "Ada hid", "answer": "a cup"}
    loose, strict = (NeedleText(ByteTokenizer(), "text", **options, score=s) for s in ("substring", "tokens"))
    prompt = loose.prompt(100, 0.5, generator())
    for said, found, first in (("a cup.", True, True), ("it was A\n Cup", True, False), ("a cap", False, False)):
        assert loose.right(prompt, list(said.encode())) is found
        assert strict.right(prompt, list(said.encode())) is first
    assert (loose.extra > 0, strict.extra) == (True, 0)


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("kind", ["converted", "plain"])
def test_pieces_equal_the_whole(kind: str, pieces: int) -> None:
    model = (converted() if kind == "converted" else tiny()).double()
    tokens = torch.randint(256, (2, 7 * L + 5))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    read_so_far: list[int] = []
    reading = read(model, tokens, piece=pieces * L, on_tokens=read_so_far.append)
    assert (reading.logits - logits[:, -1]).abs().max() < 1e-10
    assert sum(read_so_far) == tokens.numel()
    assert read_so_far[0] == 2 * pieces * L
    measured = losses(model, tokens, piece=pieces * L)
    direct = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, -1)
    assert measured.nats.dtype == torch.float32
    assert (measured.nats - direct).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["converted", "plain"])
def test_decoding_equals_generate(kind: str) -> None:
    model = (converted() if kind == "converted" else tiny()).double()
    tokens = torch.randint(3, 256, (2, 2 * L - 3))
    said = decode(model, read(model, tokens, piece=L), 7)
    wanted = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=7, do_sample=False, eos_token_id=None
    )
    assert torch.equal(said, wanted[:, -7:])


def test_logits_are_of_a_piece_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = converted(), []
    model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape[1]))
    tokens = torch.randint(256, (1, 5 * L + 1))
    read(model, tokens, piece=2 * L)
    assert made == [1, 1, 1]
    made.clear()
    losses(model, tokens, piece=2 * L)
    assert made == [2 * L, 2 * L, L]


def test_reading_names_what_is_wrong() -> None:
    model = converted()
    assert piece_len(model) == 4096 // L * L
    assert piece_len(tiny()) == 4096
    for piece in (0, L + 1):
        with pytest.raises(ValueError, match=f"piece must be a positive multiple .* of {L} tokens, got {piece}"):
            read(model, torch.zeros(1, 9, dtype=torch.long), piece=piece)
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with T at least 2, got \[1, 1\]"):
        losses(model, torch.zeros(1, 1, dtype=torch.long))
    model.forward = lambda *args, **kwargs: types.SimpleNamespace(past_key_values=None)
    with pytest.raises(ValueError, match="model must return past_key_values"):
        read(model, torch.zeros(1, 9, dtype=torch.long))


def test_cache_is_of_constant_size() -> None:
    model = segattn.convert(tiny(), 256, quiet=True)
    sizes = {n: cache_bytes(read(model, torch.randint(256, (1, n)), piece=4096).cache) for n in (4096, 65536)}
    # per layer M [2, 4, 4] and z [2, 4], and a segment of keys, plain keys and values [2, 256, 4]
    assert sizes == dict.fromkeys((4096, 65536), 2 * 4 * (32 + 8 + 3 * 2048))
    plain = tiny()
    grown = {n: cache_bytes(read(plain, torch.randint(256, (1, n))).cache) for n in (100, 300)}
    # per layer and token K and V [2, 4]
    assert grown == {n: 2 * n * 2 * 2 * 4 * 4 for n in (100, 300)}


def test_perplexity_by_position_equals_the_whole_forward() -> None:
    model = converted().double()
    text = torch.randint(256, (1000,)).tolist()
    documents = documents_of(text, [7], 301)
    assert [len(document) for document in documents] == [301, 301, 301, 101]
    assert all(document[0] == 7 for document in documents)
    assert [token for document in documents for token in document[1:]] == text
    spread = widths(model, 301, 5)
    assert spread == (3 * L, 2, L)
    assert widths(model, L, 5) == (5, 2, L)
    assert widths(model, L + 1, 5) == (L, 2, L)
    assert widths(tiny(), 301, 5) == (61, None, None)
    measured = measure_documents(model, documents, spread, batch=2, piece=2 * L)
    by_place: dict[str, dict[int, list[float]]] = {"document": {}, "segment": {}}
    for document in documents:
        tokens = torch.tensor([document])
        with torch.no_grad():
            nats = F.cross_entropy(model(tokens, use_cache=False).logits[0, :-1], tokens[0, 1:], reduction="none")
        for position, value in enumerate(nats.tolist(), start=1):
            by_place["document"].setdefault(position // (3 * L), []).append(value)
            by_place["segment"].setdefault(position % L // 2, []).append(value)
    for name, buckets in (
        ("document", by_position(measured, spread)),
        ("segment", by_segment_position(measured, spread)),
    ):
        wanted = [by_place[name][i] for i in sorted(by_place[name])]
        assert [bucket.tokens for bucket in buckets] == [len(values) for values in wanted]
        for bucket, values in zip(buckets, wanted, strict=True):
            assert bucket.nats == pytest.approx(sum(values) / len(values), abs=1e-6)
            assert bucket.perplexity == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-6)
    assert by_position(measured, spread)[-1][:2] == (4 * 3 * L, 301)
    values = [value for group in by_place["document"].values() for value in group]
    assert whole(measured)[2:4] == (1000, pytest.approx(sum(values) / 1000, abs=1e-6))
    kept = measure_documents(model, documents, spread, done=measured[:3])
    assert kept[:3] == measured[:3]


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_the_default_dtype_and_device_change_no_figure(other: dict[str, Any]) -> None:
    model, task = converted(), PasskeyText(ByteTokenizer())
    documents = documents_of(list(range(200)), [7], 101)
    spread = widths(model, 101, 5)

    def results() -> list[Any]:
        found = measure_documents(model, documents, spread, batch=2)
        cells = measure_grid(model, task, [300], [0.0, 1.0], samples=2, seed=5)
        return [one._replace(seconds=0.0) for one in (*found, *cells)]

    wanted = results()
    with defaults(**other):
        assert results() == wanted


def test_documents_of_a_text() -> None:
    assert documents_of([1, 2, 3], [], None) == [[1, 2, 3]]
    assert documents_of([1, 2, 3], [], 2) == [[1, 2]]
    assert documents_of([1, 2, 3], [0], 2) == [[0, 1], [0, 2], [0, 3]]
    with pytest.raises(ValueError, match="text must be of at least two tokens"):
        documents_of([1], [], None)
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        documents_of([1, 2], [0], 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_who_knows_the_key_scores_full(batch: int) -> None:
    task, model = PasskeyText(ByteTokenizer()), Answerer()
    cell, _ = measure(model, task, 500, 0.25, samples=4, batch=batch, piece=64)
    assert (cell.exact, cell.tokens, cell.samples) == (1.0, 1.0, 4)
    assert cell.cache_bytes == 64
    assert max(model.pieces) == 64
    liar, _ = measure(Answerer(wrong=True), task, 500, 0.25, samples=4, batch=batch)
    assert (liar.exact, liar.tokens) == (0.0, 0.0)


def test_cells_depend_on_their_place_alone() -> None:
    model, task = converted(), PasskeyText(ByteTokenizer())
    options: dict[str, Any] = {"samples": 3, "seed": 5}

    def untimed(cells: list[RetrievalCell]) -> list[RetrievalCell]:
        return [cell._replace(seconds=0.0) for cell in cells]

    both = measure_grid(model, task, [300, 350], [0.0, 1.0], **options)
    assert [(cell.length, cell.depth) for cell in both] == [(300, 0.0), (300, 1.0), (350, 0.0), (350, 1.0)]
    assert untimed(measure_grid(model, task, [350], [1.0], **options)) == untimed(both[3:])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_what_prompts_begin_with_is_read_once(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, length, depths = converted().double(), PasskeyText(ByteTokenizer()), 700, [0.6, 0.9, 0.1]
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(args[0].numel()), with_kwargs=True)
    ends: list[Tensor] = []

    def remember(model: Any, reading: Any, steps: int) -> Tensor:
        ends.extend(reading.logits)
        return torch.zeros(len(reading.logits), steps, dtype=torch.int64)

    prompts: list[Any] = []
    made = task.prompt
    monkeypatch.setattr(task, "prompt", lambda *given: prompts.append(made(*given)) or prompts[-1])
    monkeypatch.setattr(retrieval, "decode", remember)
    counted: list[int] = []
    measure_grid(model, task, [length], depths, samples=3, seed=4, batch=batch, on_tokens=counted.append)
    read_in_all = sum(sizes)
    for prompt, logits in zip(prompts, ends, strict=True):
        whole = read(model, torch.tensor([prompt.tokens]))
        assert (logits - whole.logits[0]).abs().max() < 1e-10
    shared = [prompts[3 * i].start // L * L for i in range(3)]
    assert read_in_all == shared[2] + 3 * sum(length - n for n in shared)
    assert sum(counted) == 3 * 3 * length


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(commands.app, ["evaluate", *map(str, arguments)])


def figures(folder: Path, command: str) -> Any:
    return json.loads((folder / f"{command}.json").read_text())


def test_passkey_command_and_its_continuation(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["passkey", folder / "converted", *BYTES, "--samples", 2, "--lengths", "300,1K"]
    result = invoke(*options, "--out", tmp_path / "whole")
    assert result.exit_code == 0, result.output
    complete = figures(tmp_path / "whole", "passkey")
    assert [(cell["length"], cell["depth"]) for cell in complete["cells"]] == [
        (length, depth) for length in (300, 1024) for depth in (0.0, 0.5, 1.0)
    ]
    assert complete["model"]["conversion"]["segment_len"] == L
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0", "50", "100"]
    assert "state of a text: " in result.stdout
    for path in Outputs.of(tmp_path / "whole", "passkey"):
        assert str(path) in result.stdout
    assert (tmp_path / "whole" / "passkey.png").read_bytes().startswith(b"\x89PNG")

    asked: list[tuple[int, float]] = []
    stop_after = 2
    measured = retrieval.measure

    def counting(model: Any, task: Any, length: int, depth: float, **rest: Any) -> RetrievalCell:
        if len(asked) == stop_after:
            # written as each was done, not at the end
            assert len(figures(part, "passkey")["cells"]) == stop_after
            raise KeyboardInterrupt
        asked.append((length, depth))
        return measured(model, task, length, depth, **rest)

    part = tmp_path / "a part"
    monkeypatch.setattr(retrieval, "measure", counting)
    stopped = invoke(*options, "--out", part)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith(f"stopped; go on with the same command and --resume --out '{part}'\n")
    assert len(figures(part, "passkey")["cells"]) == 2
    assert (part / "passkey.png").is_file()
    refused = invoke(*options, "--out", part)
    assert refused.exit_code == 2
    assert "--out must not hold figures of an earlier run" in refused.stderr
    stop_after = 99
    resumed = invoke(*options, "--resume", "--out", part)
    assert resumed.exit_code == 0, resumed.output
    assert "already done" not in resumed.stdout
    again = invoke(*options, "--resume", "--out", part)
    assert again.exit_code == 0, again.output
    assert again.stdout.startswith("already done: nothing is left to do\n")
    assert asked == [(cell["length"], cell["depth"]) for cell in complete["cells"]]
    untimed = [[cell | {"seconds": 0} for cell in x["cells"]] for x in (complete, figures(part, "passkey"))]
    assert untimed[0] == untimed[1]
    assert invoke(*options, "--depths", "0.25", "--resume", "--out", part).exit_code == 0
    assert asked[6:] == [(300, 0.25), (1024, 0.25)]
    assert len(figures(part, "passkey")["cells"]) == 8
    # of all cells, not of the last call alone
    assert figures(part, "passkey")["settings"]["depths"] == sorted({0.25, *complete["settings"]["depths"]})


def test_resume_holds_to_the_run(folder: Path, tmp_path: Path) -> None:
    options = ["passkey", folder / "converted", *BYTES, "--lengths", "300", "--depths", "0", "--out", tmp_path]
    assert invoke(*options, "--samples", 1, "--resume").exit_code == 0
    other = invoke(*options, "--samples", 2, "--resume")
    assert other.exit_code == 2
    assert "--samples must be the earlier run's with --resume, 1, got 2" in other.stderr
    save_pretrained(converted(seed=1), tmp_path / "other")
    options[1] = tmp_path / "other"
    other = invoke(*options, "--samples", 1, "--resume")
    assert other.exit_code == 2
    assert "MODEL must be the earlier run's with --resume, of fingerprint" in other.stderr
    text = tmp_path / "text.txt"
    text.write_text("one text")
    options = ["perplexity", *options[1:4], "--device", "cpu", "--text", text, "--out", tmp_path]
    assert invoke(*options).exit_code == 0
    text.write_text("two text")
    said = invoke(*options, "--resume").stderr
    assert f"--text must be the earlier run's with --resume, got '{text}', which holds another text" in said
    options = ["passkey", *options[1:4], "--device", "cpu", "--lengths", "300", "--depths", "0", "--out", tmp_path]
    for damage in ("{", "[]", '{"settings": 1, "model": 2}'):
        (tmp_path / "passkey.json").write_text(damage)
        assert "--resume needs figures of this command" in invoke(*options, "--samples", 1, "--resume").stderr
        assert (tmp_path / "passkey.json").read_text() == damage


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ModuleNotFoundError("no", name="transformers"), 1, "needs transformers: pip install 'segattn[hf]'"),
        (torch.OutOfMemoryError("no"), 1, "out of memory: try a smaller --batch or --piece; go on with the same"),
        (KeyboardInterrupt(), 130, "stopped; go on with the same command and --resume"),
    ],
)
def test_commands_say_what_to_do(
    error: BaseException, status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(evaluate, "settings_from", fail)
    for command in ("passkey", "needle", "perplexity"):
        text = () if command == "passkey" else ("--text", "text")
        result = invoke(command, "model", *text, "--out", tmp_path)
        assert result.exit_code == status
        assert result.stderr.startswith(f"segattn evaluate {command}: {message}")


def test_needle_command(folder: Path, tmp_path: Path) -> None:
    options = ["needle", folder / "plain", "--gates", folder / "gates.safetensors", *BYTES, "--samples", 1]
    options += ["--text", folder / "text.txt", "--lengths", "400,750", "--depths", "0,1", "--out", tmp_path]
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    got = figures(tmp_path, "needle")
    assert [(cell["length"], cell["depth"]) for cell in got["cells"]] == [(400, 0), (400, 1), (750, 0), (750, 1)]
    # converted as the gates' file says, with its gates
    assert got["model"]["conversion"]["segment_len"] == L
    assert got["model"]["fingerprint"] == fingerprint(converted())
    assert (tmp_path / "needle.png").is_file()


def test_perplexity_command(folder: Path, tmp_path: Path) -> None:
    options = ["perplexity", folder / "converted", *BYTES, "--text", folder / "text.txt", "--length", 400]
    options += ["--limit", 1000, "--out", tmp_path, "--piece", 2 * L]
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    got = figures(tmp_path, "perplexity")
    tokens = torch.tensor([list((folder / "text.txt").read_bytes()[:1000])])
    model, nats = converted(), []
    for part in tokens.split(400, dim=1):
        with torch.no_grad():
            logits = model(part, use_cache=False).logits[0, :-1]
        nats.append(F.cross_entropy(logits, part[0, 1:], reduction="none"))
    assert got["complete"]
    assert got["mean"]["tokens"] == 997
    assert got["mean"]["nats"] == pytest.approx(torch.cat(nats).mean().item(), abs=1e-5)
    assert f"mean over 997 tokens: {got['mean']['perplexity']:.4f}" in result.stdout
    assert len(got["documents"]) == 3
    assert got["by_segment_position"][-1]["end"] == L
    before = (tmp_path / "perplexity.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    # a document is missing, and read again
    del got["documents"][1]
    (tmp_path / "perplexity.json").write_text(json.dumps(got))
    resumed = invoke(*options, "--resume")
    assert "document 3: perplexity" in resumed.stdout
    again = figures(tmp_path, "perplexity")
    assert again["mean"] == pytest.approx(got["mean"])
    assert len(again["documents"]) == 3


def test_plain_models_are_read_to_their_positions(folder: Path, tmp_path: Path) -> None:
    options = ["perplexity", folder / "plain", *BYTES, "--text", folder / "text.txt", "--out", tmp_path]
    result = invoke(*options)
    assert result.exit_code == 2
    assert "--length must be at most the 700 positions of a model that is not converted" in result.stderr
    assert not (tmp_path / "perplexity.json").exists()
    result = invoke(*options, "--limit", 1000)
    assert result.exit_code == 2
    assert "--limit must be at most the 700 positions of a model that is not converted" in result.stderr
    result = invoke(*options, "--length", 700, "--limit", 1400)
    assert result.exit_code == 0, result.output
    assert figures(tmp_path, "perplexity")["by_segment_position"] == []
    result = invoke(*options, "--convert", "--segment-len", L, "--out", tmp_path / "converted")
    assert result.exit_code == 0, result.output


def test_gates_command(folder: Path, tmp_path: Path) -> None:
    result = invoke("gates", folder / "converted", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    wanted = [layer.self_attn.segattn_gate.bias.sigmoid().tolist() for layer in converted().model.layers]
    got = figures(tmp_path, "gates")["layers"]
    assert [row["layer"] for row in got] == [0, 1]
    for row, share in zip(got, wanted, strict=True):
        assert row["share"] == pytest.approx(share)
        assert row["mean"] == pytest.approx(sum(share) / 4)
        assert (row["least"], row["largest"]) == pytest.approx((min(share), max(share)))
        assert row["local"] == sum(x < 0.1 for x in share)
        assert row["local"] + row["mixed"] + row["memory"] == 4
    assert (tmp_path / "gates.png").is_file()
    # the folder of a run of finetune, which holds the model
    shutil.copytree(folder / "converted", tmp_path / "run" / "model")
    of_run = invoke("gates", tmp_path / "run", "--out", tmp_path / "again")
    assert of_run.exit_code == 0, of_run.output
    assert figures(tmp_path / "again", "gates")["layers"] == got
    plain = invoke("gates", folder / "plain", "--out", tmp_path / "plain")
    assert plain.exit_code == 2
    assert "MODEL must be a converted model" in plain.stderr


def test_gate_map_of_some_layers() -> None:
    model = segattn.convert(tiny(), L, layers=[1], gate_init=3.0, quiet=True)
    layers, share = gate_map(model)
    assert layers == [1]
    assert share.tolist() == [pytest.approx([1 / (1 + math.exp(-3.0))] * 4)]
    with pytest.raises(ValueError, match="model must be converted"):
        gate_map(tiny())


def test_pictures_follow_the_data(tmp_path: Path) -> None:
    def drawn(plot: Any, *arguments: Any) -> bytes:
        plot(tmp_path / "picture.png", *arguments, "title")
        return (tmp_path / "picture.png").read_bytes()

    def recalled(shares: dict[tuple[float, int], float], trained_length: int | None = None) -> bytes:
        plot_recall(tmp_path / "picture.png", shares, "title", "right, %", trained_length)
        return (tmp_path / "picture.png").read_bytes()

    shares = {(depth, length): 0.25 for length in (300, 1024) for depth in (0.0, 1.0)}
    other = shares | {(1.0, 1024): 0.75}
    missing = {place: share for place, share in shares.items() if place != (1.0, 1024)}
    assert len({recalled(some) for some in (shares, other, missing)} | {recalled(shares, 300)}) == 4
    assert recalled(shares) == recalled(shares)
    buckets = [Bucket(10 * i, 10 * i + 10, 10, 1.0, 2.0 + i) for i in range(3)]
    changed = [*buckets[:2], buckets[2]._replace(perplexity=9.0)]
    pictures = {drawn(plot_perplexity, a, b, 3.0) for a in (buckets, changed) for b in (buckets, changed, [])}
    assert len(pictures) == 6
    maps = {drawn(plot_gates, torch.full((2, heads), x), [0, 1]) for heads in (4, 20) for x in (0.2, 0.9)}
    assert len(maps) == 4
    assert [format_length(n) for n in (300, 1024, 32768, 2**20, 1500)] == ["300", "1K", "32K", "1M", "1,500"]


def test_a_tokenizer_is_never_guessed(folder: Path, tmp_path: Path, pretrained: PretrainedTokenizer) -> None:
    found_none = r"tokenizer must lead to a tokenizer, got .*plain': transformers finds none there; .*'bytes' for"
    if VERSION <= (5, 0):
        # which fails in another way, or makes one without words
        found_none = "tokenizer must (lead to a tokenizer, got .*'bytes' for|be of the model's 256 tokens)"
    with pytest.raises(SettingError, match=found_none):
        load(Source(str(folder / "plain"), device="cpu"))
    pretrained.tokenizer.save_pretrained(tmp_path)
    # some of its 400 tokens are none of the model's 256
    with pytest.raises(SettingError, match="tokenizer must be of the model's 256 tokens"):
        load(Source(str(folder / "plain"), tokenizer=str(tmp_path), device="cpu"))
    # one that has a word for nothing
    wordless = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    wordless.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=wordless, unk_token="?").save_pretrained(tmp_path / "none")
    with pytest.raises(
        SettingError, match=r"tokenizer must be of the model's 256 tokens, got .*none', which gives \[0, 0"
    ):
        load(Source(str(folder / "plain"), tokenizer=str(tmp_path / "none"), device="cpu"))
    small = tiny()
    small.resize_token_embeddings(400)
    small.save_pretrained(tmp_path / "own")
    pretrained.tokenizer.save_pretrained(tmp_path / "own")
    loaded = load(Source(str(tmp_path / "own"), device="cpu"))
    assert loaded.tokenizer.prefix == [0]
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(" a, 12 b.\n")) == " a, 12 b.\n"
    small.resize_token_embeddings(200)
    small.save_pretrained(tmp_path / "fewer")
    with pytest.raises(SettingError, match="tokenizer must not be 'bytes' for a model of 200 tokens"):
        load(Source(str(tmp_path / "fewer"), tokenizer="bytes", device="cpu"))


def test_models_are_loaded_as_asked(folder: Path) -> None:
    source = Source(str(folder / "plain"), "bytes", convert=True, segment_len=32, update="linear", device="cpu")
    about = load(source).about
    assert (about["conversion"]["segment_len"], about["conversion"]["update"]) == (32, "linear")
    half = load(Source(str(folder / "converted"), "bytes", dtype="bfloat16", device="cpu"))
    assert half.about["dtype"] == "bfloat16"
    assert not half.model.training
    kept = load(Source(str(folder / "converted"), "bytes", device="cpu"))
    assert kept.about["fingerprint"] == fingerprint(converted())
    assert load(Source(str(folder / "plain"), "bytes", device="cpu")).about["conversion"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["passkey", "no/such/model"],
            "MODEL must be a folder or name of a causal language model, got 'no/such/model'",
        ),
        (
            ["passkey", "{plain}", "--tokenizer", "no/such/one"],
            "--tokenizer must lead to a tokenizer, got 'no/such/one'",
        ),
        (
            ["passkey", "{plain}"],
            f"--tokenizer must {'be of the model' if VERSION == (5, 0) else 'lead to a tokenizer'}",
        ),
        (["passkey", "{plain}", *BYTES, "--segment-len", "8"], "--segment-len must come with --convert, got 8 without"),
        (["passkey", "{plain}", *BYTES, "--convert", "--update", "sum"], "--update must be one of"),
        (["passkey", "{plain}", *BYTES, "--convert", "--segment-len", "1"], "--segment-len must be at least 2, got 1"),
        (["passkey", "{converted}", *BYTES, "--convert"], "--convert must be left out, since"),
        (["passkey", "{plain}", *BYTES, "--gates", "none"], "--gates must be a file of gates, got 'none'"),
        (["passkey", "{plain}", *BYTES, "--gates", "{text}"], "--gates must be a file of this model's gates: "),
        (
            ["passkey", "{plain}", *BYTES, "--gates", "{gates}", "--convert", "--segment-len", "8"],
            "--segment-len must be that of the gates, 24, or left out, got 8",
        ),
        (["passkey", "{plain}", *BYTES, "--dtype", "int8"], "--dtype must be one of auto, float32, bfloat16, float16"),
        (["passkey", "{plain}", "--device", "abacus"], "--device must be one that PyTorch can use here"),
        (["passkey", "{plain}", *BYTES, "--lengths", "1K,x"], "--lengths must be numbers from 1 on with commas"),
        (
            ["passkey", "{plain}", *BYTES, "--lengths", ","],
            "--lengths must be numbers from 1 on with commas, as 4096,32K,1M, got ','",
        ),
        (["passkey", "{plain}", *BYTES, "--lengths", "100"], "--lengths must be at least 2"),
        (["passkey", "{plain}", *BYTES, "--lengths", "699"], "--lengths must be at most the 700 positions of a model"),
        (["passkey", "{plain}", *BYTES, "--depths", "0,1.5"], "--depths must be start, middle, end or shares from 0"),
        (["passkey", "{plain}", *BYTES, "--depths", "top"], "--depths must be start, middle, end or shares from 0"),
        (["passkey", "{plain}", *BYTES, "--samples", "0"], "--samples must be at least 1, got 0"),
        (["passkey", "{plain}", *BYTES, "--batch", "0"], "--batch must be at least 1, got 0"),
        (["passkey", "{plain}", *BYTES, "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["passkey", "{converted}", *BYTES, "--piece", "25"], "--piece must be a positive multiple of the model's seg"),
        (["needle", "{plain}", *BYTES, "--text", "none"], "--text must be a file that can be read, got 'none'"),
        (["needle", "{plain}", *BYTES, "--text", "{text}", "--score", "f1"], "--score must be one of"),
        (
            ["needle", "{plain}", *BYTES, "--text", "{text}", "--needle", "a", "--question", "b", "--answer", " "],
            "--answer must not be empty",
        ),
        (["needle", "{plain}", "--text", "{text}", "--needle", "a", "--answer", "b"], "--question must come with"),
        (["perplexity", "{plain}", *BYTES, "--text", "{empty}"], "--text must be a file of running text, got"),
        (["perplexity", "{plain}", *BYTES, "--text", "{gates}"], "--text must be a file of UTF-8 text, got"),
        (["perplexity", "{plain}", *BYTES, "--text", "{text}", "--length", "1"], "--length must be at least 2, got 1"),
        (
            ["perplexity", "{plain}", *BYTES, "--text", "{text}", "--buckets", "0"],
            "--buckets must be at least 1, got 0",
        ),
        (["perplexity", "{converted}", *BYTES, "--text", "{text}", "--piece", "7"], "--piece must be a positive mult"),
        (["gates", "{plain}"], "MODEL must be a converted model, got"),
        (["passkey", "{plain}", *BYTES, "--out", "{text}"], "--out must be a folder that can be written, got"),
    ],
)
def test_commands_name_what_is_wrong(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.txt").write_text("\n")
    places = {name: folder / name for name in ("plain", "converted")}
    places |= {"text": folder / "text.txt", "gates": folder / "gates.safetensors", "empty": tmp_path / "empty.txt"}
    command, *rest = (argument.format(**places) for argument in arguments)
    result = invoke(command, "--out", tmp_path / "out", *rest)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"segattn evaluate {command}: {message}"), result.stderr
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_bar_follows_a_run(folder: Path, tmp_path: Path) -> None:
    """A terminal shows all tokens, to the end."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    source = Source(str(folder / "converted"), "bytes", device="cpu")
    with Reading(console, "passkey") as bar:
        run_passkey(source, Grid((300,), (0.0, 1.0), samples=2), tmp_path, bar)
        task = bar.bars.tasks[0]
    assert (task.completed, task.total) == (1200, 1200)
    assert "% right" in console.file.getvalue()
    listener = Quiet()
    run_passkey(source, Grid((300, 400), (0.0, 1.0), samples=2), tmp_path, listener, resume=True)
    assert (listener.tokens, listener.total, len(listener.lines)) == (1600, 1600, 2)


class Librarian(Answerer):
    """Says where a person went, by the text that was read, or something else."""

    def next_byte(self, row: bytes) -> int:
        text = row.decode()
        at, trait, name = max(
            (text.rfind(asked), trait, name)
            for trait in TRAITS
            for name in PEOPLE
            for asked in [trait.question.format(name)]
        )
        begin, _, end = trait.fact.format(name, "|").partition("|")
        told = text.partition(begin)[2].partition(end)[0]
        said = text[at + len(trait.question.format(name)) :]
        answer = f" {told}."
        return ord(answer[min(len(said), len(answer) - 1)]) ^ self.wrong


def books_of(people: int, seed: int = 0) -> Any:
    encode = ByteTokenizer().encode
    task = make_task("book", people=people, encode=lambda text: encode(f" {text}"), vocab_size=256)
    return lambda length, index: draw_book(task, length, seed=seed, index=index)


def test_a_book_is_read_once_for_all_questions() -> None:
    for wrong in (False, True):
        model = Librarian(wrong)
        read_so_far: list[int] = []
        loaded = Loaded(model, ByteTokenizer(), {})
        cells = measure_books(loaded, books_of(3), 9000, books=2, on_tokens=read_so_far.append)
        assert [(cell.length, cell.depth, cell.samples) for cell in cells] == [
            (9000, depth, 2) for depth in (0.1667, 0.5, 0.8333)
        ]
        assert [cell.exact for cell in cells] == [1.0 - wrong] * 3
        assert (cells[0].tokens == 1.0) is not wrong
        # whole pieces, then each question and what is said to it, a token at a time
        assert sum(read_so_far) < 2 * 9000
        assert [size for size in model.pieces if size > 100] == read_so_far
        assert [size for size in read_so_far if size == 4096] == [4096] * 4
        assert len(read_so_far) == 6
        questions = [size for size in model.pieces if 1 < size <= 100]
        assert len(questions) == 6
        assert max(questions) < 45


@pytest.mark.parametrize("kind", ["converted", "plain"])
def test_a_question_goes_on_from_the_book(kind: str) -> None:
    """One question adds nothing to what the next one sees."""
    model = (converted() if kind == "converted" else tiny()).double()
    tokens, first, second = (torch.randint(256, shape) for shape in ((1, 5 * L + 7), (1, 9), (3, L + 3)))
    reading = read(model, tokens, piece=L)
    kept = cache_bytes(reading.cache)
    for asked in (first, second, first):
        asking = read(model, asked, after=reading)
        said = decode(model, asking, 4)
        with torch.no_grad():
            texts = torch.cat([tokens.expand(len(asked), -1), asked], dim=1)
            whole = model(texts, use_cache=False).logits[:, -1]
        assert (asking.logits - whole).abs().max() < 1e-10
        assert said.shape == (len(asked), 4)
    assert cache_bytes(reading.cache) == kept


def test_command_book(folder: Path, tmp_path: Path) -> None:
    given = [str(folder / "converted"), *BYTES, "--text", folder / "text.txt", "--books", "2", "--people", "3"]
    result = invoke("book", "--out", tmp_path, "--lengths", "500,2K", *given)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "book.json").read_text())
    assert [(cell["length"], cell["depth"]) for cell in figures["cells"]] == [
        (length, depth) for length in (500, 2048) for depth in (0.1667, 0.5, 0.8333)
    ]
    # the same state for either length
    assert len({cell["cache_bytes"] for cell in figures["cells"]}) == 1
    assert "Answers found" in result.stdout
    assert (tmp_path / "book.png").read_bytes().startswith(b"\x89PNG")
    again = invoke("book", "--out", tmp_path, "--lengths", "500,1000,2K", *given, "--resume")
    assert again.exit_code == 0, again.output
    assert again.stdout.count(" % right") == 1
    kept = json.loads((tmp_path / "book.json").read_text())["cells"]
    assert [cell for cell in kept if cell["length"] != 1000] == figures["cells"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--people", "9"], "--people must be from 1 to 8, got 9"),
        (["--people", "0"], "--people must be at least 1, got 0"),
        (["--books", "0"], "--books must be at least 1, got 0"),
        (["--lengths", "90"], "--lengths must be at least"),
        (["--text", "nowhere.txt"], "--text must be a file that can be read, got 'nowhere.txt'"),
        (["--piece", "25"], f"--piece must be a positive multiple of the model's segments of {L} tokens, got 25"),
    ],
)
def test_book_names_what_is_wrong(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke("book", str(folder / "converted"), *BYTES, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"segattn evaluate book: {message}"), result.stderr
    assert result.stderr.count("\n") == 1
