"""Ranks for tests, forked from one process that has imported what is slow to import."""

import os
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

CONTEXT = get_context("forkserver")
# without those that are not installed
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "segattn",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
        "segattn.infini.train.run",
    ]
)


class Ended(NamedTuple):
    """How a rank ended, a signal as a negative number and a rank that went on too long as None, and what it said."""

    code: int | None
    said: str


def fork(
    size: int, call: Callable[..., None], *arguments: object, folder: Path, timeout: float, **environment: str
) -> list[Ended]:
    """`call(rank, *arguments)` on so many processes, with torchrun's environment; nobody ends them but themselves.

    Args:
        call: of a module.
        folder: for what they say.
        timeout: seconds until all of them must have ended.
    """
    # as torchrun's, it is no rank's: its port is nobody else's, and it is there until all have ended
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks, files, end = [], [folder / f"{rank}.txt" for rank in range(size)], time.monotonic() + timeout
    for rank, file in enumerate(files):
        file.touch()
        theirs = environment | {"RANK": str(rank), "WORLD_SIZE": str(size)}
        ranks.append(CONTEXT.Process(target=_run, args=(file, theirs, call, rank, *arguments)))
    try:
        with pytest.MonkeyPatch.context() as patch:
            # for the process that they are forked from
            patch.setenv("OMP_NUM_THREADS", "1")
            for process in ranks:
                process.start()
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        return [Ended(process.exitcode, file.read_text()) for process, file in zip(ranks, files, strict=True)]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()


def _run(file: Path, environment: Mapping[str, str], call: Callable[..., None], *arguments: Any) -> None:
    with file.open("w") as opened:
        for stream in (1, 2):
            os.dup2(opened.fileno(), stream)
    os.environ.update(environment)
    call(*arguments)
