"""Recurrent memories are compared as like with like: who computes something else is refused; texts are read whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("pytest_benchmark", reason="needs segattn[bench]")
pytest.importorskip("recurrent_memory_transformer_pytorch", reason="needs segattn[bench]")

from processes import python

from segattn.bench.experiments.lengths import experiment as lengths
from segattn.bench.experiments.lengths.experiment import READERS, Setup, main, read_text, summary
from segattn.bench.report.records import read
from segattn.bench.speed import bench_recurrent_memory
from segattn.bench.speed import recurrent_generation as generation
from segattn.bench.speed.associative_loop import AssociativeLoop
from segattn.bench.speed.fixture import Bench
from segattn.bench.speed.measure import kept_bytes
from segattn.bench.speed.recurrent import (
    DIRECTIONS,
    GROUPS,
    PEER,
    Entry,
    RecurrentPeer,
    check,
    loop_llama,
    loop_peer,
    ours_associative,
    ours_llama,
    rmt_pytorch,
    step,
)
from segattn.bench.speed.recurrent_models import (
    PlainLoop,
    Sizes,
    associative,
    llama,
    peer_transformer,
    plain_llama,
    recurrent,
    trained,
    visible,
)
from segattn.bench.speed.rows import Row

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Sizes(B=2, S=3, L=9, m=3, layers=2, heads=2, width=20)
CASES = [(group, name) for group, entries in GROUPS.items() for name, entry in entries.items() if not entry.needs_gpu]


@pytest.mark.parametrize(("group", "name"), CASES)
def test_peers_are_as_defined(group: str, name: str) -> None:
    entry = GROUPS[group][name]
    assert check(entry, SMALL, CPU) <= entry.tolerance


@pytest.mark.parametrize(("group", "name"), CASES)
def test_a_group_has_the_same_weights(group: str, name: str) -> None:
    if (group, name) == ("Llama", PEER):
        return
    wanted = next(iter(GROUPS[group].values())).make(SMALL, CPU).parameters
    found = GROUPS[group][name].make(SMALL, CPU).parameters
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_the_mask_is_the_table() -> None:
    expected = ["110000", "110000", "111000", "111100", "111111", "111111"]
    assert ["".join(str(int(x)) for x in row) for row in visible(6, 2, CPU)[0, 0]] == expected


def changed_loop(change: Callable[[PlainLoop], None]) -> Callable[[Sizes, torch.device], RecurrentPeer]:
    def make(sizes: Sizes, device: torch.device) -> RecurrentPeer:
        loop = plain_llama(sizes, device)
        change(loop)
        return RecurrentPeer(loop.loss, loop.read, loop.parameters)

    return make


def forgets(loop: PlainLoop) -> None:
    whole = loop.segments
    loop.segments = lambda ids: (  # type: ignore[method-assign]
        pair for segment in ids.split(loop.segment_len, 1) for pair in whole(segment)
    )


def sees_no_block(loop: PlainLoop) -> None:
    loop.mask = lambda time, m, device: visible(time, 0, device)  # type: ignore[assignment]


def sees_ahead(loop: PlainLoop) -> None:
    loop.mask = lambda time, m, device: visible(time, m, device) | True  # type: ignore[assignment]


def counts_each_token(loop: PlainLoop) -> None:
    whole = loop.loss
    loop.loss = lambda ids: whole(ids) * (1 + 1e-4)  # type: ignore[method-assign]


def breaks_down(loop: PlainLoop) -> None:
    whole = loop.read
    loop.read = lambda ids: [x * float("nan") for x in whole(ids)]  # type: ignore[method-assign]


def keeps_one_row(loop: PlainLoop) -> None:
    whole = loop.read
    loop.read = lambda ids: [x[:1] for x in whole(ids)]  # type: ignore[method-assign]


WRONG = [forgets, sees_no_block, sees_ahead, counts_each_token, breaks_down, keeps_one_row]


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_peer_is_found(change: Callable[[PlainLoop], None]) -> None:
    assert check(Entry(changed_loop(lambda loop: None), loop_llama), SMALL, CPU) == 0
    assert not check(Entry(changed_loop(change), loop_llama), SMALL, CPU) <= 5e-5


def test_truncated_gradients_are_found() -> None:
    def truncated(sizes: Sizes, device: torch.device) -> RecurrentPeer:
        model = llama(sizes, device)
        module = recurrent(sizes, device, model, bptt=1)
        return RecurrentPeer(
            lambda ids: module(ids, labels=ids).loss,
            lambda ids: [module(ids, output_logits=False).state.memory],
            [module.memory, *trained(model)],
        )

    assert check(Entry(truncated, loop_llama), SMALL, CPU) > 1e-3


def test_the_peer_by_its_defaults_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its write rows are then the same in every segment, not the memory."""

    def fixed(sizes: Sizes, device: torch.device) -> Any:
        transformer = peer_transformer(sizes, device)
        transformer.add_write_to_next_write_mem = False
        return transformer

    entry = Entry(rmt_pytorch, loop_peer)
    assert check(entry, SMALL, CPU) < entry.tolerance
    monkeypatch.setattr("segattn.bench.speed.recurrent.peer_transformer", fixed)
    assert check(entry, SMALL, CPU) > 1e-3


