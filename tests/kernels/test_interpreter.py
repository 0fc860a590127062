"""The interpreter that tests run the kernels in notices integers that do not fit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
from segattn.kernels.check.check import interpreted

if not interpreted():
    pytest.skip("the kernels run on a GPU", allow_module_level=True)
tl = triton.language


@triton.jit
def multiply(x, factor):
    return x * factor


@triton.jit
def multiples_kernel(out, factor):
    i = tl.arange(0, 16)
    tl.store(out + i, multiply(i + 2**20, factor))


def test_a_product_beyond_32_bits_is_refused() -> None:
    out = torch.zeros(16, dtype=torch.int32)
    multiples_kernel[(1,)](out, 2047)
    assert out[-1] == (2**20 + 15) * 2047
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflow detected for operation mul"):
        multiples_kernel[(1,)](out, 2048)
    # what a kernel that failed has patched is mended
    multiples_kernel[(1,)](out, 3)
    assert out[-1] == (2**20 + 15) * 3
