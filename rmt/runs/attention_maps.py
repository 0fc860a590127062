"""What a trained memory attends to while it is written and read: what `segattn rmt attention` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...runs.checkpoint import SettingError
from ...runs.figures import make_folder, versions, write_figures
from ..tasks.answers import fewest_segments, right, samples_of
from ..tasks.batch import Batch
from ..tasks.facts import babi_file, generate_questions, read_questions
from ..tasks.make import FORMS
from .folder import Run, load_run
from .plots import Panel, Span, plot_attention
from .settings import existing

# texts that are looked at for one with a fact before its last segment
TRIES = 100


@dataclass(frozen=True)
class Sample:
    """Which text is read: of so many segments, and by its number among the test's.

    Args:
        sample: None: the first whose first fact stands before the last segment, where there are several.

    Raises:
        SettingError: naming the option.
    """

    segments: int = 3
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("segments", 1), ("sample", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(name, f"must be at least {least}, got {value}")


class Files(NamedTuple):
    """Where the figures and the picture are."""

    figures: Path
    picture: Path

    @classmethod
    def of(cls, folder: Path) -> Files:
        """In `folder`."""
        return cls(folder / "attention.json", folder / "attention.png")


def run_attention(
    folder: Path,
    sample: Sample,
    *,
    out: Path | None = None,
    babi: str | None = None,
    book: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Attention of the segment with the first fact and of the last; writes attention.json and .png over earlier ones.

    The figures hold, by layer and head, how much of the written memory's attention falls on facts, and how much of the
    answering row's (an encoder's first, a decoder's before the answer) falls on the memory.

    Raises:
        SettingError: naming an option that cannot be, or a run without facts or without attention to a memory.
    """
    files = Files.of(folder if out is None else out)
    existing("babi", babi)
    existing("book", book)
    run = load_run(folder, babi=babi, book=book, device=device)
    _check(run, sample)
    make_folder(files.figures.parent)
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
    write_figures(files.figures, figures)
    plot_attention(files.picture, panels, f"{run.settings.task}, {sample.segments} segments of {length} tokens")
    return figures


def sentences_of(run: Run) -> list[Tensor]:
    """Token ids [n] of each sentence of the stories that the test is made of."""
    form, babi = FORMS[run.settings.task].questions, run.settings.babi
    asked = generate_questions(form, "test") if babi is None else read_questions(babi_file(babi, form, "test"))
    return [torch.tensor(run.encode(fact)) for fact in sorted({fact for question in asked for fact in question.facts})]


def find_facts(sentences: list[Tensor], ids: Tensor) -> list[Span]:
    """Where sentences stand in a text [T], begin and end, in order."""
    found = set()
    for fact in sentences:
        windows = ids.unfold(0, len(fact), 1) if len(fact) <= len(ids) else ids[:0, None]
        found |= {(at, at + len(fact)) for at in windows.eq(fact).all(1).nonzero().flatten().tolist()}
    return sorted(found)


def attention_of(memory: Any, ids: Tensor, segment: int, segment_len: int) -> tuple[Tensor, Tensor]:
    """Attention probabilities [layers, heads, T, T] of one segment of a text [1, T], and what the model answers there.

    T counts memory and special tokens too. The segments before are read as ever; the model is left as it was.
    """
    begin = segment * segment_len
    with torch.inference_mode():
        state = memory(ids[:, :begin], output_logits=False).state if begin else None
        with _observed(memory.model) as attentions:
            out = memory(ids[:, begin : begin + segment_len], state=state)
    return torch.cat(attentions).float(), out.logits


@contextmanager
def _observed(model: Any) -> Iterator[list[Tensor]]:
    """A list that gets the attention [1, heads, T, T] of each layer, of whatever the model is called with inside."""
    found: list[Tensor] = []
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values()
    before = [config._attn_implementation for config in configs]

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_attentions": True}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.extend(output.attentions)

    # set here, since older models refuse their own setter
    for config in configs:
        config._attn_implementation = "eager"
    hooks = [model.register_forward_pre_hook(ask, with_kwargs=True), model.register_forward_hook(keep)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _draw(run: Run, sample: Sample) -> tuple[int, Batch, list[Span]]:
    """A text, its number, and where its facts are."""
    length, sentences = run.settings.tokens, sentences_of(run)
    last = (sample.segments - 1) * length
    for number in range(TRIES) if sample.sample is None else (sample.sample,):
        batch = samples_of(run.task, number, number + 1, sample.segments * length, sample.seed)
        facts = find_facts(sentences, batch.input_ids[0])
        if facts and (sample.sample is not None or not last or facts[0][0] < last):
            return number, batch, facts
    raise SettingError("sample", f"must be of a text with a fact that is found again, got {sample.sample}")


def _check(run: Run, sample: Sample) -> None:
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
    """Rows of the memory that is read, of that which is written, and the first token's."""
    m, length = run.settings.memory_tokens, run.settings.tokens
    if run.settings.classifies:
        # [first | memory | separator | tokens | separator]
        return (1, 1 + m), (1, 1 + m), m + 2
    return (0, m), (m + length, m + length + m), m


def _rows(run: Run, facts: list[Span], segment: int) -> list[Span]:
    """The facts' rows in a segment."""
    length, offset = run.settings.tokens, _layout(run)[2]
    begin, end = segment * length, (segment + 1) * length
    inside = [(max(a, begin), min(b, end)) for a, b in facts if a < end and b > begin]
    return [(a - begin + offset, b - begin + offset) for a, b in inside]


def _panels(run: Run, facts: list[Span], maps: dict[int, Tensor]) -> list[Panel]:
    read, write, _ = _layout(run)
    memory = list(dict.fromkeys((read, write)))
    return [
        Panel(f"segment {segment + 1}", found.cpu().numpy(), memory, _rows(run, facts, segment))
        for segment, found in maps.items()
    ]


def _parts(
    run: Run, facts: list[Span], first: int, segments: int, writing: Tensor, reading: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """Of the writing and of the reading segment, shares by layer and head [layers][heads]."""
    read, write, offset = _layout(run)
    columns = [i for begin, end in _rows(run, facts, first) for i in range(begin, end)]
    on_facts = writing[:, :, write[0] : write[1], columns].sum(-1).mean(-1)
    # what answers: an encoder's first row, or the row before a decoder's first label
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
