"""Counted operations and bytes against counts by hand, and by enumeration."""

from __future__ import annotations

import pytest

from segattn.bench.planner import floors
from segattn.bench.planner.floors import Peak, Sizes, Work

# two complete segments of 3 and a tail of 1
SMALL = Sizes(B=2, H=4, G=2, T=7, K=5, V=6, L=3, itemsize=2)


@pytest.mark.parametrize(("time", "segment_len"), [(7, 3), (6, 3), (2, 3), (1, 1), (40, 7)])
def test_pairs_are_those_that_the_mask_lets_through(time: int, segment_len: int) -> None:
    seen = sum(j <= i and i // segment_len == j // segment_len for i in range(time) for j in range(time))
    assert floors.pairs(time, segment_len) == seen


def test_local_attention_by_hand() -> None:
    # pairs: 6 + 6 + 1 of each of 8 heads
    assert floors.local_forward(SMALL).operations == 8 * 13 * (2 * 5 + 2 * 6)
    assert floors.local_backward(SMALL).operations == 8 * 13 * (2 * 5 * 3 + 2 * 6 * 2)
    # q 560, k 280, v 336, o 672 bytes
    assert floors.local_forward(SMALL).bytes == 560 + 280 + 336 + 672
    # q, k, v and their gradients; o, do; a float32 for each of 56 rows
    assert floors.local_backward(SMALL).bytes == 2 * (560 + 280 + 336) + 2 * 672 + 56 * 4


def test_backward_is_two_and_a_half_forwards_where_widths_agree() -> None:
    square = Sizes(B=1, H=3, G=3, T=64, K=16, V=16, L=32, itemsize=2)
    assert floors.local_backward(square).operations == 2.5 * floors.local_forward(square).operations


def test_memory_by_hand() -> None:
    # queries 3 to 6 of 8 heads read a 5 by 6 memory
    assert floors.read(SMALL) == Work(8 * 4 * 2 * 30, 0)
    assert floors.read_backward(SMALL).operations == 2 * 8 * 4 * 2 * 30
    # 6 keys of 4 heads are written; the state is 5 by 6 and 5 float32 for each of 4
    assert floors.write(SMALL, "linear") == Work(4 * 6 * 2 * 30, 4 * 35 * 4)
    # and 3 of them are first looked up
    assert floors.write(SMALL, "delta").operations == 4 * (6 + 3) * 2 * 30
    for update in ("linear", "delta"):
        assert floors.write_backward(SMALL, update).operations == 2 * floors.write(SMALL, update).operations


def test_whole_calls_are_their_parts() -> None:
    parts = [floors.local_forward(SMALL), floors.read(SMALL), floors.write(SMALL, "delta")]
    assert floors.forward(SMALL, "delta") == Work(sum(x.operations for x in parts), sum(x.bytes for x in parts))
    assert floors.forward(SMALL, None) == parts[0]
    assert floors.backward(SMALL, None) == floors.local_backward(SMALL)
    assert floors.backward(SMALL, "delta").operations > 2 * floors.forward(SMALL, "delta").operations


def test_one_segment_needs_no_memory_read() -> None:
    one = Sizes(B=1, H=1, G=1, T=8, K=4, V=4, L=8, itemsize=2)
    assert floors.read(one).operations == 0
    assert floors.write(one, "delta") == floors.write(one, "linear")


def test_memory_adds_what_the_design_says_per_token() -> None:
    """4 K² linear and 6 K² delta to 2 L K of attention: 12.5 and 18.75 % at K = 128, L = 2048, for long texts."""
    long = Sizes(B=1, H=1, G=1, T=2**20, K=128, V=128, L=2048, itemsize=2)
    local = floors.local_forward(long).operations
    for update, share in (("linear", 0.125), ("delta", 0.1875)):
        assert floors.forward(long, update).operations / local - 1 == pytest.approx(share, rel=5e-3)


def test_decode_by_hand() -> None:
    one = Sizes(B=1, H=4, G=2, T=7, K=5, V=6, L=8, itemsize=2)
    work = floors.decode(one)
    assert work.operations == 4 * (7 * 22 + 60)
    # q and o of 4 heads, 7 keys and values of 2, the state of 2
    assert work.bytes == 4 * 11 * 2 + 2 * 7 * 11 * 2 + 2 * 35 * 4
    assert floors.decode(one, gated=False) == Work(4 * 7 * 22, 4 * 11 * 2 + 2 * 7 * 11 * 2)


def test_the_slower_resource_decides() -> None:
    assert floors.seconds(Work(100, 10), Peak(10.0, 10.0)) == 10.0
    assert floors.seconds(Work(100, 1000), Peak(10.0, 10.0)) == 100.0


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_devices_are_known_by_their_drivers_name(name: str, row: str | None) -> None:
    found = floors.peak_of(name)
    assert (found[0] if found else None) == row
