"""Sequences over several processes equal the same sequences in one: outputs, states, every gradient, and errors."""

import signal
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import sequence_ranks as ranks
import torch
import torch.nn.functional as F
from calls import GATES, apply, error, everything, golden, tensors, worst
from forks import fork
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from segattn import segment_attention
from segattn.infini.sharding import runs_of
from segattn.kernels import sequence_parallel
from segattn.kernels.state import MemoryState

WITH_MODELS = find_spec("transformers") is not None
with_models = pytest.mark.skipif(not WITH_MODELS, reason="transformers is not installed")
# gates, and so their gradients, are float32 in any model
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6}
PARAMETERS = ("dgate", "dmemory", "dnormalizer", "dsink_logits")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what every rank saw; the last one dies at the end."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = fork(ranks.SIZE, ranks.main, folder, WITH_MODELS, folder=folder, timeout=240)
    for rank, (code, said) in enumerate(ended):
        assert code == (-signal.SIGKILL if rank == ranks.SIZE - 1 else 0), f"rank {rank}: {said[-3000:]}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks.SIZE)]


def whole(call: Any, runs: tuple[int, ...]) -> dict[str, Tensor]:
    """Of all runs, in float64."""
    call = ranks.spread(call, runs)
    return everything(call, None, torch.float64)


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what the ranks hold as one: runs end to end, states once, gradients of what all share added up."""
    joined = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name in PARAMETERS:
            joined[name] = torch.stack(pieces).sum(0)
        elif name in ("memory", "normalizer"):
            assert all(torch.equal(pieces[0], piece) for piece in pieces)
            joined[name] = pieces[0]
        else:
            joined[name] = torch.cat(pieces, dim=2)
    return joined


def close(values: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-12) -> None:
    distance, where = worst(values, expected)
    assert distance < limit, f"{where}: {distance}"


@pytest.mark.parametrize("size", ranks.RUNS)
@pytest.mark.parametrize("name", [name for name in ranks.CASES if "frozen" not in name])
def test_ranks_equal_one_process(seen, name, size):
    parts = [seen[rank][f"{name}, {size}"] for rank in range(size)]
    close(together(parts), whole(ranks.CASES[name], ranks.RUNS[size]))


@pytest.mark.parametrize("size", ranks.RUNS)
@pytest.mark.parametrize("update", ["delta", "linear"])
def test_the_state_after_may_be_left_out(seen, update, size):
    """Nothing else changes, and nothing is differentiated but the outputs."""
    runs = ranks.RUNS[size]
    call = ranks.spread(ranks.CASES[update], runs)
    made = tensors(call, torch.float64)
    out = apply(call, made)["out"]
    found = torch.autograd.grad((out * ranks.directions({"out": out})["out"]).sum(), list(made.values()))
    expected = {f"d{name}": grad for name, grad in zip(made, found, strict=True)} | {"out": out.detach()}
    parts = [seen[rank][f"no state after, {update}, {size}"] for rank in range(size)]
    close(together(parts), expected)


class Alike(sequence_parallel.Ranks):
    """Ranks that all hold what this one does."""

    def gather(self, x: Tensor) -> Tensor:
        return x.detach().expand(self.size, *x.shape).clone()


def cost(update: str, size: int, want_state: bool) -> tuple[int, int]:
    """FLOPs of a forward pass on the second of so many ranks, and bytes that it keeps for the backward."""
    q, k, v = torch.randn(3, 1, 2, 10, 8, generator=torch.Generator().manual_seed(0)).unbind()
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    group = Alike(None, 1, size)
    options = {"update": update, "segment_len": 5, "gate": torch.zeros(2), "check_ranks": False}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), FlopCounterMode(display=False) as counter:
        output = sequence_parallel.sequence_parallel_attention(
            q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), group=group, want_state=want_state, **options
        )
    assert output.out.requires_grad
    return counter.get_total_flops(), sum(kept.values())


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_what_a_rank_keeps_does_not_grow_with_the_ranks(update):
    assert cost(update, 64, False) == cost(update, 4, False)
    # all maps are composed for the state after the last of them, and none is kept
    few, many = cost(update, 4, True), cost(update, 64, True)
    assert many[1] == few[1]
    assert many[0] - few[0] == (60 * 2 * 2 * 8**3 if update == "delta" else 0)


@pytest.mark.parametrize("size", ranks.RUNS)
@pytest.mark.parametrize("name", [name for name in ranks.CASES if "frozen" in name])
def test_a_rank_that_asks_for_no_gradient_still_passes_on_that_of_others(seen, name, size):
    runs, call = ranks.RUNS[size], ranks.CASES[name]
    expected = whole(call, runs)
    for rank in (rank for rank in range(size) if rank != 1):
        found = seen[rank][f"{name}, {size}"]
        for key in (f"d{token}" for token in ranks.TOKENS):
            assert error(found[key], ranks.mine(expected[key], runs, rank)) < 1e-12, key
    assert not any(x.any() for key, x in seen[1][f"{name}, {size}"].items() if key.startswith("d"))


@pytest.mark.parametrize("name", ranks.DTYPES)
def test_ranks_are_as_exact_in_every_dtype(seen, name):
    dtype = getattr(torch, name)
    call = ranks.spread(ranks.CASES["delta"], ranks.RUNS[4])
    values = together([seen[rank][name] for rank in range(4)])
    expected = golden(call, dtype)
    forward, _, gradients = GATES[dtype]
    for key in values:
        assert error(values[key], expected[key]) < (gradients if key.startswith("d") else forward), key


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", ranks.KERNELS)
def test_the_kernels_on_two_ranks(seen, name):
    call, runs = ranks.KERNELS[name], ranks.RUNS[2]
    values, expected = together([seen[rank][name] for rank in range(2)]), whole(call, runs)
    forward, _, gradients = GATES[torch.float32]
    for key in values:
        assert error(values[key], expected[key]) < (gradients if key.startswith("d") else forward), key


def test_the_map_of_a_run_in_one_pass_and_in_two(monkeypatch):
    """M and I go where the definition takes them, also where the kernels do not take both side by side."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 12, width, generator=generator) for width in (16, 24))
    start = MemoryState(torch.randn(1, 2, 16, 24, generator=generator), 50 * torch.rand(1, 2, 16, generator=generator))

    def map_by(backend: str, dtype: torch.dtype) -> Tensor:
        state = MemoryState(*(x.to(dtype) for x in start))
        return sequence_parallel._maps(k.to(dtype), v.to(dtype), state, 5, backend)

    # the matrices of a run, by hand: P = Π (I − A_s)
    product, z = torch.eye(16, dtype=torch.float64).expand(1, 2, 16, 16), start.normalizer.double()
    for segment in k.double()[:, :, :10].split(5, dim=2):
        features = torch.where(segment > 0, segment + 1, segment.exp())
        weight = 1 / (features @ z.unsqueeze(-1))
        product, z = product - features.mT @ (weight * features) @ product, z + features.sum(2)
    expected = map_by("torch", torch.float64)
    assert error(expected[..., 24:], product) < 1e-12
    backends = ["torch", *(["triton"] if find_spec("triton") else [])]
    for backend in backends:
        assert error(map_by(backend, torch.float32), expected) < 2e-6
    monkeypatch.setattr(sequence_parallel, "takes_width", lambda width: width <= 24)
    assert error(map_by(backends[-1], torch.float32), expected) < 2e-6