def test_an_associative_memory_that_returns_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(sizes: Sizes, device: torch.device, schedule: str = "vertical") -> Any:
        module = associative(sizes, device, schedule)
        for memory in module.memories.values():
            torch.nn.init.zeros_(memory.value.weight)
        return module

    definition = GROUPS["Llama, associative"]["plain loop"].make(SMALL, CPU)
    monkeypatch.setattr("segattn.bench.speed.recurrent.associative", empty)
    entry = Entry(lambda sizes, device: ours_associative(sizes, device, schedule="diagonal"), lambda *_: definition)
    assert check(entry, SMALL, CPU) > 1e-2


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"Llama": {"wrong": Entry(changed_loop(forgets), loop_llama)}}
    monkeypatch.setattr(bench_recurrent_memory, "GROUPS", wrong)
    benchmark: Any = SimpleNamespace(group=None, extra_info={})
    rows: list[Row] = []
    bench = Bench(benchmark, rows.append, CPU, 3, 1.0)
    with pytest.raises(pytest.fail.Exception, match="wrong is wrong, and is not timed: relative error"):
        bench_recurrent_memory.test_step(SMALL, DIRECTIONS[0], "Llama", "wrong", bench)
    (row,) = rows
    assert row.extra_info() == {
        "provider": "wrong",
        "baseline": "wrong",
        "case": dataclasses.asdict(SMALL) | {"dtype": "float32"},
        "direction": "reading",
        "group": "B2-S3-L9-m3-N2-H2-d20, Llama, reading",
        "status": "wrong",
        "reason": row.reason,
    }


def test_steps_do_what_their_names_say() -> None:
    peer = ours_llama(SMALL, CPU)
    seen = []

    def note(name: str, value: Any) -> Any:
        seen.append((name, torch.is_grad_enabled()))
        return value

    watched = peer._replace(
        loss=lambda ids: note("loss", peer.loss(ids)), read=lambda ids: note("read", peer.read(ids))
    )
    for direction in DIRECTIONS:
        step(watched, SMALL.ids(CPU), direction)()
    assert seen == [("read", False), ("loss", True)]


@pytest.mark.parametrize("name", generation.WRITERS)
def test_writers_go_on_with_the_whole_text(name: str) -> None:
    text, opened = generation.texts(SMALL, 3, CPU)
    assert (text.shape, opened.shape) == ((2, 27), (2, 4))
    entry = generation.WRITERS[name]
    writer = entry.make(SMALL, text, opened, 12)
    new = writer.write()
    assert new.shape == (2, 12)
    assert torch.equal(new, writer.write())
    assert generation.check(entry.definition(SMALL, CPU), text, opened, new) <= generation.TOLERANCE
    # other text before, other tokens
    other = entry.make(SMALL, text.flip(1), opened, 12).write()
    assert not torch.equal(new, other)
    assert generation.check(entry.definition(SMALL, CPU), text, opened, other) > generation.TOLERANCE


