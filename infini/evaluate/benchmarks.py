"""RULER and BABILong by lm-evaluation-harness's own runner, prompts and scores, on texts that are made here."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import datasets  # type: ignore[import-untyped]
import lm_eval.tasks

from ...runs.peak import peak_bytes
from .harness_model import SegattnLM
from .loading import Loaded
from .settings import Tasks

# from a task, a tokenizer of transformers, a length, a number of samples and a seed to documents, as the task has them
Documents = Callable[[str, Any, int, int, int], list[dict[str, Any]]]
# the same with a counter of tokens in the place of a tokenizer
Stories = Callable[[str, Callable[[str], int], int, int, int], Iterable[dict[str, Any]]]


class Benchmark(NamedTuple):
    """A benchmark of lm-eval.

    name: of its folder among lm-eval's tasks, and of our command.
    title: as its paper writes it.
    tasks: from our names of its tasks to lm-eval's.
    split: from our name of a task to the part of its data that is asked.
    metric: from a length to the name of its score.
    documents: makes the data of a task.
    """

    name: str
    title: str
    tasks: dict[str, str]
    split: Callable[[str], str]
    metric: Callable[[int], str]
    documents: Documents


class BenchmarkCell(NamedTuple):
    """The figures of a task at one length.

    score: mean over the samples, from 0 to 1.
    tokens: of the longest prompt, with instructions and examples.
    peak_bytes: as in `runs.peak`; None where unknown.
    """

    task: str
    length: int
    samples: int
    score: float
    tokens: int
    peak_bytes: int | None
    seconds: float


def ruler() -> Benchmark:
    """Return RULER, its tasks whose texts lm-eval makes itself."""
    from .ruler import TASKS, documents

    tasks = {name: name for name in TASKS}
    return Benchmark("ruler", "RULER", tasks, lambda task: "test", str, documents)


def babilong(forms: Iterable[str], stories: Stories) -> Benchmark:
    """Return BABILong, with the `input`, `question` and `target` that `stories` makes."""

    def documents(task: str, tokenizer: Any, length: int, samples: int, seed: int) -> list[dict[str, Any]]:
        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False).input_ids)

        return list(stories(task, count, length, samples, seed))

    tasks = {form: f"babilong_{form}" for form in forms}
    return Benchmark("babilong", "BABILong", tasks, lambda task: task, lambda length: "acc", documents)


def model_of(loaded: Loaded, tasks: Tasks) -> SegattnLM:
    """Return a loaded model as lm-eval takes it, without its warnings that it is loaded already.

    Raises:
        ValueError: the piece is not whole segments.
    """
    with redirect_stderr(io.StringIO()):
        return SegattnLM(loaded, batch_size=tasks.batch, piece=tasks.piece)


def measure(
    lm: SegattnLM, benchmark: Benchmark, task: str, length: int, *, samples: int, seed: int = 0
) -> BenchmarkCell:
    """Measure one task at one length; its texts depend on task, tokenizer, length, samples and seed alone.

    Args:
        lm: the model.
        task: one of the benchmark's.
        length: tokens of a text, at most: in RULER with the instructions, in BABILong without.

    Raises:
        ValueError: the length holds no text of the task.
    """
    begin = time.perf_counter()
    made = benchmark.documents(task, lm.tokenizer, length, samples, seed)
    with peak_bytes(lm.device) as peak:
        results = evaluate(lm, benchmark, task, made)
    score = results["results"][benchmark.tasks[task]][f"{benchmark.metric(length)},none"]
    seconds = round(time.perf_counter() - begin, 3)
    return BenchmarkCell(task, length, len(made), score, lm.longest, peak[0] if peak else None, seconds)


def evaluate(lm: SegattnLM, benchmark: Benchmark, task: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what lm-eval's `simple_evaluate` returns for one of its tasks, with these documents as its data."""
    folder = Path(str(lm_eval.tasks.__file__)).parent / benchmark.name
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    data = {benchmark.split(task): datasets.Dataset.from_list(documents)}
    # a task in a group may have entries of its own beside lm-eval's
    entry = {"task": benchmark.tasks[task], "custom_dataset": lambda **options: data}
    lm.longest = 0
    # bars and warnings: that the model is one already, that its prompts are long
    with redirect_stderr(io.StringIO()):
        return dict(
            lm_eval.simple_evaluate(
                model=lm, tasks=[{"group": "segattn", "task": [entry]}], task_manager=manager, bootstrap_iters=0
            )
        )
