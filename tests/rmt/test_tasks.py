"""Tests of the memory tasks: batches are decoded to text again, and answered by rules of this file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segattn.rmt.tasks.batch import generator_of
from segattn.rmt.tasks.facts import (
    MOVES,
    PEOPLE,
    PLACES,
    WORDS,
    Question,
    babi_file,
    generate_questions,
    read_questions,
)
from segattn.rmt.tasks.filler import Filler, split_sentences, strip_gutenberg
from segattn.rmt.tasks.make import TASKS, make_task, text_task
from segattn.rmt.tasks.symbols import CopyTask, RetrievalTask
from segattn.rmt.tasks.texts import TextTask
from segattn.rmt.tasks.vocabulary import CLS, GEN, PAD, SEP, SPECIAL, UNK, Vocabulary

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CLASS_TASKS, TOKEN_TASKS = ("memorize", "detect", "reasoning"), ("qa1", "qa2", "qa4")

MOVE = r"(daniel|john|mary|sandra) (?:went to|went back to|moved to|journeyed to|travelled to) the (\w+)"
TAKE = r"(daniel|john|mary|sandra) (?:took|got|grabbed|picked up) the (\w+)(?: there)?"
DROP = r"(daniel|john|mary|sandra) (?:dropped|left|discarded|put down) the (\w+)(?: there)?"
LIES = r"the (\w+) is (north|south|east|west) of the (\w+)"
FACT = re.compile(rf"(?:{MOVE}|{TAKE}|{DROP}|{LIES}) \. ")
QUESTION = re.compile(r"(?:where is \w+|where is the \w+|what is \w+ of the \w+|what is the \w+ \w+ of) \?$")
BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}


def answered(text: str) -> str:
    """Return the answer to the question at the end of a decoded text, from the facts in it."""
    asked = QUESTION.search(text)
    assert asked is not None, text[-60:]
    words = asked[0].split()
    if words[0] == "what":
        known = {fact[-3:] for fact in FACT.findall(text)}
        known |= {(b, BACK[direction], a) for a, direction, b in known}
        if words[2] == "the":
            found = {b for a, direction, b in known if [a, direction] == words[3:5]}
        else:
            found = {a for a, direction, b in known if [direction, b] == [words[2], words[5]]}
        (answer,) = found
        return answer
    where: dict[str, str] = {}
    holder: dict[str, str] = {}
    for mover, place, taker, taken, _, dropped, *_ in FACT.findall(text):
        if mover:
            where[mover] = place
        elif taker:
            # nobody takes what is known to be elsewhere
            assert taken not in where or where[taken] == where.get(taker, where[taken])
            holder[taken] = taker
        else:
            del holder[dropped]
        where.update({thing: where[who] for thing, who in holder.items() if who in where})
    return where[words[-2]]


def letters(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(number)) + "x"


BOOK = [" ".join(letters(100 * i + j) for j in range(2 + i * 7 % 11)) + "." for i in range(97)]
CUT = 78


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a book of 97 sentences in which no word occurs twice: 78 for training, 19 for the test."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(" ".join(BOOK), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tasks(book: Path) -> dict[str, TextTask]:
    vocabulary = Vocabulary.build([], 0, required=[*WORDS, *BOOK])
    return {name: text_task(name, book=book, vocabulary=vocabulary) for name in (*CLASS_TASKS, *TOKEN_TASKS)}


def parts(task: TextTask, row: torch.Tensor) -> tuple[list[str], list[int], list[str]]:
    """Return the facts of a sample, their places in the filler, and the filler's words."""
    assert task.vocabulary is not None
    text = task.vocabulary.decode(row)
    text = text.split(" [GEN]")[0]
    text = text[: QUESTION.search(text).start()]  # type: ignore[union-attr]
    facts, places, filler, done = [], [], "", 0
    for match in FACT.finditer(text):
        filler += text[done : match.start()]
        places.append(len(filler.split()))
        facts.append(match[0])
        done = match.end()
    return facts, places, (filler + text[done:]).split()