def test_bytes_kept_of_a_text() -> None:
    text, opened = generation.texts(SMALL, 4, CPU)
    found = {name: entry.make(SMALL, text, opened, 1).kept_bytes for name, entry in generation.WRITERS.items()}
    memory, features = 2 * 3 * 20 * 4, 2 * 3 * 10
    assert found == {
        generation.BASELINE: 2 * 2 * 2 * 36 * 20 * 4,
        "segattn": memory,
        "segattn, associative": 2 * 2 * (features * 20 + features) * 4,
        PEER: memory,
    }


def test_the_whole_path(tmp_path: Path) -> None:
    """A JSON with a ratio for every peer that was asked for, and the table."""
    out = tmp_path / "result.json"
    options = ["--workload=1,2,8,2,1,1,8", "--rounds=2", f"--benchmark-json={out}", "-k", "reading or -2-"]
    suite = "bench/speed/bench_recurrent_memory.py"
    done = python("-m", "pytest", "-q", suite, *options, "-p", "no:cacheprovider", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    results = document["benchmarks"]
    # the report reads it
    skipped = {(x.peer, x.status, x.reason) for x in read(out).rows if x.ratio is None}
    assert skipped == {("segattn, compiled", "skipped", "needs a GPU")}
    found = {(x["group"].split(", ", 1)[1], x["extra_info"]["provider"]) for x in results}
    assert found >= {(f"{group}, reading", name) for group, name in CASES}
    assert found >= {("generation after 2 segments (16 tokens)", name) for name in generation.WRITERS}
    for result in results:
        low, high = result["extra_info"]["ratio_fifths"]
        assert 0 < low <= result["extra_info"]["ratio"] <= high
        assert result["extra_info"]["tokens_per_second"] > 0
        assert result["extra_info"]["errors"]["out"] <= 1e-4
    assert f"ratio to {generation.BASELINE}" in done.stdout


@pytest.mark.parametrize("sizes", ["1,2,3", "1,2,8,2,1,3,8", "1,2,8,9,1,1,8", "1,2,8,2,1,1,0", "1,2,8,x,1,1,8", ""])
def test_bad_sizes_are_named(sizes: str) -> None:
    with pytest.raises(ValueError, match=f"sizes must be seven positive integers .*, got '{sizes}'"):
        Sizes.parse(sizes)
    assert Sizes.parse("1,2,8,2,1,3,12") == Sizes(B=1, S=2, L=8, m=2, layers=1, heads=3, width=12)


def test_texts_are_read_from_their_beginning_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, Any]] = []
    progress: list[int] = []

    def reader(ids: torch.Tensor, kept: Any) -> Any:
        calls.append((ids.shape[1], kept))
        return (kept or 0) + ids.shape[1] // SMALL.L

    clock = iter(range(100))
    monkeypatch.setattr(lengths, "PIECE", 2)
    monkeypatch.setattr("segattn.bench.speed.timing.time.perf_counter", lambda: next(clock))
    setup = Setup(SMALL, "cpu", lengths=(5,), least=10)
    found = read_text(reader, setup, 5, progress.append)
    # twice, and a piece more for the peak
    assert calls == [(18, None), (18, 2), (9, 4)] * 2 + [(9, 5)]
    assert progress == [2, 2, 1] * 2
    assert found["seconds_per_token"] == 6 / (2 * 5 * 9 * 2)


@pytest.mark.parametrize("name", READERS)
def test_what_readers_keep_is_that_of_the_text(name: str) -> None:
    ids = SMALL.ids(CPU, 4 * SMALL.L)
    with torch.no_grad():
        reader, kept = READERS[name](SMALL, CPU), None
        for piece in ids.split(2 * SMALL.L, 1):
            kept = reader(piece, kept)
        if name == "RMT":
            found = [kept.memory]
            expected = plain_llama(SMALL, CPU).read(ids)
        elif name == "ARMT":
            found = [x for memory in kept.memories for x in memory]
            expected = AssociativeLoop(associative(SMALL, CPU)).read(ids)
        else:
            found = [x for layer in kept.layers for x in (layer.keys, layer.values)]
            cache = llama(SMALL, CPU)(ids, use_cache=True).past_key_values
            expected = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert kept_bytes(kept) == sum(x.numel() * 4 for x in expected)