def test_a_group_of_one_is_the_plain_call_to_the_bit(seen):
    call, expected = ranks.CASES["delta"], whole(ranks.CASES["delta"], (13,))
    assert seen[0]["alone"].keys() == expected.keys()
    for name, value in seen[0]["alone"].items():
        assert torch.equal(value, expected[name]), (call, name)


def test_one_dimension_of_a_mesh(seen):
    """Two rows of two ranks, each row with a sequence of its own."""
    for row, seed in ((0, 7), (1, 8)):
        call = ranks.replace(ranks.CASES["delta"], seed=seed)
        close(together([seen[2 * row + column]["mesh"] for column in range(2)]), whole(call, ranks.RUNS[2]))


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "settings": "ValueError: segment_len must be the same on every rank, got 5 on rank 0 and 10 on rank 2",
        "update": "ValueError: update must be the same on every rank, got delta on rank 0 and linear on rank 2",
        "width": "ValueError: q's width must be the same on every rank, got 4 on rank 0 and 6 on rank 2",
        "dtype": "ValueError: q's dtype must be the same on every rank, got torch.float64 on rank 0 and torch.float32 "
        "on rank 2",
        "equal numbers": "not refused",
        "want_state": "ValueError: want_state must be the same on every rank, got True on rank 0 and False on rank 2",
        "sink_logits": "ValueError: sink_logits given must be the same on every rank, got False on rank 0 and True on "
        "rank 2",
        "alibi_slopes": "ValueError: alibi_slopes given must be the same on every rank, got True on rank 0 and False "
        "on rank 2",
        "autocast": "ValueError: autocast must be the same on every rank, got off on rank 0 and torch.bfloat16 on rank "
        "2",
        "state": "ValueError: state given must be the same on every rank, got False on rank 0 and True on rank 2",
        "part of a segment": "ValueError: every rank but the last must hold whole segments of 5 tokens, got 7 on rank "
        "1 of 4: split with segattn.shard_batch",
        "empty": "ValueError: every rank must hold tokens, got none on rank 2 of 4: use fewer ranks for this text",
        "after all that": "not refused",
    }.items(),
)
def test_what_one_rank_gets_wrong_is_refused_on_all_of_them(seen, name, said):
    for rank in range(ranks.SIZE):
        assert seen[rank]["refusals"][name] == said


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "own mistake": "ValueError: scale must be positive and finite, got -1.0",
        "not a tensor": "TypeError: v must be a tensor, got NoneType",
    }.items(),
)
def test_a_ranks_own_mistake_is_told_to_the_others(seen, name, said):
    for rank in range(ranks.SIZE):
        expected = said if rank == 2 else f"ValueError: rank 2 of 4 refused its call: {said}"
        assert seen[rank]["refusals"][name] == expected


