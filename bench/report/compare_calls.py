"""The times of a commit's `segattn`, by its public names alone: a script that reads jobs, one JSON a line.

It is run by its path, so that it may import another commit's package; its argument is the folder of that package.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import segattn

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# of one timing, so that the clock's grain does not matter for a call of microseconds
SECONDS = 0.02
# the most numbers of an output that are compared
COMPARED = 2**20
UPDATES = (None, "linear", "delta")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if CUDA:
        torch.cuda.synchronize()


def attention(update: str | None, backward: bool) -> Callable[[], object]:
    """Return a call of segment attention."""
    heads, tokens, width, segment_len = (16, 32768, 128, 2048) if CUDA else (2, 4096, 64, 512)
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    q, k, v, grad = (
        torch.randn(1, heads, tokens, width, device=DEVICE, dtype=dtype, generator=generator) for _ in range(4)
    )
    gate = None if update is None else torch.zeros(heads, device=DEVICE)
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]

    def run() -> object:
        out = segattn.segment_attention(q, k, v, segment_len=segment_len, gate=gate, update=update or "delta").out
        return torch.autograd.grad(out, inputs, grad) if backward else out

    return run


def decoding() -> Callable[[], object]:
    """Return a call of one decoding step."""
    heads, width, segment_len = 8, 64, 1024
    torch.manual_seed(0)
    q = torch.randn(1, heads, 1, width, device=DEVICE)
    keys, values = torch.randn(2, 1, heads, segment_len, width, device=DEVICE)
    memory = torch.randn(1, heads, width, width, device=DEVICE)
    state = segattn.MemoryState(memory, torch.rand(1, heads, width, device=DEVICE) + 1)
    gate = torch.zeros(heads, device=DEVICE)
    lengths = torch.full((1,), segment_len - 1, dtype=torch.int32, device=DEVICE)
    return lambda: segattn.segment_decode(q, keys, values, lengths, gate=gate, state=state)


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    f"{update or 'local'}, {'forward + backward' if backward else 'forward'}": (
        lambda update=update, backward=backward: attention(update, backward)
    )
    for update in UPDATES
    for backward in (False, True)
} | {"decode": decoding}


def repeated(run: Callable[[], object], count: int) -> float:
    """Return the milliseconds of one of `count` runs."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronize()
    return (time.perf_counter() - start) / count * 1e3


def warmed(make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], int]:
    """Return the call, and how often it runs in one timing."""
    run = make()
    repeated(run, 2)
    return run, max(1, int(SECONDS * 1e3 / repeated(run, 1)))


def outputs(run: Callable[[], object]) -> list[torch.Tensor]:
    """Return the numbers of a call's tensors, of large ones as many from all parts."""
    found = run()
    tensors = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, torch.Tensor)]
    # an odd step leaves out no dimension
    steps = [max(1, x.numel() // COMPARED) | 1 for x in tensors]
    return [x.detach().flatten()[::step].cpu() for x, step in zip(tensors, steps, strict=True)]


def main() -> None:
    """Answer jobs, one JSON a line, until there are no more."""
    # other prints must not stand between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    came_from = Path(segattn.__file__).parent.parent
    if came_from != Path(sys.argv[1]):
        raise ImportError(f"segattn must come from {sys.argv[1]}, got {came_from}")
    ready: dict[str, tuple[Callable[[], object], int]] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "calls":
            names = [name for name in CALLS if name != "decode" or hasattr(segattn, "segment_decode")]
            answer: dict[str, object] = {"record": names}
        elif job["do"] == "outputs":
            torch.save(outputs(CALLS[job["call"]]()), job["path"])
            answer = {"record": job["call"]}
        else:
            name = job["call"]
            if name not in ready:
                ready[name] = warmed(CALLS[name])
            answer = {"record": repeated(*ready[name])}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
