"""Questions about a book of 500K tokens: small models that differ only in what they keep of it.

A book is a novel's sentences in a row, with facts spread evenly over them; it is read once, and each fact is asked for.
All models are trained by the same curriculum on texts of a few segments, with one question each, and then asked about
longer and longer books. Each model is kept in the JSON as it ends, and is not run again:

    python -m segattn.bench.experiments.questions --text book.txt --out results
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from ....rmt.runs.curriculum import Trainer
from ....rmt.tasks.answers import answer_all, interval
from ....rmt.tasks.books import draw_book
from ....rmt.tasks.make import text_task
from ....rmt.tasks.texts import TextTask
from ....rmt.tasks.traits import TRAITS
from ....runs.errors import SettingError, named
from ....runs.figures import versions
from ....runs.peak import peak_bytes
from ..book.setup import text_of
from ..harness import Advance, Figures, Job, Runs, command, earlier, made_by, run_all
from .models import build
from .plot import plot_questions
from .setup import Setup

# that are read in about the time of a step of training
TOKENS_PER_STEP = 4000


def task_of(setup: Setup, text: Path) -> TextTask:
    """Return the task on a book's text.

    Raises:
        SettingError: the text cannot be used, or there are too many people.
    """
    with named(book="text", text="text", people="people"):
        return text_task("book", book=text, people=setup.people, vocabulary_size=setup.vocabulary)


def train(memory: nn.Module, task: TextTask, setup: Setup, on_step: Callable[[], None] = lambda: None) -> Figures:
    """Train a model by the curriculum; return steps, seconds and the last accuracy of each stage.

    Raises:
        SettingError: the first stage is too short for the task.
    """
    with named(segments="segments"):
        trainer = Trainer(memory, task, setup.segment_len, setup.recipe, setup.seed)
    while not trainer.over:
        step = trainer.advance()
        on_step()
        if trainer.stage_over:
            stage = trainer.plan[trainer.stage]
            trainer.next_stage(
                {
                    "segments": stage.segments,
                    "steps": trainer.step,
                    "seconds": round(trainer.seconds, 2),
                    "accuracy": step.running,
                }
            )
    return {"stages": trainer.done, "steps": trainer.index}


def ask(
    memory: nn.Module, task: TextTask, setup: Setup, length: int, on_read: Callable[[int], None] = lambda tokens: None
) -> Figures:
    """Ask all questions about the books of one length, which no training text has a sentence of.

    Returns:
        right by place: of each fact in its order in the book; the interval of the whole; what is kept of a book, the
        most memory that the process held, and seconds per token.
    """
    right: list[list[bool]] = []
    kept, begin = 0, time.perf_counter()
    with peak_bytes(next(memory.parameters()).device) as peak:
        for index in range(setup.books):
            book = draw_book(task, length, seed=setup.seed, index=index)
            answers = answer_all(memory, book, setup.segment_len, on_read)
            right.append(answers.right.tolist())
            kept = max(kept, answers.state_bytes)
    hits, questions = sum(map(sum, right)), setup.books * setup.people
    return {
        "length": length,
        "questions": questions,
        "right": hits / questions,
        "interval": list(interval(hits, questions)),
        "by_place": [sum(place) / setup.books for place in zip(*right, strict=True)],
        "kept_bytes": kept,
        "peak_bytes": peak[0] if peak else None,
        "seconds_per_token": (time.perf_counter() - begin) / (setup.books * length),
    }


def lengths_of(setup: Setup, name: str) -> list[int]:
    """Return the lengths of the books that a model is asked about."""
    return [length for length in setup.lengths if name != "full" or length <= setup.full_up_to]


def experiment(setup: Setup, text: Path, out: Path) -> Figures:
    """Train and ask every model that `out` does not hold yet, and draw the picture.

    Raises:
        SettingError: the figures there are of another setup or text, or a setting cannot be.
    """
    task = task_of(setup, text)
    if setup.lengths[0] < task.shortest:
        raise SettingError("lengths", f"must be at least {task.shortest} to hold a book, got {setup.lengths[0]}")
    sizes = {name: value for name, value in json.loads(json.dumps(asdict(setup))).items() if name != "models"}
    kept = out / "questions.json"
    figures = earlier(kept, {"setup": sizes, "text": text_of(text)[1]}, "runs")
    figures["chance"] = chance_of(setup)
    steps = len(setup.segments) * setup.steps + setup.anneal
    # of the code that is loaded; the checkout may go on while a long run lasts
    made = made_by() | {"versions": versions()}

    def perform(job: Job, advance: Advance) -> Figures:
        name = str(job[0])
        memory = build(setup, name, task.vocab_size)
        trained = train(memory, task, setup, lambda: advance(1, " is trained"))
        memory.eval()
        read = 0

        def on_read(tokens: int) -> None:
            nonlocal read
            before, read = read // TOKENS_PER_STEP, read + tokens
            advance(read // TOKENS_PER_STEP - before, " reads")

        lengths = [ask(memory, task, setup, length, on_read) for length in lengths_of(setup, name)]
        parameters = sum(x.numel() for x in memory.parameters())
        return trained | {"parameters": parameters, "lengths": lengths, "made": made}

    amounts = {(name,): steps + setup.books * sum(lengths_of(setup, name)) // TOKENS_PER_STEP for name in setup.models}
    figures = run_all(kept, figures, Runs("runs", ("model",), amounts, perform, line, lambda figures: {}))
    plot_questions(out / "questions.png", figures)
    return figures


def chance_of(setup: Setup) -> float:
    """Return the share that is right by guessing among the answers of the kind that is asked for."""
    return statistics.mean(1 / len(trait.answers) for trait in TRAITS[: setup.people])


def line(run: Figures) -> str:
    """Return a model's figures as a line."""
    shares = ", ".join(f"{cell['length']:,}: {100 * cell['right']:.1f} %" for cell in run["lengths"])
    return f"{run['model']}, {run['steps']} steps: {shares}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, as of `command`."""
    about = (__doc__ or "").splitlines()[0]
    return command(
        Setup,
        experiment,
        "questions",
        about,
        arguments,
        text="a book of running text, UTF-8",
        out="folder of the figures and the picture",
    )