def test_groups_that_are_none(seen):
    for rank in range(ranks.SIZE):
        assert seen[rank]["refusals"]["group"].startswith(
            "TypeError: group must be a torch.distributed.ProcessGroup or"
        )
        assert seen[rank]["refusals"]["spans"].startswith("ValueError: cu_seqlens and spans must be None")
        for name in ("lookback", "sinks"):
            assert seen[rank]["refusals"][name].startswith("ValueError: lookback and sinks must be 0")
    for rank in range(1, ranks.SIZE):
        assert seen[rank]["of others"] == "ValueError: group must hold this process, got one of others"


BACKENDS = ["torch", "reference", *(["triton"] if find_spec("triton") else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [5, 2])
def test_keys_that_write_nothing_get_zeros(backend, queries):
    """Not None, with which processes that add their gradients up would wait for each other."""
    q, k, v, written = torch.randn(4, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0)).unbind()
    gate = torch.zeros(2, requires_grad=True)

    def call(memory_k: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = segment_attention(
            q[:, :, -queries:], k, v, memory_k=memory_k, segment_len=8, gate=gate, backend=backend
        )
        return out, torch.autograd.grad(out.sum(), gate)[0]

    expected = call(written)
    for value in (1.0, float("nan"), float("inf")):
        filled = torch.full_like(k, value).requires_grad_()
        for found, wanted in zip(call(filled), expected, strict=True):
            assert torch.equal(found, wanted)
        out, _ = segment_attention(q[:, :, -queries:], k, v, memory_k=filled, segment_len=8, gate=gate, backend=backend)
        out.sum().backward()
        assert filled.grad is not None
        assert not filled.grad.any()


def test_every_rank_has_gradients_of_what_only_others_write(seen):
    layer = ranks.module()
    for step in range(2):
        out, _ = layer(ranks.text(18, step))
        out.square().sum().backward()
    for rank in range(ranks.SIZE):
        for name, parameter in layer.named_parameters():
            found = ranks.SIZE * seen[rank]["unwritten"][name]
            assert error(found, parameter.grad) < LIMITS[parameter.dtype], name


def test_a_run_compiles_as_one_graph(seen):
    for rank in range(ranks.SIZE):
        assert error(seen[rank]["compiled"]["compiled"], seen[rank]["compiled"]["plain"]) < 1e-14


@pytest.mark.parametrize("rope", ["segment", "sequence"])
def test_the_module_reads_two_pieces_over_ranks(seen, rope):
    layer, runs, even = ranks.module(rope=rope), ranks.RUNS[ranks.SIZE], (10, 5, 15, 10)
    first, second = ranks.text(sum(even), 5), ranks.text(sum(runs), 6)
    one, state = layer(first)
    two, state = layer(second, state)
    (one.square().sum() + two.square().sum()).backward()
    parts = [seen[rank][f"module, {rope}"] for rank in range(ranks.SIZE)]
    assert error(torch.cat([part["one"] for part in parts], 1), one) < 1e-12
    assert error(torch.cat([part["two"] for part in parts], 1), two) < 1e-12
    assert error(parts[0]["memory"], state.memory.memory) < 1e-12
    assert error(parts[-1]["keys"], state.keys) < 1e-12
    assert [part["position"].item() for part in parts] == [state.position] * ranks.SIZE
    for name, parameter in layer.named_parameters():
        assert error(sum(part[name] for part in parts), parameter.grad) < LIMITS[parameter.dtype], name


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "shapes": "ValueError: shift_labels must be [B, t] as logits [B, t, vocabulary], got [2, 4] and [2, 5, 9]",
        "kinds": "TypeError: shift_labels must be an int32 or int64 tensor, got torch.float32",
        "vocabulary": "ValueError: shift_labels must be -100 or below the vocabulary of 9, got 9 to 9",
        "logits": "TypeError: logits must be bfloat16, float16, float32 or float64, got torch.int64",
        "gradients": "ValueError: gradients must be one of 'averaged', 'summed', got 'both'",
        "memory's dtype": "TypeError: state.memory must be torch.float64, got torch.float32",
        "memory's shape": "ValueError: state.memory must have shape [B, G, K, V] = [2, 2, 6, 6], got [2, 2, 6, 5]",
        "values": "ValueError: state.values must have shape that of its keys = [2, 2, 0, 6], got [1, 2, 0, 6]",
    }.items(),
)
def test_one_ranks_wrong_loss_or_state_is_told_to_the_others(seen, name, said):
    for rank in range(ranks.SIZE):
        found = {**seen[rank]["loss refusals"], **seen[rank]["state refusals"]}[name]
        assert found == (said if rank == 2 else f"ValueError: rank 2 of 4 refused its call: {said}")


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "other gradients": "gradients must be the same on every rank, got averaged on rank 0 and summed on rank 2",
        "keys' dtype": "the dtype of the state's keys must be the same on every rank, got torch.float64 on rank 0 and "
        "torch.float32 on rank 2",
        "no state": "state given must be the same on every rank, got True on rank 0 and False on rank 2",
        "write_bias": "write_bias given must be the same on every rank, got True on rank 0 and False on rank 2",
        "backend": "backend must be the same on every rank, got None on rank 0 and reference on rank 2",
        "qk_norm": "qk_norm must be the same on every rank, got False on rank 0 and True on rank 2",
    }.items(),
)
def test_losses_modules_and_states_must_be_alike(seen, name, said):
    for rank in range(ranks.SIZE):
        assert {**seen[rank]["loss refusals"], **seen[rank]["state refusals"]}[name] == f"ValueError: {said}"


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "spans": "spans and cu_seqlens must be None with a group",
        "tail": "state must end with a whole segment for a group, got 2 more tokens",
        "window": "lookback and sinks must be 0 with a group, got 1 and 2, for which ranks would have to see each "
        "other's tokens: give each rank whole texts, without a group",
        "rank's part": "every rank but the last must hold whole segments of 5 tokens, got 7 on rank 0 of 4",
        "names": "batch may hold input_ids, labels and attention_mask, got spans too",
        "ids": "batch['input_ids'] must be integers [B, T], got torch.float32 [2, 30]",
        "labels": "batch['labels'] must be of the shape of input_ids, [2, 30], got [2, 29]",
        "left": "batch['attention_mask'] must have its zeros after each text's end",
        "short": "a text must have a segment for every rank, got 3 of 10 tokens for 4 ranks",
        "text": "batch['input_ids'] must be the same on every rank, got [2, 30] of digest ",
        "one rank's ids": "batch['input_ids'] must be integers [B, T], got torch.float32 [2, 30]",
        "segment_len": "segment_len must be the same on every rank, got 5 on rank 0 and 6 on rank 2",
        "gradients": "gradients must be one of 'averaged', 'summed', got 'both'",
        "shapes": "shift_labels must be [B, t] as logits [B, t, vocabulary], got [2, 4] and [2, 5, 9]",
        "nothing": "shift_labels must hold a token to predict on some rank, got none but -100",
    }.items(),
)
def test_modules_batches_and_losses_refuse_on_every_rank(seen, name, said):
    for rank in range(ranks.SIZE):
        assert said in seen[rank]["module refusals"][name]


