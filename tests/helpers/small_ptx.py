"""Small kernels written by hand, for the tests of the executor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segattn.bench.emulated.executor import execute
from segattn.bench.emulated.machine import Run
from segattn.bench.emulated.ptx import Program, parse

# the thread's index in its program is %r0, in all programs %r1; parameters stand in %rd0, %rd1, ... (or %r100, ... )
TEMPLATE = """
.version 8.7
.target {target}
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.file 1 "{source}"
.visible .entry {name}(
{parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<64>;
    .reg .b32 %r<512>;
    .reg .b64 %rd<64>;
    .loc 1 10 0
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r1, %r1, {threads}, %r0;
{loads}
    .loc 1 20 0
{body}
    ret;
}}
"""


def program(
    body: str, kinds: Sequence[str] = (), *, threads: int = 32, target: str = "sm_90a", name: str = "kernel"
) -> Program:
    """Parse a kernel with parameters of `kinds`, u64, u32 or f32."""
    banks = {"u64": "%rd{}", "u32": "%r{}", "f32": "%r{}"}
    loads = []
    for i, kind in enumerate(kinds):
        register = banks[kind].format(i if kind == "u64" else 100 + i)
        loads.append(f"    ld.param.b{kind[1:]} {register}, [{name}_param_{i}];")
    parameters = ",\n".join(f"    .param .{kind} {name}_param_{i}" for i, kind in enumerate(kinds))
    return parse(
        TEMPLATE.format(
            target=target,
            source="by/hand.py",
            name=name,
            parameters=parameters,
            threads=threads,
            loads="\n".join(loads),
            body=body,
        )
    )


def run(
    body: str,
    *arguments: Tensor | int | float,
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    outputs: Sequence[Tensor] = (),
    target: str = "sm_90a",
    limit: int = 100_000,
    counting: bool = False,
) -> Run:
    """Execute a kernel on arguments."""
    kinds = ["u64" if isinstance(a, Tensor) else "f32" if isinstance(a, float) else "u32" for a in arguments]
    parsed = program(body, kinds, threads=threads, target=target)
    return execute(parsed, programs, arguments, shared, outputs=outputs, limit=limit, counting=counting)


def place(register: str, base: str, size: int, index: str = "%r1") -> str:
    """Return the line that computes the address of an element of `size` bytes."""
    return f"    mad.wide.u32 {register}, {index}, {size}, {base};\n"


def random_bits(seed: int, count: int, size: int) -> Tensor:
    """Return random bits as integers of `size` bytes, a few of them all zeros, all ones, one, or the sign."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (count, size), generator=generator, dtype=torch.uint8)
    data[0], data[1], data[2] = 0, 255, torch.tensor([1] + [0] * (size - 1))
    data[3], data[4] = torch.tensor([0] * (size - 1) + [128]), torch.tensor([255] * (size - 1) + [127])
    return data.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).reshape(-1)
