"""RULER's tasks whose texts are made, not downloaded (arXiv 2404.06654): by lm-eval's generators, as many as wanted."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

Documents = list[dict[str, Any]]
PACKAGE = "lm_eval.tasks.ruler"
# the example in front of a text of ruler_vt, and the sizes that lm-eval's generators try first
EXAMPLE = {"max_seq_length": 500, "incremental": 5}
FEWEST_NOISES, FEWEST_WORDS = 10, 10
ANSWER_VT, ANSWER_CWE = 30, 120


class Needle(NamedTuple):
    """Hold what is hidden in a task of needles, in the words of lm-eval's generator."""

    haystack: str
    key: str
    value: str


NEEDLES = {
    "niah_single_1": Needle("repeat", "words", "numbers"),
    "niah_multikey_2": Needle("needle", "words", "numbers"),
    "niah_multikey_3": Needle("needle", "uuids", "uuids"),
}


def documents(task: str, tokenizer: Any, length: int, samples: int, seed: int) -> Documents:
    """Make the documents of a task, which depend on the arguments alone.

    lm-eval's own task makes 500, and loads some texts from the hub.

    Args:
        task: one of `TASKS`.
        tokenizer: of transformers.
        length: tokens of a text with its answer, at most, but for ruler_fwe, where the answer comes on top.
        samples: number of documents.
        seed: of all random numbers.

    Raises:
        ValueError: the task's shortest text is longer.
        ImportError: a package of lm-eval's for RULER is missing.
    """
    try:
        with _seeded(seed):
            return TASKS[task](task, tokenizer, length, samples)
    except ImportError as error:
        # lm-eval puts another error, without a name, on top of the first
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        raise ImportError(str(error), name=cause.name) from error


def _needles(task: str, tokenizer: Any, length: int, samples: int) -> Documents:
    niah, needle = import_module(f"{PACKAGE}.prepare_niah"), NEEDLES[task]
    try:
        made: Documents = niah.generate_samples(
            niah.get_haystack(needle.haystack),
            TOKENIZER=tokenizer,
            max_seq_length=length,
            template=import_module(f"{PACKAGE}.niah_utils").TEMPLATE,
            type_haystack=needle.haystack,
            type_needle_k=needle.key,
            type_needle_v=needle.value,
            num_samples=samples,
        )
    except ValueError as error:
        raise ValueError(f"length must hold a text of {task}, got {length}: {error}") from error
    return made


def _variables(task: str, tokenizer: Any, length: int, samples: int) -> Documents:
    vt = import_module(f"{PACKAGE}.vt_utils")

    def tokens(noises: int, example: bool) -> int:
        text, answer = vt.generate_input_output(noises, 1, 4, is_icl=example)
        return len(tokenizer(f"{text} {answer}").input_ids) + ANSWER_VT

    # a generator that finds no text which is short enough never ends
    least = tokens(EXAMPLE["incremental"], True)
    if least > EXAMPLE["max_seq_length"]:
        raise ValueError(
            f"task {task} needs an example of at most {EXAMPLE['max_seq_length']} tokens, got {least}: leave it out "
            "with a tokenizer of bytes or other short tokens"
        )
    example = vt.sys_vartrack_w_noise_random(tokenizer, num_samples=1, **EXAMPLE)[0]
    shown = f"{example['input']} {' '.join(example['outputs'])}\n\n"
    _check(task, length, tokens(FEWEST_NOISES, False) + len(tokenizer(shown).input_ids))
    return list(
        vt.sys_vartrack_w_noise_random(tokenizer, num_samples=samples, max_seq_length=length, icl_example=example)
    )


def _common_words(task: str, tokenizer: Any, length: int, samples: int) -> Documents:
    cwe = import_module(f"{PACKAGE}.cwe_utils")
    example, text, answer = cwe.generate_input_output(FEWEST_WORDS, length)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(answer, start=1))
    _check(task, length, len(tokenizer(f"{example}\n{text} {numbered}").input_ids) + ANSWER_CWE)
    return list(cwe.sys_word_pair_random(samples, length, tokenizer))


def _frequent_words(task: str, tokenizer: Any, length: int, samples: int) -> Documents:
    fwe = import_module(f"{PACKAGE}.fwe_utils")
    _check(task, length, 2 * len(tokenizer(fwe.TEMPLATE).input_ids))
    return list(fwe.sys_kwext(tokenizer, length, samples))


TASKS: dict[str, Callable[[str, Any, int, int], Documents]] = {
    **dict.fromkeys(NEEDLES, _needles),
    "ruler_vt": _variables,
    "ruler_cwe": _common_words,
    "ruler_fwe": _frequent_words,
}


def _check(task: str, length: int, least: int) -> None:
    """Check that a length holds the shortest text of a task.

    Raises:
        ValueError: it does not.
    """
    if length < least:
        raise ValueError(f"length must be at least {least} for {task} with this tokenizer, got {length}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all that lm-eval's generators draw from, keep their words from the terminal, and leave others' numbers."""
    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    import_module(f"{PACKAGE}.cwe_utils").RNG.seed(seed)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
