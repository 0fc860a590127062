"""Compile the kernels for GPUs that are not here, and read from the machine code what they will need.

Nothing runs: launches are recorded from tensors without data, and given to Triton's compiler for a named target.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.errors import TritonError

from ...kernels.sequences import slot_count
from ...kernels.state import Options
from ...kernels.triton.configs import Target
from ...kernels.triton.launch import Launch, constants, recording
from ...kernels.triton.memory_ops import read_backward, read_forward, write_backward, write_forward
from ...kernels.triton.ops import Inputs, attention_backward, attention_decode, attention_forward
from .machine_code import Line, Loop, amdgcn, loops, sass, tensor_core

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class CompileError(RuntimeError):
    """Error of a kernel that the compiler refuses."""


class Signature(NamedTuple):
    """The description of a launch that Triton's compiler takes."""

    types: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]


def signature(launch: Launch) -> Signature:
    """Describe a launch as Triton would specialise it: None and constants compiled in, multiples of 16 noted."""
    kernel = launch.kernel
    values = constants(kernel, launch.tile) | launch.arguments
    unspecialised = set(kernel.do_not_specialize or ())
    types: dict[str, Any] = {}
    known: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...], plain: bool) -> Any:
        """Return the type of the value at `path`, and note it if it is compiled in, or divisible by 16.

        plain: the kernel asks that its integers are not specialised.
        """
        if value is None or isinstance(value, tl.constexpr):
            known[path] = value if value is None else value.value
            return "constexpr"
        if isinstance(value, tuple):
            members = [describe(x, (*path, i), False) for i, x in enumerate(value)]
            # a named tuple stays one: kernels call its members by name
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if isinstance(value, Tensor):
            # of storages, GPUs allocate none at less than 256 bytes
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if not plain and value == 1:
            known[path] = value
            return "constexpr"
        if not plain and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            known[(i,)] = value
            types[parameter.name] = "constexpr"
        else:
            types[parameter.name] = describe(value, (i,), parameter.name in unspecialised or i in unspecialised)
    return Signature(types, known, attributes)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    registers: int  # per thread
    spilled: int  # bytes per thread that registers do not hold
    shared: int  # bytes per program
    tensor_memory: int  # columns per program, of which sm_100 has 512
    products: int  # matrix products as the kernel writes them
    tensor_core: dict[str, int]  # instructions by their name
    resident_warps: int  # per multiprocessor
    loops: tuple[Loop, ...]  # the innermost that multiply matrices
    instructions: int


def build(launch: Launch, target: Target) -> CompiledKernel:
    """Compile for `target`, or take the result from Triton's cache.

    Raises:
        CompileError: the compiler refuses; from what it raised.
    """
    types, known, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=known, attrs=attributes)
    tile = launch.tile
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    try:
        return triton.compile(source, target=_gpu_target(target), options=options)
    except (TritonError, RuntimeError) as error:
        raise CompileError(f"{type(error).__name__}: {error}") from error


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile for `target` and read the result.

    Raises:
        CompileError: the compiler refuses; from what it raised.
    """
    compiled, tile = build(launch, target), launch.tile
    nvidia = "cubin" in compiled.asm
    registers, spilled, lines = read_cubin(compiled.asm["cubin"]) if nvidia else _read_amdgcn(compiled.asm["amdgcn"])
    code = [line.instruction for line in lines if line.instruction]
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    return Compiled(
        registers=registers,
        spilled=spilled,
        shared=shared,
        tensor_memory=columns,
        products=len(re.findall(r"\btt\.dot\b", str(compiled.asm["ttir"]))),
        tensor_core=dict(tensor_core(code)),
        resident_warps=resident_warps(target.name, tile.num_warps, registers, shared, columns),
        loops=tuple(loops(lines)),
        instructions=len(code),
    )


def _gpu_target(target: Target) -> GPUTarget:
    """Return Triton's name for a target: backend, architecture, threads of a warp."""
    if target.name.startswith("sm_"):
        return GPUTarget("cuda", int(target.name[3:]), 32)
    return GPUTarget("hip", target.name, 64)


def _tool(name: str, *arguments: str) -> str:
    """Return what one of the tools prints that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _field(pattern: str, text: str) -> int:
    """Return the number that `pattern` matches.

    Raises:
        ValueError: it matches nothing.
    """
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}")
    return int(match.group(1))


def read_cubin(cubin: bytes) -> tuple[int, int, list[Line]]:
    """Return the registers, the bytes of the stack, which the kernels have for spills alone, and the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name).split("Function")[-1]
        code = _tool("nvdisasm", "-c", "-hex", file.name)
    return _field(r"REG:(\d+)", usage), _field(r"STACK:(\d+)", usage), sass(code)