def rows_of(task: TextTask, length: int, count: int = 12) -> list[tuple[str, str, torch.Tensor]]:
    """Return texts up to the question's end, the answers in the labels, and the tokens, for both splits."""
    found = []
    assert task.vocabulary is not None
    for split in ("train", "test"):
        batch = task.batch(count, length, seed=3, index=2, split=split)
        assert batch.input_ids.shape == (count, length)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        for ids, label in zip(batch.input_ids, batch.labels, strict=True):
            text = task.vocabulary.decode(ids)
            if task.classes:
                answer = task.classes[int(label)]
            else:
                place = torch.nonzero(label != -100).flatten().tolist()
                assert place == [length - 1]
                assert ids[-2] == GEN
                assert label[-1] == ids[-1]
                answer = task.vocabulary.decode(label[-1:])
                text = text.removesuffix(f" [GEN] {answer}")
            assert not set(text.split()) & (set(SPECIAL) - {"[UNK]"})
            found.append((text, answer, ids))
    return found


@pytest.mark.parametrize("name", [*CLASS_TASKS, *TOKEN_TASKS])
def test_the_answer_follows_from_the_text(tasks: dict[str, TextTask], name: str) -> None:
    task = tasks[name]
    assert task.classes == (PLACES if name in CLASS_TASKS else ())
    for length in (task.shortest, task.shortest + 1, 331):
        answers = []
        for text, answer, _ in rows_of(task, length, count=40):
            assert answered(text) == answer
            answers.append(answer)
        assert set(answers) == set(PLACES)


@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_a_question_with_its_whole_story_may_ask_for_a_class(book: Path, name: str) -> None:
    task = text_task(name, book=book, kind="class")
    assert task.classes == PLACES
    for text, answer, _ in rows_of(task, 263):
        assert answered(text) == answer


def test_the_facts_that_are_put_in(tasks: dict[str, TextTask]) -> None:
    number = {name: Counter[int]() for name in tasks}
    for name, task in tasks.items():
        for text, _, ids in rows_of(task, 400, count=40):
            facts, _, _ = parts(task, ids)
            number[name][len(facts)] += 1
            if name in ("memorize", "detect"):
                # the fact is about the person asked for
                assert facts[0].split()[0] == text.split()[-2]
    assert [set(number[name]) for name in CLASS_TASKS] == [{1}, {1}, {2}]
    assert set(number["qa1"]) == {2, 4, 6, 8, 10}
    assert set(number["qa4"]) == {2}
    assert max(number["qa2"]) > 10


@pytest.mark.parametrize("length", [257, 2495])
@pytest.mark.parametrize("name", [*CLASS_TASKS, *TOKEN_TASKS])
def test_facts_stand_between_sentences_of_one_part(tasks: dict[str, TextTask], name: str, length: int) -> None:
    task = tasks[name]
    assert task.vocabulary is not None
    texts = [task.vocabulary.decode(task.vocabulary.encode(sentence)).split() for sentence in BOOK]
    for i, (_, _, ids) in enumerate(rows_of(task, length)):
        sentences = texts[:CUT] if i < 12 else texts[CUT:]
        _, places, filler = parts(task, ids)
        first = [sentence[0] for sentence in sentences].index(filler[0])
        around: list[str] = []
        gaps = {0, len(filler)}
        while len(around) < len(filler):
            around += sentences[first % len(sentences)]
            first += 1
            gaps.add(len(around))
        assert filler == around[: len(filler)]
        assert set(places) <= gaps
        if name == "memorize":
            assert places == [0]
    if length > 2000:
        assert len(filler) > sum(map(len, texts[CUT:]))


def test_facts_keep_the_order_of_their_story(tmp_path: Path) -> None:
    names = ["bathroom", "kitchen", "garden", "office", "hallway", "bedroom"]
    story = [f"{i + 1} Mary moved to the {name}." for i, name in enumerate(names)]
    for split in ("train", "test"):
        (tmp_path / f"qa1_x_{split}.txt").write_text("\n".join([*story, "7 Where is Mary?\tbedroom\t6"]))
    task = text_task("qa1", babi=tmp_path)
    spread = set()
    for _, _, ids in rows_of(task, 300):
        facts, places, _ = parts(task, ids)
        assert [fact.split()[-2] for fact in facts] == names
        spread.add(len(set(places)))
    # drawn with replacement: some stand side by side, and some apart
    assert len(spread) > 1


