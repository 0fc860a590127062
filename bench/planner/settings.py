"""The settings of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from ...runs.errors import SettingError
from .floors import PEAKS, Peak, peak_of
from .shapes import LARGEST, Shape

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
UPDATES = ("delta", "linear")


@dataclass(frozen=True)
class PlanSettings:
    """One text length of one model; the defaults are those of the command.

    length: tokens of a sequence, T.
    segment_len: tokens of a segment, L.
    memory: memory tokens of RMT and ARMT, m.
    d_mem, nu: of ARMT, whose keys have 2 · nu · d_mem features.
    update: Infini-attention's rule, "delta" or "linear".
    lookback, sinks: of Infini-attention and of segments alone, as arguments of `segattn.convert`.
    bptt: segments that gradients reach back; None: all.
    batch: sequences at once.
    dtype: of weights and activations.

    Raises:
        SettingError: naming what cannot be.
    """

    shape: Shape
    length: int
    segment_len: int = 2048
    memory: int = 16
    d_mem: int = 64
    nu: int = 3
    update: str = "delta"
    lookback: int = 0
    sinks: int = 0
    bptt: int | None = None
    batch: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("length", "segment_len", "memory", "d_mem", "nu", "batch", "bptt"):
            value = getattr(self, name)
            if value is not None:
                check_size(name, value)
        if self.memory > self.segment_len:
            raise SettingError(
                "memory", f"must be at most the {self.segment_len} tokens of a segment, got {self.memory}"
            )
        if self.lookback not in (0, 1):
            raise SettingError("lookback", f"must be 0 or 1, got {self.lookback}")
        if not 0 <= self.sinks <= self.segment_len:
            problem = f"must be from 0 to the {self.segment_len} tokens of a segment, got {self.sinks}"
            raise SettingError("sinks", problem)
        check_choice("update", self.update, UPDATES)
        check_choice("dtype", self.dtype, tuple(ITEMSIZE))

    @property
    def window(self) -> int:
        """The number of tokens that local attention sees at most, without the sinks."""
        return (1 + self.lookback) * self.segment_len

    @property
    def itemsize(self) -> int:
        """The bytes of one element of weights and hidden states."""
        return ITEMSIZE[self.dtype]


def check_size(name: str, value: int) -> None:
    """Check that a size is at least 1, and small enough to compute with.

    Raises:
        SettingError: of `name`.
    """
    if value < 1:
        raise SettingError(name, f"must be at least 1, got {value}")
    if value > LARGEST:
        raise SettingError(name, f"must be at most {LARGEST:,}, got more")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a value is one of the choices.

    Raises:
        SettingError: of `name`.
    """
    if value not in choices:
        raise SettingError(name, f"must be {' or '.join(choices)}, got {value!r}")


def gpu_of(name: str) -> tuple[str, Peak]:
    """Return a row of `floors.PEAKS` by its name, or by the name that a driver gives the device.

    Raises:
        SettingError: of `gpu`.
    """
    row = peak_of(name)
    if row is None:
        raise SettingError("gpu", f"must be one of {', '.join(row for row, _, _ in PEAKS)}, got {name!r}")
    return row
