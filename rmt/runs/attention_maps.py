"""The attention of a trained memory while it is written and read, as `segattn rmt attention` shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...runs.errors import SettingError
from ...runs.figures import make_folder, versions, write_figures
from ...runs.settings import check_least
from ..tasks.answers import fewest_segments, right, samples_of
from ..tasks.batch import Batch
from ..tasks.make import FORMS
from ..tasks.texts import TextTask
from .folder import Run, RunFiles, load_run
from .plots import Panel, Span, plot_attention

# texts among which one with a fact before its last segment is searched
TRIES = 100


@dataclass(frozen=True)
class Sample:
    """The text that is read.

    Args:
        segments: its length.
        sample: its number among the test's; None: the first text whose first fact stands before the last of several
            segments.
        seed: of the samples.

    Raises:
        SettingError: naming the option.
    """

    segments: int = 3
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, {"segments": 1, "sample": 0, "seed": 0})


def run_attention(
    folder: Path,
    sample: Sample,
    *,
    out: Path | None = None,
    babi: str | None = None,
    book: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Show the attention of two segments of a text: the one with the first fact, and the last, with the question.

    The figures hold, by layer and head, how much of the written memory's attention falls on facts, and how much of the
    answering row's (an encoder's first, a decoder's before the answer) falls on the memory. Writes attention.json and
    attention.png over earlier ones.

    Args:
        folder: of the run.
        sample: the text.
        out: folder for the files; None: the run's.
        babi, book: other files than those that the run was trained on; None: the same.
        device: None: a GPU where one is.

    Returns:
        Every figure, as in the JSON file.

    Raises:
        SettingError: naming an option that cannot be, or a run without facts or without attention to a memory.
    """
    path = RunFiles.of(folder if out is None else out).attention
    run = load_run(folder, babi=babi, book=book, device=device)
    _check(run, sample)
    make_folder(path.parent)
    length = run.settings.tokens
    number, batch, facts = _draw(run, sample)
    ids, first = batch.input_ids.to(next(run.memory.parameters()).device), facts[0][0] // length
    writing, _ = attention_of(run.memory, ids, first, length)
    reading, logits = attention_of(run.memory, ids, sample.segments - 1, length)
    panels = _panels(run, facts, {first: writing, sample.segments - 1: reading})
    last = batch.labels if batch.labels.ndim == 1 else batch.labels[:, -length:]
    figures = {
        "task": run.settings.task,
        "segments": sample.segments,
        "sample": number,
        "seed": sample.seed,
        "versions": versions(),
        "answered_right": bool(right(logits.cpu(), last).item()),
        "facts": [list(span) for span in facts],
        "parts": _parts(run, facts, first, sample.segments, writing, reading, last),
    }
    write_figures(path, figures)
    text = f"{sample.segments} segment{'s' * (sample.segments > 1)} of {length} tokens"
    plot_attention(path.with_suffix(".png"), panels, f"{run.settings.task}, {text}")
    return figures


def sentences_of(run: Run) -> list[Tensor]:
    """Return the token ids [n] of each sentence of the stories that the test's samples are made of."""
    questions = run.task.questions("test") if isinstance(run.task, TextTask) else []
    facts = sorted({fact for question in questions for fact in question.facts})
    return [torch.tensor(run.encode(fact), device="cpu") for fact in facts]


def find_facts(sentences: list[Tensor], ids: Tensor) -> list[Span]:
    """Return the places of sentences in a text [T], begin and end, in order."""
    places = set()
    for fact in sentences:
        windows = ids.unfold(0, len(fact), 1) if len(fact) <= len(ids) else ids[:0, None]
        places |= {(at, at + len(fact)) for at in windows.eq(fact).all(1).nonzero().flatten().tolist()}
    return sorted(places)


def attention_of(memory: Any, ids: Tensor, segment: int, segment_len: int) -> tuple[Tensor, Tensor]:
    """Return the attention of one segment of a text, and the logits of that segment; the model is left as it was.

    Args:
        memory: a `RecurrentMemory`.
        ids: of the text [1, T].
        segment: number of the segment, from 0 on; those before are read first.
        segment_len: L.

    Returns:
        Probabilities [layers, heads, rows, rows], memory and special tokens included, and logits.
    """
    begin = segment * segment_len
    with torch.inference_mode():
        state = memory(ids[:, :begin], output_logits=False).state if begin else None
        with _observed(memory.model) as attentions:
            out = memory(ids[:, begin : begin + segment_len], state=state)
    return torch.cat(attentions).float(), out.logits


