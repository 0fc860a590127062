"""Compile the kernels for GPUs that are not here, and read from the machine code what they will need.

Nothing runs: launches are recorded from tensors without data, and given to Triton's compiler for a named target.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_memory, triton_ops
from .configs import Target
from .launch import Launch, constants, recording

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
# what a multiprocessor holds: warps, registers, shared memory in bytes
_CAPACITY = {
    "sm_80": (64, 65536, 167936),
    "sm_90": (64, 65536, 233472),
    "sm_100": (64, 65536, 233472),
    "sm_120": (48, 65536, 102400),
}
_TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}


class Signature(NamedTuple):
    """What Triton's compiler wants to know of a launch."""

    types: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]


def signature(launch: Launch) -> Signature:
    """As the launch's own arguments would be specialised: what is None or constant is compiled in, multiples of 16 noted."""
    kernel = launch.kernel
    values = constants(kernel, launch.tile) | launch.arguments
    unspecialised = set(kernel.do_not_specialize or ())
    types: dict[str, Any] = {}
    known: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...], fixed: bool, plain: bool) -> Any:
        if fixed or value is None:
            known[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(x, (*path, i), False, plain) for i, x in enumerate(value))
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if not plain and value == 1:
            known[path] = value
            return "constexpr"
        if not plain and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        plain = name in unspecialised or i in unspecialised
        types[name] = describe(values[name], (i,), parameter.is_constexpr, plain)
    return Signature(types, known, attributes)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. Registers, spilled bytes and shared memory are per thread, thread and program."""

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    tensor_core: int  # instructions
    resident_warps: int  # per multiprocessor; 0 where unknown
    loops: tuple[int, ...]  # instructions of each innermost loop that multiplies matrices
    instructions: int


def gpu_target(target: Target) -> GPUTarget:
    if target.name.startswith("sm_"):
        return GPUTarget("cuda", int(target.name[3:]), 32)
    return GPUTarget("hip", target.name, 64)


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile for `target` and read the result.

    Raises:
        triton.compiler.errors.CompilationError, RuntimeError: what the compiler raised.
    """
    types, known, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=known, attrs=attributes)
    tile = launch.tile
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=gpu_target(target), options=options)
    read = _read_cubin if "cubin" in compiled.asm else _read_amdgcn
    registers, spilled, lines = read(compiled.asm)
    shared = compiled.metadata.shared
    mnemonic = _TENSOR_CORES[target.name]
    code = [line for _, line in lines]
    return Compiled(
        launch.kernel.__name__,
        target.name,
        registers,
        spilled,
        shared,
        sum(mnemonic in line for line in code),
        _resident_warps(target.name, tile.num_warps, registers, shared),
        tuple(_loops(lines, mnemonic)),
        len(code),
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int, list[tuple[str, str]]]:
    """Registers, bytes of stack, and (label or address, instruction) lines of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output([_tool("cuobjdump"), "--dump-resource-usage", file.name])
        code = _output([_tool("nvdisasm"), "-c", "-plr", file.name] if False else [_tool("nvdisasm"), "-c", file.name])
    registers, stack = (
        int(re.search(rf"{field}:(\d+)", usage.split("Function")[-1]).group(1)) for field in ("REG", "STACK")
    )  # type: ignore[union-attr]
    lines = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            lines.append((label.group(1), ""))
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);?\s*(/\*.*)?$", line):
            lines.append(("", instruction.group(1)))
    return registers, stack, lines


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, list[tuple[str, str]]]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    lines = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            lines.append((label.group(1), ""))
        elif instruction := re.match(r"\t([a-z]\w+.*)", line):
            lines.append(("", instruction.group(1)))
    return field("vgpr_count"), 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")), lines


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(lines: list[tuple[str, str]], mnemonic: str) -> Iterator[int]:
    """Sizes of the innermost loops that hold tensor-core instructions, in the order of the code."""
    at = {label: i for i, (label, _) in enumerate(lines) if label}
    found = []
    for i, (_, line) in enumerate(lines):
        branch = re.search(r"(?:BRA|branch\w*|cbranch\w+).*?(\.L\w+)", line)
        if branch and at.get(branch.group(1), i) < i:
            found.append((at[branch.group(1)], i))
    for first, last in sorted(found):
        inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in found)
        body = [line for _, line in lines[first:last] if line]
        if not inner and any(mnemonic in line for line in body):
            yield len(body)


def _resident_warps(target: str, num_warps: int, registers: int, shared: int) -> int:
    if target not in _CAPACITY:
        return 0
    warps, register_file, memory = _CAPACITY[target]
    by_registers = register_file // (max(registers, 1) * 32 * num_warps)
    by_memory = memory // (shared + 1024)
    return min(warps // num_warps, by_registers, by_memory) * num_warps


class Case(NamedTuple):
    """A kind of call that compiles its own variants of the kernels."""

    delta: bool = True
    gated: bool = True
    shared: bool = False  # the memory reads and writes by q and k
    packed: bool = False
    causal: bool = True
    num_read: int = 0


CASES = {
    "delta": Case(),
    "linear, packed": Case(delta=False, packed=True, shared=True),
    "local": Case(gated=False),
    "local, bidirectional": Case(gated=False, causal=False),
    "local, block mask": Case(gated=False, num_read=8),
}


def launches(target: Target, dtype: torch.dtype, width: int, case: Case) -> list[Launch]:
    """Every launch of a forward and a backward, for K = V = width."""
    B, H, G, T, L = 1, 8, 2, 8192, 2048

    def tokens(heads: int) -> Tensor:
        return torch.empty(B, heads, T, width, device="meta", dtype=dtype)

    q, k, v = tokens(H), tokens(G), tokens(G)
    memory_q, memory_k = (None, None) if case.shared or not case.gated else (tokens(H), tokens(G))
    bounds = torch.empty(3, 2, device="meta", dtype=torch.int64) if case.packed else None
    N = 3 if case.packed else B
    state = (torch.empty(N, G, width, width, device="meta"), torch.empty(N, G, width, device="meta"))
    gate, (memory, normalizer) = (torch.empty(H, device="meta"), state) if case.gated else (None, (None, None))
    options = (L, case.delta, case.causal, case.num_read, case.num_read, False, width**-0.5)
    with recording(target) as found:
        out, m, z, *kept = triton_ops._attend(
            q, k, v, memory_q, memory_k, gate, memory, normalizer, bounds, *options, True
        )
        if not case.gated:
            kept[0] = out
        triton_ops._attend_backward(
            *(q, k, v, memory_q, memory_k, gate, *kept, bounds, *options, out),
            *((m, z) if case.gated else (None, None)),
        )
    return found


def memory_launches(target: Target, dtype: torch.dtype, width: int) -> list[Launch]:
    """Every launch of a decoding step, and of the memory read and written on its own, forward and backward."""
    B, H, G, T = 2, 8, 2, 2048
    q = torch.empty(B, H, T, width, device="meta", dtype=dtype)
    k = torch.empty(B, G, T, width, device="meta", dtype=dtype)
    beta, gate = torch.empty(B, G, T, device="meta"), torch.empty(H, device="meta")
    m, z = torch.empty(B, G, width, width, device="meta"), torch.empty(B, G, width, device="meta")
    lengths = torch.empty(B, device="meta", dtype=torch.int32)
    with recording(target) as found:
        for gated in (True, False):
            state = (gate, m, z) if gated else (None, None, None)
            triton_ops._decode(q[:, :, :1], k, k, None, *state, lengths, None, True, False, width**-0.5)
        triton_memory._read(q, m, z, True)
        triton_memory._read_backward(q, m, z, True, q)
        _, _, *kept = triton_memory._write(k, k, beta, m, z, True, True, False)
        triton_memory._write_backward(k, k, beta, *kept, False, m, z)
    return found
