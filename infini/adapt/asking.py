"""Passkeys that a model is asked for by itself, before it is adapted and after."""

from __future__ import annotations

from functools import partial

from ...runs.errors import named
from ..evaluate.loading import Loaded
from ..evaluate.passkey import PasskeyText
from ..evaluate.reading import longest_text
from ..evaluate.retrieval import RetrievalCell, check_prompt, measure_grid
from ..huggingface.settings import is_converted
from .kept import Kept, Listener
from .settings import Passkeys

# prompts that a converted model, which keeps little of each, reads side by side
BATCH = 8


def check_asked(loaded: Loaded, passkeys: Passkeys) -> None:
    """Check that there can be prompts of all lengths and places that are to be asked.

    Raises:
        SettingError: of `ask` or `ask_depths`.
    """
    task = PasskeyText(loaded.tokenizer)
    with named(length="ask", depth="ask_depths"):
        for length in passkeys.ask:
            for depth in passkeys.ask_depths:
                check_prompt(length, depth, task.shortest)


def ask(loaded: Loaded, name: str, passkeys: Passkeys, kept: Kept, listener: Listener) -> None:
    """Ask a model for passkeys by greedy decoding, and keep the figures of each length and place; those kept stay.

    The prompts are those of `segattn evaluate passkey`, the same for all models. Lengths beyond the positions of a
    plain model are left out.

    Args:
        name: of the model, for figures.
    """
    model, tokenizer, _ = loaded
    task, limit, stage = PasskeyText(tokenizer), longest_text(model), f"passkeys, {name}"
    lengths = [length for length in passkeys.ask if limit is None or length + task.digits <= limit]
    done = [RetrievalCell(**cell) for cell in kept.passkeys.get(name, ())]
    places = {(cell.length, cell.depth) for cell in done}
    left = [length for length in lengths for depth in passkeys.ask_depths if (length, depth) not in places]

    def keep(cell: RetrievalCell, cells: list[RetrievalCell]) -> None:
        kept.passkeys[name] = [each._asdict() for each in cells]
        kept.save()
        right = f"{round(cell.exact * cell.samples)} of {cell.samples} passkeys"
        listener.finished(f"{name}: {right} in {cell.length:,} tokens, at {100 * cell.depth:g} %")

    listener.begin(stage, sum(left) * passkeys.ask_samples)
    measure_grid(
        model,
        task,
        lengths,
        passkeys.ask_depths,
        done=done,
        on_cell=keep,
        samples=passkeys.ask_samples,
        batch=BATCH if is_converted(model) else 1,
        on_tokens=partial(listener.read, stage),
    )