def test_the_module_tells_other_ranks_of_a_wrong_width(seen):
    for rank in range(ranks.SIZE):
        said = seen[rank]["module refusals"]["width"]
        assert "x must have shape [B, T, 12], got [2, 10, 11]" in said
        assert ("rank 1 of 4 refused its call" in said) == (rank != 1)


def test_a_batch_is_cut_into_runs_whose_last_tokens_predict_the_next_runs_first(seen):
    batch, shards = ranks.labelled(), [seen[rank]["shard"] for rank in range(ranks.SIZE)]
    assert [shard["input_ids"].shape[1] for shard in shards] == [16, 16, 16, 9]
    joined = {name: torch.cat([shard[name] for shard in shards], 1) for name in shards[0]}
    assert torch.equal(joined.pop("position_ids"), torch.arange(ranks.LENGTH).expand(2, -1))
    shifted = joined.pop("shift_labels")
    assert torch.equal(shifted[:, :-1], batch.pop("labels")[:, 1:])
    assert (shifted[:, -1] == -100).all()
    assert joined.keys() == batch.keys()
    for name, x in batch.items():
        assert torch.equal(joined[name], x)


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the whole: as transformers has it, which computes it in float32."""
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@with_models
@pytest.mark.parametrize("kind", ranks.MODELS)
def test_a_model_reads_padded_texts_over_ranks(seen, kind):
    model = ranks.converted(**ranks.MODELS[kind])
    loss = loss_of(model, ranks.padded())
    loss.backward()
    parts = [seen[rank][f"model, {kind}"] for rank in range(ranks.SIZE)]
    for part in parts:
        assert error(part["loss"], loss) < 1e-12
    for name, parameter in model.named_parameters():
        assert error(sum(part[name] for part in parts), parameter.grad) < LIMITS[parameter.dtype], name


@with_models
def test_sharded_parameters_over_a_mesh_of_batches_and_runs(seen):
    model = ranks.converted(torch.float32)
    loss = loss_of(model, {"input_ids": ranks.texts(1)})
    loss.backward()
    for rank in range(ranks.SIZE):
        assert error(seen[rank]["sharded"]["loss"], loss) < 1e-6
        for name, parameter in model.named_parameters():
            assert error(seen[rank]["sharded"][name], parameter.grad) < 1e-4, name


@with_models
def test_twenty_steps_of_four_ranks_and_of_one_process(seen):
    model = ranks.converted(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(ranks.STEPS):
        loss = loss_of(model, {"input_ids": ranks.texts(step)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for rank in range(ranks.SIZE):
        assert (seen[rank]["trained"] - torch.tensor(losses).double()).abs().max() < 1e-5


@with_models
def test_models_refuse_what_would_not_be_the_whole_text(seen):
    expected = {
        "cache": "past_key_values and use_cache must be left out in sequence_parallel",
        "use_cache": "past_key_values and use_cache must be left out in sequence_parallel",
        "packed": "position_ids must count by ones in sequence_parallel",
        "padding between": "attention_mask must have zeros after a text's end only, got a text that goes on",
        "batch": "the batch size must be the same on every rank, got 2 on rank 0 and 1 on rank 3",
        "dimensions": "input_ids must be [B, T] of at least one token, got [16]",
        "part of a segment": "every rank but the last must hold whole segments of 8 tokens, got 13 on rank 0",
        "not all converted": "model must have every layer converted, as others see the whole text: layers [0] are not",
        "mesh": "group must be one dimension of a mesh, such as mesh['sp'], got 2: ('dp', 'sp')",
        "context_parallel": "a converted model's text must not be cut by torch.distributed",
        "context_parallel, module": "x, a run of a text over several processes, must not be cut by torch.distributed",
        "context_parallel, operation": "a sequence over several processes must not be cut by torch.distributed",
        "labels": "labels must be left out in sequence_parallel, as each rank would see its own alone: give the logits "
        "and shard_batch's shift_labels to segattn.mean_loss",
        "autocast": "autocast must be the same on every rank, got off on rank 0 and torch.bfloat16 on rank 3",
    }
    for rank in range(ranks.SIZE):
        said = seen[rank]["model refusals"]
        for name, message in expected.items():
            assert message in said[name], said[name]
        assert "attention_mask must have zeros after a text's end only" in said["padding on the left"]
        assert said["after labels"] == "not refused"
        assert ("is read within segattn.sequence_parallel" in said["forgotten"]) == (rank > 0)


@with_models
@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_accelerates_own_parallelism_is_refused(monkeypatch, name):
    state = pytest.importorskip("accelerate.state")
    model, ids = ranks.converted(), ranks.texts(0)
    expected = model(input_ids=ids).logits
    one = SimpleNamespace(cp_size=1, sp_size=1)
    monkeypatch.setitem(state.AcceleratorState._shared_state, "parallelism_config", one)
    assert torch.equal(model(input_ids=ids).logits, expected)
    setattr(one, name, 2)
    with pytest.raises(RuntimeError, match=rf"ParallelismConfig\({name}=2\): turn it off"):
        model(input_ids=ids)


def test_a_rank_that_does_not_answer_or_dies_ends_the_others(seen):
    for rank in range(ranks.SIZE - 1):
        for fault in ("stopped", "killed"):
            said, seconds = seen[rank]["faults"][fault]
            assert said.startswith("RuntimeError")
            # by the groups' own patience of seconds, also on a busy machine; the process group's is 120
            assert seconds < 60


def test_runs_are_whole_segments_as_even_as_they_come():
    assert runs_of(57, 4, 8) == (16, 16, 16, 9)
    assert runs_of(40, 4, 8) == (16, 8, 8, 8)
    assert runs_of(9, 2, 8) == (8, 1)
    for time in range(8 * 3 + 1, 90):
        runs = runs_of(time, 4, 8)
        assert sum(runs) == time
        assert all(run % 8 == 0 for run in runs[:3])
        assert max(runs) - min(runs[:3]) <= 8
        assert runs[3] > 0
    with pytest.raises(ValueError, match="must have a segment for every rank, got 3 of 8 tokens for 4 ranks"):
        runs_of(24, 4, 8)
