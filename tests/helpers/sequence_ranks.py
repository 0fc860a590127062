"""Run everything that four processes do together on shared sequences; every rank writes its results to a file."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from calls import tensors
from torch import Tensor

from segattn import InfiniAttention, MemoryState, mean_loss, sequence_parallel_attention, shard_batch
from segattn.kernels.check.calls import Call, directions

SIZE = 4
PATIENCE = 4
L = 5
TOKENS = ("q", "k", "v", "memory_q", "memory_k")
# tokens of each rank, for groups of two, three and four
RUNS = {2: (10, 8), 3: (5, 15, 5), 4: (10, 5, 15, 3)}
CASES = {
    "delta": Call(),
    "linear": Call(update="linear"),
    "no state": Call(with_state=False),
    "linear, no state": Call(update="linear", with_state=False, own_memory_inputs=False),
    "one kv head, wide values": Call(H=3, G=1, V=9, own_memory_inputs=False),
    "gated when empty": Call(empty_memory="gated", with_state=False, V=3),
    "bidirectional, softcap": Call(causal=False, softcap=1.5, scale=1.0),
    "local": Call(gated=False),
    "sink logits, ALiBi": Call(sink_logits=True, alibi=True),
    "sink logits, ALiBi, linear": Call(sink_logits=True, alibi=True, update="linear", causal=False),
    "sink logits, ALiBi, local": Call(sink_logits=True, alibi=True, gated=False),
    "frozen rank": Call(seed=1),
    "frozen rank, linear": Call(seed=1, update="linear"),
}
KERNELS = {
    "triton": Call(B=1, H=1, G=1, K=16, V=24, own_memory_inputs=False),
    "triton, linear": Call(B=1, H=1, G=1, K=16, V=16, update="linear", own_memory_inputs=False),
    "triton, sink logits, ALiBi": Call(
        B=1, H=2, G=1, K=16, V=16, sink_logits=True, alibi=True, own_memory_inputs=False
    ),
}
# arguments of `converted`; GPT-OSS has learnt sink logits
MODELS: dict[str, dict[str, Any]] = {
    "delta": {},
    "linear": {"update": "linear"},
    "checkpointed": {},
    "sink logits": {"name": "gpt_oss"},
}
DTYPES = ("float32", "bfloat16", "float16")
WIDTH = 12
STEPS = 20
LENGTH = 57


def spread(call: Call, runs: tuple[int, ...]) -> Call:
    """Return the call over the tokens of all ranks."""
    return replace(call, segment_len=L, Tq=sum(runs), Tk=sum(runs))


def mine(x: Tensor, runs: tuple[int, ...], rank: int, dim: int = 2) -> Tensor:
    """Return a rank's part of a tensor that spans all of them."""
    return x.narrow(dim, sum(runs[:rank]), runs[rank])


def attend(
    call: Call, runs: tuple[int, ...], group: Any, rank: int, dtype: torch.dtype, **changed: Any
) -> dict[str, Tensor]:
    """Return outputs and gradients of a rank's run; each rank projects its share of the states."""
    whole = tensors(spread(call, runs), dtype)
    made = {name: mine(x, runs, rank) if name in TOKENS else x for name, x in whole.items()}
    frozen = "frozen" in changed and rank == 1
    changed.pop("frozen", None)
    made = {name: x.detach().clone().requires_grad_(not frozen) for name, x in made.items()}
    inputs = dict(made)
    state = MemoryState(inputs.pop("memory"), inputs.pop("normalizer")) if "memory" in inputs else None
    names = ("update", "empty_memory", "causal", "scale", "softcap")
    options: dict[str, Any] = {"segment_len": L, "alibi_slopes": call.slopes(made["q"])}
    options |= {name: getattr(call, name) for name in names} | changed
    out, after = sequence_parallel_attention(**inputs, state=state, group=group, **options)
    outputs = {"out": out} if after is None else {"out": out, "memory": after.memory, "normalizer": after.normalizer}
    if not changed.get("want_state", True):
        assert after is None
    shapes = {
        name: x.new_empty(*x.shape[:2], sum(runs), x.shape[3]) if name == "out" else x for name, x in outputs.items()
    }
    loss = out.new_zeros(())
    for name, direction in directions(shapes).items():
        share = (rank + 1) / sum(range(1, len(runs) + 1))
        part = mine(direction, runs, rank) if name == "out" else direction * share
        loss = loss + (outputs[name] * part).sum(dtype=torch.float64)
    if loss.requires_grad:
        loss.backward()
    found = {f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in made.items()}
    return {name: x.detach() for name, x in outputs.items()} | found