@contextmanager
def _observed(model: Any) -> Iterator[list[Tensor]]:
    """Yield a list that receives the attention [1, heads, T, T] of each layer in calls of the model in the block."""
    attentions: list[Tensor] = []
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values()
    before = [config._attn_implementation for config in configs]

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_attentions": True}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        attentions.extend(output.attentions)

    # older models refuse their setter of the implementation
    for config in configs:
        config._attn_implementation = "eager"
    hooks = [model.register_forward_pre_hook(ask, with_kwargs=True), model.register_forward_hook(keep)]
    try:
        yield attentions
    finally:
        for hook in hooks:
            hook.remove()
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _draw(run: Run, sample: Sample) -> tuple[int, Batch, list[Span]]:
    """Draw the sample, and return its number, the text, and the places of its facts."""
    length, sentences = run.settings.tokens, sentences_of(run)
    last = (sample.segments - 1) * length
    for number in range(TRIES) if sample.sample is None else (sample.sample,):
        batch = samples_of(run.task, number, number + 1, sample.segments * length, sample.seed)
        facts = find_facts(sentences, batch.input_ids[0])
        if facts and (sample.sample is not None or not last or facts[0][0] < last):
            return number, batch, facts
    raise SettingError("sample", f"must be a text in which a fact can be located, got {sample.sample}")


def _check(run: Run, sample: Sample) -> None:
    """Check that a run has facts, and a memory that is attended to, and that a sample fits the length.

    Raises:
        SettingError: naming the option.
    """
    if run.settings.task not in FORMS:
        raise SettingError("folder", f"must be a run of a task with facts in text, got one of {run.settings.task}")
    if run.settings.architecture != "rmt":
        raise SettingError(
            "folder", f"must be a run of rmt, whose memory is attended to, got {run.settings.architecture}"
        )
    fewest = fewest_segments(run.task, run.settings.tokens)
    if sample.segments < fewest:
        raise SettingError("segments", f"must be at least {fewest} to hold every sample, got {sample.segments}")


def _layout(run: Run) -> tuple[Span, Span, int]:
    """Return the rows of the memory that is read, those of the memory that is written, and the first token's row."""
    memory: Any = run.memory
    layout = memory.settings.layout
    if layout.memory < 0:
        read, write = 0, layout.before + run.settings.tokens + layout.after + layout.memory
    else:
        read = write = layout.memory
    return (read, read + layout.num_memory), (write, write + layout.num_memory), layout.before


def _rows(run: Run, facts: list[Span], segment: int) -> list[Span]:
    """Return the rows of facts in a segment."""
    length, offset = run.settings.tokens, _layout(run)[2]
    begin, end = segment * length, (segment + 1) * length
    inside = [(max(a, begin), min(b, end)) for a, b in facts if a < end and b > begin]
    return [(a - begin + offset, b - begin + offset) for a, b in inside]


def _panels(run: Run, facts: list[Span], maps: dict[int, Tensor]) -> list[Panel]:
    """Return the panels of segments, whose attention is in `maps`."""
    read, write, _ = _layout(run)
    memory = list(dict.fromkeys((read, write)))
    return [
        Panel(f"segment {segment + 1}", attention.cpu().numpy(), memory, _rows(run, facts, segment))
        for segment, attention in maps.items()
    ]


def _parts(
    run: Run, facts: list[Span], first: int, segments: int, writing: Tensor, reading: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """Return the figures of two segments, each with a share of attention by layer and head [layers][heads].

    Args:
        facts: places in the text.
        first, segments: number of the writing segment, and of all; the last one is the reading segment.
        writing, reading: attention [layers, heads, T, T] of these two.
        labels: of the last segment [1, L], or the class [1].
    """
    read, write, offset = _layout(run)
    columns = [i for begin, end in _rows(run, facts, first) for i in range(begin, end)]
    on_facts = writing[:, :, write[0] : write[1], columns].sum(-1).mean(-1)
    # the answering row: an encoder's first, or the one before a decoder's first label
    row = 0 if labels.ndim == 1 else offset + int((labels[0] >= 0).nonzero()[0]) - 1
    on_memory = reading[:, :, row, read[0] : read[1]].sum(-1)
    visible = reading.shape[-1] if labels.ndim == 1 else row + 1
    return [
        {
            "segment": first + 1,
            "what": "attention of the written memory that falls on facts",
            "share": on_facts.tolist(),
            "even": len(columns) / writing.shape[-1],
        },
        {
            "segment": segments,
            "what": "attention of the answering row that falls on the memory",
            "share": on_memory.tolist(),
            "even": (read[1] - read[0]) / visible,
        },
    ]