@pytest.mark.parametrize(("name", "facts"), [("detect", 1), ("reasoning", 2)])
def test_facts_stand_at_every_depth(name: str, facts: int) -> None:
    task = text_task(name)
    depths = []
    for index in range(4):
        for ids in task.batch(100, 1200, seed=0, index=index).input_ids:
            _, places, filler = parts(task, ids)
            assert len(places) == facts
            depths += [place / len(filler) for place in places]
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    # five standard deviations of a binomial count
    expected = 400 * facts / 5
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.8)


def test_half_of_the_training_samples_have_decoys(book: Path) -> None:
    plain, task = (text_task("detect", book=book, decoys=share) for share in (0.0, 0.2))
    assert plain.vocabulary is not None
    tests = [made.batch(9, 80, seed=1, index=4, split="test").input_ids for made in (plain, task)]
    assert torch.equal(*tests)
    of_facts = torch.unique(torch.tensor(plain.vocabulary.encode(" ".join([*PEOPLE, *PLACES, *MOVES, "the"]))))
    batch = task.batch(400, 500, seed=1, index=4)
    rows = batch.input_ids.tolist()
    for row, label in zip(rows, batch.labels, strict=True):
        assert f" the {task.classes[int(label)]} . " in plain.vocabulary.decode(row)
    strays = torch.isin(batch.input_ids, of_facts).sum(1) - len("mary went to the garden".split())
    # the question has a person, and one verb has two words
    none = strays <= 2
    # five standard deviations of a binomial count
    assert abs(int(none.sum()) - 200) < 5 * np.sqrt(400 / 4)
    # besides these words the full stop is one
    expected = 490 * 0.2 * len(of_facts) / (len(of_facts) + 1)
    assert abs(float(strays[~none].float().mean()) - expected) < 5
    drawn = batch.input_ids[~none]
    counts = (drawn[:, :, None] == of_facts).sum((0, 1))
    assert counts.min() > 0.7 * counts.float().mean()


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_a_function_of_its_arguments(name: str, book: Path) -> None:
    length = {"retrieval": 40, "copy": 41, "reverse": 41}.get(name, 300)
    options = {"book": book} if length == 300 and name != "memorize" else {}
    task, again = make_task(name, **options), make_task(name, **options)

    def rows(task: Any, seed: int, index: int, split: str) -> list[list[int]]:
        batch = task.batch(5, length, seed=seed, index=index, split=split)
        return [*batch.input_ids.tolist(), *batch.labels.reshape(5, -1).tolist()]

    keys = [(seed, index, split) for seed in (0, 1, 2**32) for index in (0, 1, 7) for split in ("train", "test")]
    drawn = {key: rows(task, *key) for key in keys}
    for key in reversed(keys):
        assert rows(again, *key) == drawn[key]
    assert len({str(batch) for batch in drawn.values()}) == len(keys)
    assert len({str(row) for row in drawn[0, 0, "train"][:5]}) == 5


def test_splits_do_not_share_their_sources(book: Path, tmp_path: Path) -> None:
    for split, person in (("train", "Mary"), ("test", "John")):
        lines = [f"1 {person} moved to the office.", f"2 Where is {person}?\toffice\t1"]
        (tmp_path / f"qa1_x_{split}.txt").write_text("\n".join(lines))
    for name in ("memorize", "detect", "qa1"):
        task = text_task(name, babi=tmp_path, book=book)
        assert task.vocabulary is not None
        words = {}
        for split in ("train", "test"):
            batches = [task.batch(9, 500, seed=0, index=i, split=split).input_ids for i in range(3)]
            words[split] = set(task.vocabulary.decode(torch.cat(batches).flatten()).split())
        assert {"mary", "john"} & words["train"] == {"mary"}
        assert {"mary", "john"} & words["test"] == {"john"}
        seen = {split: {word for word in words[split] if word.endswith("x")} for split in words}
        assert len(seen["train"]) > 100
        # the vocabulary, too, is of the training part alone
        assert "[UNK]" in words["test"] - words["train"]
        assert not seen["test"]