def refusal(call: Callable[[], object]) -> str:
    """Return the error that a call raises, as text."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refusals(group: Any, rank: int) -> dict[str, str]:
    """Return the errors of calls that one rank or all get wrong; none may wait for ever, or leave a rank behind."""

    def call(time: int = 10, width: int = 4, **changed: Any) -> Callable[[], object]:
        x = torch.randn(1, 2, time, width, dtype=changed.pop("dtype", torch.float64))
        options = {"v": x, "segment_len": L, "gate": x.new_zeros(2), "group": group} | changed
        return lambda: sequence_parallel_attention(x, x, **options)

    odd = rank == 2
    state = MemoryState.zeros(1, 2, 4, 4, dtype=torch.float64) if odd else None
    calls = {
        "settings": call(segment_len=10 if odd else 5),
        "update": call(update="linear" if odd else "delta"),
        "width": call(width=6 if odd else 4),
        "dtype": call(dtype=torch.float32 if odd else torch.float64),
        "state": call(state=state),
        "own mistake": call(scale=-1.0 if odd else None),
        "equal numbers": call(scale=1 if odd else 1.0, softcap=2.0 if odd else 2),
        "want_state": call(want_state=not odd),
        "sink_logits": call(sink_logits=torch.zeros(2) if odd else None),
        "alibi_slopes": call(alibi_slopes=None if odd else torch.ones(2)),
        "not a tensor": call(v=None) if odd else call(),
        "part of a segment": call(time=7 if rank == 1 else 10),
        "empty": call(time=0 if odd else 10),
        "spans": call(spans=torch.tensor([[0, 10]])),
        "lookback": call(lookback=1),
        "sinks": call(sinks=2),
        "group": call(group="sp"),
    }
    found = {name: refusal(made) for name, made in calls.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=odd):
        found["autocast"] = refusal(call())
    found["after all that"] = refusal(call())
    return found


def module(**changed: Any) -> InfiniAttention:
    torch.manual_seed(0)
    return InfiniAttention(WIDTH, 4, segment_len=L, kv_heads=2, head_width=6, write_bias=-0.5, **changed).double()


def text(time: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, time, WIDTH, generator=generator, dtype=torch.float64)


def infini(group: Any, rank: int, rope: str) -> dict[str, Tensor]:
    """Pass two pieces of a text through the module, the second from the state that the first one left."""
    layer, runs = module(rope=rope), RUNS[SIZE]
    even = (10, 5, 15, 10)
    first, second = text(sum(even), 5), text(sum(runs), 6)
    one, state = layer(mine(first, even, rank, 1), group=group)
    two, state = layer(mine(second, runs, rank, 1), state, group=group)
    (one.square().sum() + two.square().sum()).backward()
    found = {
        "one": one.detach(),
        "two": two.detach(),
        "memory": state.memory.memory.detach(),
        "keys": state.keys.detach(),
    }
    found["position"] = torch.tensor(state.position)
    return found | {name: parameter.grad for name, parameter in layer.named_parameters()}


def unwritten(group: Any, rank: int) -> dict[str, Tensor]:
    """Return the gradients that DDP averages over two steps, where the last rank has no whole segment to write."""
    from torch.nn.parallel import DistributedDataParallel

    runs = (5, 5, 5, 3)
    layer = DistributedDataParallel(module(), process_group=group)
    for step in range(2):
        out, _ = layer(mine(text(sum(runs), step), runs, rank, 1), group=group)
        out.square().sum().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in layer.named_parameters()}


def compiled(group: Any, rank: int) -> dict[str, Tensor]:
    """Return outputs and gradients of a run in one graph, and of the same without compiling."""

    def call(x: Tensor) -> Tensor:
        options = {"group": group, "segment_len": L, "gate": x.new_zeros(2), "want_state": False, "check_ranks": False}
        return sequence_parallel_attention(x, x, x, **options).out

    found = {}
    for name, run in {"plain": call, "compiled": torch.compile(call, fullgraph=True, backend="eager")}.items():
        x = torch.randn(1, 2, 10, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        out = run(x.requires_grad_())
        out.square().sum().backward()
        found[name] = torch.cat([out.detach(), x.grad])
    return found


def loss_refusals(group: Any, rank: int) -> dict[str, str]:
    """Return the errors of losses that rank 2 alone gets wrong."""
    logits, labels = torch.randn(2, 5, 9), torch.zeros(2, 5, dtype=torch.int64)
    odd = {
        "shapes": (logits, labels[:, 1:]),
        "kinds": (logits, labels.float()),
        "vocabulary": (logits, labels + 9),
        "logits": (labels, labels),
        "gradients": (logits, labels, "both"),
        "other gradients": (logits, labels, "summed"),
    }
    found = {}
    for name, (x, targets, *gradients) in odd.items():
        given = (x, targets, *gradients) if rank == 2 else (logits, labels)
        found[name] = refusal(lambda: mean_loss(*given[:2], group, gradients=(*given, "averaged")[2]))  # noqa: B023
    return found


def state_refusals(group: Any, rank: int) -> dict[str, str]:
    """Return the errors of modules and states that differ on rank 2."""
    x, odd = text(10, 0), rank == 2
    layer = module()
    _, state = layer(x)
    memory = state.memory
    states = {
        "memory's dtype": state._replace(memory=MemoryState(*(kept.float() for kept in memory))),
        "memory's shape": state._replace(memory=MemoryState(memory.memory[..., 1:], memory.normalizer)),
        "values": state._replace(values=state.values[:1]),
        "keys' dtype": state._replace(keys=state.keys.float()),
        "no state": None,
    }
    layers = {
        "write_bias": InfiniAttention(WIDTH, 4, segment_len=L, kv_heads=2, head_width=6).double(),
        "backend": module(backend="reference"),
        "qk_norm": module(qk_norm=True),
    }
    found = {name: refusal(lambda: layer(x, given if odd else state, group=group)) for name, given in states.items()}  # noqa: B023
    for name, other in layers.items():
        found[name] = refusal(lambda: (other if odd else layer)(x, group=group))  # noqa: B023
    return found


def module_refusals(group: Any, rank: int) -> dict[str, str]:
    """Return the errors of bad calls of the module, of `shard_batch` and of `mean_loss`."""
    layer = module()
    x = text(10, 0)
    _, tail = layer(x[:, :7])
    ids = torch.arange(60).view(2, 30)
    left = (torch.arange(30) > 3).long().expand(2, -1)
    logits = torch.randn(2, 5, 9)
    none = torch.full((2, 5), -100)
    calls = {
        "spans": lambda: layer(x, spans=torch.tensor([[0, 10]] * 2), group=group),
        "tail": lambda: layer(x, tail, group=group),
        "window": lambda: module(lookback=1, sinks=2)(x, group=group),
        "width": lambda: layer(x[..., 1:] if rank == 1 else x, group=group),
        "rank's part": lambda: layer(x[:, :7], group=group),
        "names": lambda: shard_batch({"input_ids": ids, "spans": ids}, group, 5),
        "ids": lambda: shard_batch({"input_ids": ids.float()}, group, 5),
        "labels": lambda: shard_batch({"input_ids": ids, "labels": ids[:, 1:]}, group, 5),
        "left": lambda: shard_batch({"input_ids": ids, "attention_mask": left}, group, 5),
        "short": lambda: shard_batch({"input_ids": ids}, group, 10),
        "text": lambda: shard_batch({"input_ids": ids + (rank == 2)}, group, 5),
        "one rank's ids": lambda: shard_batch({"input_ids": ids.float() if rank == 2 else ids}, group, 5),
        "segment_len": lambda: shard_batch({"input_ids": ids}, group, 6 if rank == 2 else 5),
        "gradients": lambda: mean_loss(logits, none, group, gradients="both"),
        "shapes": lambda: mean_loss(logits, none[:, 1:], group),
        "nothing": lambda: mean_loss(logits, none, group),
    }
    return {name: refusal(call) for name, call in calls.items()}


def labelled() -> dict[str, Tensor]:
    """Return a batch that brings labels."""
    ids, mask = torch.arange(2 * LENGTH).view(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, 30:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 3 == 0, -100), "attention_mask": mask}


def texts(step: int, batch: int = 2) -> Tensor:
    from models import VOCABULARY

    # a few words over and over, which can be learnt
    generator = torch.Generator().manual_seed(step % 4)
    words = torch.randint(3, VOCABULARY, (batch, 9), generator=generator)
    return words.repeat(1, LENGTH // 9 + 1)[:, :LENGTH]


def padded() -> dict[str, Tensor]:
    """Return texts that end on different ranks."""
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, 20:], mask[2, 41:] = 0, 0
    return {"input_ids": texts(0, 3), "attention_mask": mask}


def converted(dtype: torch.dtype = torch.float64, name: str = "llama", **changed: Any) -> Any:
    from models import double, make, open_gates

    import segattn

    model = make(name)
    model = segattn.convert(double(model) if dtype == torch.float64 else model, 8, quiet=True, **changed).train()
    open_gates(model)
    return model


def trained(group: Any) -> Tensor:
    """Return the losses of twenty steps."""
    from torch.nn.parallel import DistributedDataParallel

    import segattn

    model = DistributedDataParallel(converted(torch.float32), process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(STEPS):
        shard = shard_batch({"input_ids": texts(step)}, group, 8)
        targets = shard.pop("shift_labels")
        with segattn.sequence_parallel(model, group):
            loss = mean_loss(model(**shard).logits, targets, group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def model_gradients(group: Any, kind: str) -> dict[str, Tensor]:
    """Return the gradients of padded texts: this rank's share of each parameter's, which the test adds up."""
    import segattn

    model = converted(**MODELS[kind])
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard = shard_batch(padded(), group, 8)
    targets = shard.pop("shift_labels")
    with segattn.sequence_parallel(model, group):
        loss = mean_loss(model(**shard).logits, targets, group, gradients="summed")
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def sharded_gradients(mesh: Any) -> dict[str, Tensor]:
    """Return whole gradients under FSDP2, over a mesh of two batches by two runs."""
    from torch.distributed.fsdp import fully_shard

    import segattn

    model, everyone = converted(torch.float32), mesh._flatten("all")
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    row = mesh.get_local_rank("dp")
    shard = shard_batch({"input_ids": texts(1)[row : row + 1]}, mesh["sp"], 8)
    targets = shard.pop("shift_labels")
    with segattn.sequence_parallel(model, mesh["sp"]):
        loss = mean_loss(model(**shard).logits, targets, everyone)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.full_tensor() for name, p in model.named_parameters()}}


def model_refusals(group: Any, mesh: Any, rank: int) -> dict[str, str]:
    """Return the errors of bad calls of converted models."""
    from torch.distributed.tensor.experimental import context_parallel

    import segattn

    model = converted()
    ids = texts(0)[:, :16]

    def call(**changed: Any) -> str:
        with segattn.sequence_parallel(model, group):
            return refusal(lambda: model(**({"input_ids": ids} | changed)))

    left = torch.ones_like(ids)
    left[0, :3] = 0
    later = torch.ones_like(ids)
    later[0] = rank != 1
    found = {
        "cache": call(past_key_values=segattn.InfiniCache(model)),
        "use_cache": call(use_cache=True),
        "packed": call(position_ids=torch.arange(8).repeat(2)[None]),
        "padding on the left": call(attention_mask=left if rank == 0 else torch.ones_like(ids)),
        "padding between": call(attention_mask=later),
        "batch": call(input_ids=ids[:1] if rank == 3 else ids),
        "dimensions": call(input_ids=ids[0] if rank == 3 else ids),
        "labels": call(labels=ids if rank == 3 else None),
        "after labels": call(),
        "part of a segment": call(input_ids=ids[:, :13] if rank == 0 else ids),
        "not all converted": refusal(lambda: segattn.sequence_parallel(converted(layers=[1]), group).__enter__()),
        "mesh": refusal(lambda: segattn.sequence_parallel(model, mesh).__enter__()),
    }
    shard = shard_batch({"input_ids": texts(0)}, group, 8)
    del shard["shift_labels"]
    found["forgotten"] = refusal(lambda: model(**shard))
    with segattn.sequence_parallel(model, group), torch.autocast("cpu", enabled=rank == 3):
        found["autocast"] = refusal(lambda: model(input_ids=ids))
    buffer, layer = texts(0)[:, :16].clone(), module()
    with context_parallel(mesh["sp"], buffers=[buffer], buffer_seq_dims=[1]):
        found["context_parallel"] = refusal(lambda: model(input_ids=buffer))
        found["context_parallel, module"] = refusal(lambda: layer(text(10, 0), group=group))
        x = torch.randn(1, 2, 10, 4)
        found["context_parallel, operation"] = refusal(
            lambda: sequence_parallel_attention(x, x, x, group=group, segment_len=L)
        )
    return found


def faults(stopped: Any, killed: Any, rank: int) -> dict[str, Any]:
    """Return the errors, and the seconds until them, where the last rank does not answer, and where it dies."""
    x = torch.randn(1, 2, 10, 4, dtype=torch.float64)
    found = {}
    for name, group in (("stopped", stopped), ("killed", killed)):
        last = rank == SIZE - 1
        if last and name == "stopped":
            time.sleep(PATIENCE + 2)
            continue
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        said = refusal(lambda: sequence_parallel_attention(x, x, x, group=group, segment_len=L, gate=x.new_zeros(2)))  # noqa: B023
        found[name] = (said, time.monotonic() - begin)
    return found


def main(rank: int, folder: Path, with_models: bool) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=SIZE, timeout=timedelta(seconds=120))
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 3, 4)}
    patience = timedelta(seconds=PATIENCE)
    stopped, killed = (dist.new_group(list(range(SIZE)), timeout=patience) for _ in range(2))
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    results: dict[str, Any] = {}
    for size, runs in RUNS.items():
        if rank < size:
            for name, call in CASES.items():
                changed = {"frozen": True} if "frozen" in name else {}
                results[f"{name}, {size}"] = attend(call, runs, groups[size], rank, torch.float64, **changed)
            for update in ("delta", "linear"):
                results[f"no state after, {update}, {size}"] = attend(
                    CASES[update], runs, groups[size], rank, torch.float64, want_state=False
                )
    for name in DTYPES:
        results[name] = attend(CASES["delta"], RUNS[4], groups[4], rank, getattr(torch, name))
    if rank < 2:
        for name, call in KERNELS.items():
            results[name] = attend(call, RUNS[2], groups[2], rank, torch.float32, backend="triton")
    if rank == 0:
        results["alone"] = attend(CASES["delta"], (13,), groups[1], 0, torch.float64)
    else:
        results["of others"] = refusal(lambda: attend(CASES["delta"], (13,), groups[1], 0, torch.float64))
    seed = 7 + mesh.get_local_rank("dp")
    results["mesh"] = attend(
        replace(CASES["delta"], seed=seed), RUNS[2], mesh["sp"], mesh.get_local_rank("sp"), torch.float64
    )
    results["refusals"] = refusals(groups[4], rank)
    for rope in ("segment", "sequence"):
        results[f"module, {rope}"] = infini(groups[4], rank, rope)
    results["unwritten"] = unwritten(groups[4], rank)
    results["compiled"] = compiled(groups[4], rank)
    results["module refusals"] = module_refusals(groups[4], rank)
    results["loss refusals"] = loss_refusals(groups[4], rank)
    results["state refusals"] = state_refusals(groups[4], rank)
    results["shard"] = shard_batch(labelled(), groups[4], 8)
    if with_models:
        for kind in MODELS:
            results[f"model, {kind}"] = model_gradients(groups[4], kind)
        results["sharded"] = sharded_gradients(mesh)
        results["trained"] = trained(groups[4])
        results["model refusals"] = model_refusals(groups[4], mesh, rank)
    torch.save(results, folder / f"{rank}.pt")
    results["faults"] = faults(stopped, killed, rank)
    torch.save(results, folder / f"{rank}.pt")