def test_summary_takes_ratios_within_a_round() -> None:
    setup = dataclasses.replace(Setup(SMALL, "cpu", lengths=(1, 4)), full_up_to=1)
    seconds = {("RMT", 1): [1.0, 2.0, 4.0], ("RMT", 4): [1.5, 3.0, 4.0], ("full attention", 1): [7.0]}
    readings = [
        {"reader": name, "segments": n, "round": i, "seconds_per_token": x, "kept_bytes": 10 * n, "peak_bytes": 20 * n}
        for (name, n), values in seconds.items()
        for i, x in enumerate(values)
    ]
    rows = {(x["reader"], x["segments"]): x for x in summary(setup, readings)}
    assert list(rows) == [("RMT", 1), ("full attention", 1), ("RMT", 4)]
    assert rows["RMT", 4] == {
        "reader": "RMT",
        "segments": 4,
        "tokens": 36,
        "rounds": 3,
        "ratio_to_shortest": 1.5,
        "seconds_per_token": 3.0,
        "kept_bytes": 40,
        "peak_bytes": 80,
    }


def test_lengths_are_measured_once_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lengths.json"
    sizes = ["--sizes", "1,1,8,2,1,1,8", "--least", "1"]
    command = ["--out", str(out), *sizes, "--lengths", "1", "9", "17", "--full-up-to", "9"]
    assert main([*command, "--rounds", "1"]) == 0
    cells = [("RMT", 1), ("ARMT", 1), ("full attention", 1), ("RMT", 9), ("ARMT", 9), ("full attention", 9)]
    cells += [("RMT", 17), ("ARMT", 17)]
    first = json.loads(out.read_text())
    assert [(x["reader"], x["segments"]) for x in first["readings"]] == cells
    kept = {(x["reader"], x["segments"]): x["kept_bytes"] for x in first["readings"]}
    assert kept["RMT", 1] == kept["RMT", 9] == kept["RMT", 17] == 2 * 8 * 4
    assert kept["ARMT", 1] == kept["ARMT", 9] == kept["ARMT", 17]
    assert kept["full attention", 9] == 9 * kept["full attention", 1]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("µs a token") == 8
    assert main([*command, "--rounds", "2"]) == 0
    assert capsys.readouterr().out.count("µs a token") == 8
    second = json.loads(out.read_text())
    assert second["readings"][:8] == first["readings"]
    assert [x["rounds"] for x in second["summary"]] == [2] * 8
    assert main(["--out", str(out), *sizes, "--lengths", "1", "9"]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_what_was_read_outlives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(sizes: Sizes, device: torch.device) -> Callable[[torch.Tensor, Any], Any]:
        warm = iter([False])

        def read(ids: torch.Tensor, kept: Any) -> Any:
            if next(warm, True):
                raise KeyboardInterrupt
            return None

        return read

    out = tmp_path / "lengths.json"
    command = ["--out", str(out), "--sizes", "1,1,8,2,1,1,8", "--least", "1", "--lengths", "1", "2", "--rounds", "1"]
    with monkeypatch.context() as patch:
        patch.setitem(READERS, "ARMT", stops)
        assert main(command) == 130
    assert "goes on after the last whole run" in capsys.readouterr().err
    assert [x["reader"] for x in json.loads(out.read_text())["readings"]] == ["RMT"]
    assert main(command) == 0
    assert len(json.loads(out.read_text())["readings"]) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lengths", "8", "4"], "lengths must be positive and go up, got [8, 4]"),
        (["--lengths", "0", "4"], "lengths must be positive and go up, got [0, 4]"),
        (["--sizes", "1,2"], "sizes must be seven positive integers"),
        (["--least", "0"], "least must be at least 1, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(
    changes: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "lengths.json"), *changes]) == 2
    assert message in capsys.readouterr().err