def test_filler_of_the_test_is_the_end_of_the_book() -> None:
    filler = Filler(
        " ".join(BOOK), lambda text: [int("".join(str(ord(c) - 97) for c in w[:-1])) for w in text[:-1].split()]
    )
    train, test = (set(filler.tokens(split).tolist()) for split in ("train", "test"))
    assert not train & test
    assert {token // 100 for token in train} == set(range(CUT))
    assert {token // 100 for token in test} == set(range(CUT, 97))
    firsts = {int(filler.draw(generator_of(1, seed=0, index=i, split="test"), 1, "test").tokens[0]) for i in range(400)}
    assert firsts == {100 * i for i in range(CUT, 97)}
    nothing = filler.draw(generator_of(1, seed=0, index=0, split="train"), 0, "train")
    assert nothing.tokens.tolist() == []
    assert nothing.gaps.tolist() == [0]


@pytest.mark.parametrize("as_given", [list, tuple, lambda ids: np.array(ids, np.int32)])
def test_any_tokenizer_encodes(book: Path, as_given: Callable[[list[int]], Any]) -> None:
    """Encode bytes, so that answers have several tokens, and different numbers of them."""

    def encode(text: str) -> Any:
        return as_given(list((" " + text).encode()))

    task = text_task("qa4", book=book, encode=encode, vocab_size=300, gen_token=299)
    assert (task.vocab_size, task.vocabulary, task.classes) == (300, None, ())
    lengths = set()
    for split in ("train", "test"):
        batch = task.batch(16, 517, seed=0, index=0, split=split)
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            assert len(ids) == 517
            place = ids.index(299)
            text, answer = bytes(ids[:place]).decode(), bytes(ids[place + 1 :]).decode()
            assert labels == [-100] * (place + 1) + ids[place + 1 :]
            spoken = Vocabulary(SPECIAL).decode([]) + " ".join(re.findall(r"\w+|[.?]", text.lower()))
            assert answered(spoken) == answer.strip()
            lengths.add(len(answer))
    assert lengths == {7, 8, 9}
    plain = text_task("qa4", book=book, encode=encode, vocab_size=256)
    batch = plain.batch(2, 400, seed=0, index=0)
    assert bytes(batch.input_ids[0].tolist()).decode().split("? ")[-1] in PLACES


def test_a_vocabulary_is_shared_and_kept_as_json(book: Path) -> None:
    built = {name: text_task(name, book=book) for name in ("detect", "reasoning", "qa2")}
    words = [task.vocabulary.words for task in built.values() if task.vocabulary is not None]
    assert words[0] == words[1] == words[2]
    kept = Vocabulary(json.loads(json.dumps(words[0])))
    again = text_task("detect", book=book, vocabulary=kept)
    assert again.vocabulary is kept
    assert again.vocab_size == built["detect"].vocab_size == len(words[0])
    for split in ("train", "test"):
        batches = [task.batch(3, 99, seed=0, index=5, split=split) for task in (again, built["detect"])]
        assert torch.equal(batches[0].input_ids, batches[1].input_ids)


def test_vocabulary() -> None:
    vocabulary = Vocabulary.build(["The whale, the whale! A ship.", "the sea; a"], 2, required=["Mary moved.", "whale"])
    assert vocabulary.words == [*SPECIAL, ".", "mary", "moved", "whale", "the", "a"]
    assert (PAD, UNK, CLS, SEP, GEN) == (0, 1, 2, 3, 4)
    assert vocabulary.encode("THE whale moved a ship.") == [9, 8, 7, 10, UNK, 5]
    assert vocabulary.decode(torch.tensor([9, 8, 4])) == vocabulary.decode([9, 8, 4]) == "the whale [GEN]"
    assert len(vocabulary) == 11
    with pytest.raises(ValueError, match="size must be at least 0, got -1"):
        Vocabulary.build(["a"], -1)
    with pytest.raises(ValueError, match=r"words must begin with \[PAD\], .*got \['a'\]"):
        Vocabulary(["a"])
    with pytest.raises(ValueError, match=r"words must differ from each other, got \['a'\]"):
        Vocabulary([*SPECIAL, "a", "b", "a"])


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize("rewrite", [False, True])
def test_retrieval(digits: int, rewrite: bool) -> None:
    task = RetrievalTask(key_digits=digits, rewrite=rewrite)
    assert task.segment_len == digits + 2
    assert task.shortest == 2 * (digits + 2)
    repeated, changed, places = 0, 0, set()
    for pairs in (1, 7):
        batch = task.batch(150, task.length(pairs), seed=0, index=pairs)
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            segments = [task.vocabulary.decode(segment).split() for segment in ids.split(task.segment_len)]
            assert [segment[-2] for segment in segments] == [":"] * pairs + ["[GEN]"]
            assert len(segments[-1]) == task.segment_len
            keys, values = ["".join(s[:-2]) for s in segments], [s[-1] for s in segments]
            assert all(key.isdigit() and value.isdigit() for key, value in zip(keys, values, strict=True))
            memory = dict(zip(keys[:-1], values[:-1], strict=True))
            assert memory[keys[-1]] == values[-1]
            assert labels.tolist() == [-100] * (len(ids) - 1) + [int(ids[-1])]
            repeated += len(memory) < pairs
            changed += dict(reversed([*zip(keys[:-1], values[:-1], strict=True)]))[keys[-1]] != values[-1]
            if pairs == 7:
                places.add(len(keys) - 2 - keys[-2::-1].index(keys[-1]))
    assert places == set(range(7))
    if rewrite:
        # 7 pairs of 4 keys: some key must come again, and 5 of 10 times or so it is the one asked for
        assert repeated == 150
        assert changed > 50
    else:
        assert repeated == changed == 0


def test_retrieval_of_all_keys() -> None:
    task = RetrievalTask(key_digits=2, symbols=3)
    (row,) = task.batch(1, task.length(9), seed=0, index=0).input_ids
    keys = [tuple(segment[:2].tolist()) for segment in row.split(4)][:-1]
    assert len(set(keys)) == 9
    assert {digit for key in keys for digit in key} == {task.vocabulary.ids[digit] for digit in "012"}
    few = RetrievalTask(key_digits=3, rewrite=True, keys=2)
    for row in few.batch(20, few.length(30), seed=0, index=0).input_ids:
        assert len({tuple(segment[:3].tolist()) for segment in row.split(5)}) == 2


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_copy(copies: int, reverse: bool) -> None:
    task = CopyTask(reverse=reverse, copies=copies, symbols=13)
    assert task.name == ("reverse" if reverse else "copy")
    assert task.vocab_size == len(SPECIAL) + 13
    assert task.shortest == 2 + copies
    batch = task.batch(30, task.length(24), seed=0, index=0)
    assert batch.input_ids.shape == (30, 25 + 24 * copies)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        given = ids[:24]
        assert ids[24] == GEN
        assert ids[25:] == (given[::-1] if reverse else given) * copies
        assert labels == [-100] * 25 + ids[25:]
    assert set(batch.input_ids.flatten().tolist()) == {GEN, *range(5, 18)}


STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 John moved to the office.
2 Where is John?\toffice\t1
"""


def test_read_questions(tmp_path: Path) -> None:
    path = tmp_path / "qa1_single_train.txt"
    path.write_text(STORY + "\n")
    first, second = "Mary moved to the bathroom.", "John went to the hallway."
    assert read_questions(path) == [
        Question((first, second), "Where is Mary?", "bathroom", (0,)),
        Question((first, second, "Daniel went back to the hallway."), "Where is Daniel?", "hallway", (2,)),
        Question(("John moved to the office.",), "Where is John?", "office", (0,)),
    ]
    assert babi_file(tmp_path, "qa1", "train") == path


def test_every_question_is_drawn(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"qa1_single_{split}.txt").write_text(STORY)
    task = text_task("memorize", babi=tmp_path)
    assert task.classes == ("bathroom", "hallway", "office")
    assert set(task.batch(64, 30, seed=0, index=0, split="test").labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1 Mary moved.\nno number\n", r"got 'no number' at .*broken\.txt:2"),
        ("1 Mary moved.\n2 Where is Mary?\tbathroom\n", r"broken\.txt:2"),
        ("1 Mary moved.\n2 Where is Mary?\tbathroom\t9\n", r"broken\.txt:2"),
        ("1 Mary moved.\n", r"broken\.txt', which holds no question"),
        ("", r"broken\.txt', which holds no question"),
        (b"1 \xff\xfe", r"path must be a text file of bAbI, got .*broken\.txt"),
        (None, r"path must be a text file of bAbI, got .*broken\.txt"),
    ],
)
def test_broken_facts(tmp_path: Path, text: str | bytes | None, problem: str) -> None:
    path = tmp_path / "broken.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=problem):
        read_questions(path)


@pytest.mark.parametrize("form", ["qa1", "qa2", "qa4"])
def test_generated_questions(form: str) -> None:
    made = {split: generate_questions(form, split, stories=300) for split in ("train", "test")}
    assert made["train"] == generate_questions(form, "train", stories=300)
    if form != "qa4":
        stories = {split: {q.facts for q in made[split] if len(q.facts) > 5} for split in made}
        assert not stories["train"] & stories["test"]
    vocabulary = Vocabulary.build([], 0, required=[f for q in made["train"] for f in (*q.facts, q.text)])
    for question in made["train"] + made["test"]:
        texts = [*(question.facts[i] for i in sorted(question.support)), question.text]
        # the supporting facts alone are enough
        assert answered(" ".join(vocabulary.decode(vocabulary.encode(text)) for text in texts)) == question.answer
        assert len(question.support) == (2 if form == "qa2" else 1)
        if form != "qa4":
            moves = [f.split() for f in question.facts if re.match(r"\w+ (went|moved|journeyed|travelled)", f)]
            for person in ("Mary", "John"):
                # nobody goes where they are
                assert all(a != b for a, b in pairwise([move[-1] for move in moves if move[0] == person]))


def test_sentences() -> None:
    told = (
        'Mr. Starbuck and Capt. Ahab.  "Is it\nso?" he asked. "Yes!"   Then: a 3.5 whale… came.\n\nCHAPTER 2\n\nCall me'
    )
    told = f"{told}. " + "One. " * 4
    parts = split_sentences(told)
    assert parts["train"] + parts["test"] == [
        "Mr. Starbuck and Capt. Ahab.",
        '"Is it so?"',
        "he asked.",
        '"Yes!"',
        "Then: a 3.5 whale… came.",
        "CHAPTER 2",
        "Call me.",
        *["One."] * 4,
    ]
    assert len(parts["test"]) == 2
    book = "Title\n*** START OF THE PROJECT GUTENBERG EBOOK MOBY ***\n\nCall me.\n\n{}\nlicence END\n"
    for end in ("*** END OF THE PROJECT GUTENBERG EBOOK MOBY ***", "End of Project Gutenberg's Moby"):
        assert strip_gutenberg(book.format(end)) == "Call me."
    assert strip_gutenberg("Call me at the end of Project Gutenberg.") == "Call me at the end of Project Gutenberg."


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("recall", {}, r"name must be one of memorize, detect, .*reverse, got 'recall'"),
        ("detect", {"babi": "nowhere"}, r"babi must be a folder that holds one file qa1_\*_train.txt, got 'nowhere'"),
        ("detect", {"book": "nowhere.txt"}, "book must be a text file in UTF-8, got 'nowhere.txt'"),
        ("detect", {"kind": "words"}, "kind must be 'class' or 'token', got 'words'"),
        ("qa2", {"max_facts": 1}, "max_facts must be at least [0-9]+, got 1"),
        ("detect", {"decoys": 1.0}, "decoys must be from 0 to below 1, got 1.0"),
        ("detect", {"vocabulary_size": -1}, "size must be at least 0, got -1"),
        ("detect", {"vocab_size": 9}, "vocab_size and gen_token must come with encode"),
        ("detect", {"encode": len}, "vocab_size must come with encode, got None"),
        ("detect", {"encode": len, "vocab_size": 9, "vocabulary": Vocabulary(SPECIAL)}, "vocabulary must be left out"),
        ("detect", {"encode": len, "vocab_size": 9}, "encode must give a sequence of token ids, got"),
        ("detect", {"encode": lambda text: [], "vocab_size": 9}, "encode must give tokens for the text's train part"),
        ("detect", {"encode": str.encode, "vocab_size": 9}, "encode must give a sequence of token ids, got"),
        (
            "detect",
            {"encode": lambda text: list(text.encode()), "vocab_size": 122},
            "vocab_size must exceed every token id, got 122 for ids from 0 to 122",
        ),
        ("retrieval", {"key_digits": 0}, "key_digits must be from 1 to 6, got 0"),
        ("retrieval", {"symbols": 11}, "symbols must be from 2 to 10, got 11"),
        ("retrieval", {"keys": 3}, "keys must come with rewrite=True, got 3 without"),
        ("retrieval", {"keys": 101, "rewrite": True}, "keys must be from 1 to 100, of 2 digits, got 101"),
        ("copy", {"copies": 0}, "copies must be at least 1, got 0"),
        ("reverse", {"symbols": 1}, "symbols must be at least 2, got 1"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_task(name, **options)


def test_other_bad_input(tmp_path: Path, tasks: dict[str, TextTask]) -> None:
    with pytest.raises(TypeError, match="depth"):
        make_task("detect", depth=0.5)
    with pytest.raises(ValueError, match=r"name must be one of memorize, .*, got 'copy'"):
        text_task("copy")
    for name in ("qa4_a_test.txt", "qa4_b_test.txt"):
        (tmp_path / name).write_text(STORY)
    with pytest.raises(ValueError, match=f"one file qa4_.*, got '{tmp_path}' with 2 of them"):
        babi_file(tmp_path, "qa4", "test")
    for form, split, stories, problem in (
        ("qa3", "train", 1, "form must be one of qa1, qa2, qa4, got 'qa3'"),
        ("qa1", "valid", 1, "split must be one of train, test, got 'valid'"),
        ("qa1", "train", 0, "stories must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            generate_questions(form, split, stories)
    with pytest.raises(ValueError, match="questions must hold some for the split 'test', got none"):
        TextTask("x", {"train": generate_questions("qa4", "train", 3)}, tasks["qa4"]._filler, len, vocab_size=9)
    for share in (0, 1):
        with pytest.raises(ValueError, match=f"held_out must be between 0 and 1, got {share}"):
            Filler(" ".join(BOOK), str.split, held_out=share)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text must hold at least 10 sentences, got 9"):
        split_sentences("One. " * 9)


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("memorize", {"length": 10}, "length must be at least 11 for the task memorize, got 10"),
        ("retrieval", {"length": 4}, r"length must be \(pairs \+ 1\) \* 4 .* got 4; take length\(pairs\), such as 8"),
        ("retrieval", {"length": 42}, "got 42; .* such as 40"),
        (
            "retrieval",
            {"length": 408},
            "length must hold at most 100 pairs, whose keys differ, got 101; raise key_digits",
        ),
        ("copy", {"length": 1}, r"length must be 2 \* symbols \+ 1 .* got 1; take length\(symbols\), such as 3"),
        ("reverse", {"length": 40}, "got 40; .* such as 39"),
        *[
            (name, arguments, problem)
            for name in ("detect", "retrieval", "copy")
            for arguments, problem in [
                ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
                ({"seed": -1}, "seed must be at least 0, got -1"),
                ({"index": -1}, "index must be at least 0, got -1"),
                ({"split": "valid"}, "split must be one of train, test, got 'valid'"),
            ]
        ],
    ],
)
def test_bad_batches(tasks: dict[str, TextTask], name: str, arguments: dict[str, Any], problem: str) -> None:
    task = tasks.get(name) or make_task(name)
    with pytest.raises(ValueError, match=problem):
        task.batch(**{"batch_size": 2, "length": 44, "seed": 0, "index": 0, **arguments})


@pytest.mark.skipif(not DATA.is_dir(), reason="needs bAbI's files and a book beside the repository")
@pytest.mark.parametrize("name", [*CLASS_TASKS, *TOKEN_TASKS])
def test_real_facts_in_a_real_book(name: str) -> None:
    options: dict[str, Any] = {"babi": DATA / "babi", "book": DATA / "books" / "moby_dick.txt"}
    task = text_task(name, **options)
    assert task.classes == (PLACES if name in CLASS_TASKS else ())
    for length in (task.shortest, 1501):
        for text, answer, _ in rows_of(task, length):
            assert answered(text) == answer
    if name == "qa2":
        short = text_task(name, max_facts=12, **options)
        assert short.shortest < task.shortest / 4
        for text, _, ids in rows_of(short, 200):
            assert len(FACT.findall(text)) <= 12
            assert len(ids) == 200
    (row,) = task.batch(1, 2_043_904, seed=0, index=0, split="test").input_ids
    assert row.shape == (2_043_904,)