def _read_amdgcn(text: str) -> tuple[int, int, list[Line]]:
    """Return the vector registers, the bytes of scratch memory, and the code."""
    registers, scratch = _field(r"\.vgpr_count:\s+(\d+)", text), _field(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return registers, scratch, amdgcn(text)


# what a multiprocessor holds: warps, registers of one thread by warps, shared memory in bytes, and what it adds to a
# program's; on gfx942 warps are 64 wide
_CAPACITY = {
    "sm_80": (64, 2048, 167936, 1024),
    "sm_90": (64, 2048, 233472, 1024),
    "sm_100": (64, 2048, 233472, 1024),
    "sm_120": (48, 2048, 102400, 1024),
    "gfx942": (32, 2048, 65536, 0),
}
TENSOR_MEMORY = 512


def resident_warps(target: str, num_warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """Return how many warps a multiprocessor holds at a time of programs with these needs; 0: not one program."""
    warps, register_file, memory, reserved = _CAPACITY[target]
    programs = [warps // num_warps, register_file // (num_warps * -(-max(registers, 1) // 8) * 8)]
    if shared + reserved:
        programs.append(memory // (shared + reserved))
    if tensor_memory:
        programs.append(TENSOR_MEMORY // tensor_memory)
    return min(programs) * num_warps


class Case(NamedTuple):
    """A kind of call, which compiles variants of the kernels for itself."""

    delta: bool = True
    gated: bool = True
    shared: bool = False  # the memory reads and writes by q and k
    packed: bool = False
    causal: bool = True
    num_read: int = 0
    softcap: float | None = None
    lookback: int = 0
    sinks: int = 0
    biased: bool = False  # by sink logits and ALiBi's slopes


CASES = {
    "delta": Case(),
    "local": Case(gated=False),
    "linear, packed": Case(delta=False, packed=True, shared=True),
    "local, bidirectional": Case(gated=False, causal=False),
    "local, block mask": Case(gated=False, num_read=8),
    "delta, capped": Case(softcap=50.0),
    "delta, window": Case(lookback=1, sinks=4),
    "delta, window, biased": Case(lookback=1, sinks=4, biased=True),
}
ALONE = "alone"


def launches_of(name: str, target: Target, dtype: torch.dtype, width: int) -> list[Launch]:
    """Return every launch of a case, or of the functions outside `segment_attention`, for K = V = width."""
    return memory_launches(target, dtype, width) if name == ALONE else launches(target, dtype, width, CASES[name])


class Shape(NamedTuple):
    """Hold the sizes of a call but the heads' width."""

    B: int = 1
    H: int = 8
    G: int = 2
    T: int = 8192
    L: int = 2048


USUAL = Shape()


def launches(target: Target, dtype: torch.dtype, width: int, case: Case, shape: Shape = USUAL) -> list[Launch]:
    """Return every launch of a forward and a backward."""
    B, H, G, T, L = shape

    def tokens(heads: int) -> Tensor:
        """Return [B, heads, T, width] without data."""
        return torch.empty(B, heads, T, width, device="meta", dtype=dtype)

    q, k, v = tokens(H), tokens(G), tokens(G)
    memory_q, memory_k = (None, None) if case.shared or not case.gated else (tokens(H), tokens(G))
    bounds = torch.empty(3, 2, device="meta", dtype=torch.int64) if case.packed else None
    N = 3 if case.packed else B
    state = (torch.empty(N, G, width, width, device="meta"), torch.empty(N, G, width, device="meta"))
    gate, (memory, normalizer) = (torch.empty(H, device="meta"), state) if case.gated else (None, (None, None))
    update = "delta" if case.delta else "linear"
    mask = case.num_read, case.num_read
    options = Options(L, update, case.causal, *mask, "local", width**-0.5, case.softcap, case.lookback)
    inputs = Inputs(q, k, v, memory_q, memory_k, gate, memory, normalizer, bounds=bounds)
    if case.biased:
        inputs = inputs._replace(sink_logits=gate, slopes=gate)
    if case.sinks:
        slots = slot_count(N if case.packed else None, B, T, L)
        inputs = inputs._replace(**_sinks(slots, k, case.sinks))
    with recording(target) as recorded:
        out, m, z, *saved = attention_forward(inputs, *options, True)
        if not case.gated:
            saved[0] = out
        attention_backward(inputs, saved, *options, out, [m, z])
    return recorded


def _sinks(slots: int, k: Tensor, count: int) -> dict[str, Tensor]:
    """Return `count` sinks of every slot without data: keys, values, and whether they are seen."""
    x = k.new_empty(slots, k.shape[1], count, k.shape[3])
    return {"sink_k": x, "sink_v": x, "sink_seen": x.new_empty(slots, dtype=torch.bool)}


def memory_launches(target: Target, dtype: torch.dtype, width: int) -> list[Launch]:
    """Return every launch of a decoding step, and of `memory_read` and `memory_write`, forward and backward."""
    B, H, G, T = 2, 8, 2, 2048
    q = torch.empty(B, H, T, width, device="meta", dtype=dtype)
    k = torch.empty(B, G, T, width, device="meta", dtype=dtype)
    beta, gate = torch.empty(B, G, T, device="meta"), torch.empty(H, device="meta")
    m, z = torch.empty(B, G, width, width, device="meta"), torch.empty(B, G, width, device="meta")
    lengths = torch.empty(B, device="meta", dtype=torch.int32)
    options = Options(T, "delta", True, 0, 0, "local", width**-0.5)
    with recording(target) as recorded:
        step = Inputs(q[:, :, :1], k, k, None, None, gate, m, z)
        with_sinks = step._replace(**_sinks(B, k, 4))
        biased = with_sinks._replace(sink_logits=gate, slopes=gate)
        for inputs in (step, Inputs(*step[:3]), with_sinks, biased):
            attention_decode(inputs, *options, lengths, None)
        read_forward(q, m, z, True)
        read_backward(q, m, z, True, q)
        _, _, *saved = write_forward(k, k, beta, m, z, "delta", True, False)
        write_backward(k, k, beta, saved, False, [m, z])
    return recorded
