"""Draw the operation as docs/operation.svg: the segments of a text, the memory between them, and their gates."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

PATH = Path(__file__).resolve().with_name("operation.svg")
WORDS = "A text in segments. Each attends to itself, reads the memory of all before it, and is then written into it."
WIDTH, HEIGHT = 680, 472
SEGMENTS = 3
# from the left edge of a segment's memory to that of the next one's
STEP, LEFT = 192, 20
# heights, from the top: output, gate, memory beside local attention, the line that hands the memory on, tokens, legend
OUTPUT, GATE, KEPT, LINE, TOKENS, LEGEND = 28, 106, 170, 300, 340, 420
RADIUS = 18
# a number of the memory, and a token or a pair of tokens
NUMBER, TOKEN = 16, 13
TOKENS_EACH = 7
STYLE = """
    text { font: 19px system-ui, sans-serif; fill: #24292f }
    .small { font-size: 17px; fill: #57606a }
    .panel { fill: #ffffff; stroke: #d0d7de }
    .line { fill: none; stroke: #57606a; stroke-width: 1.6 }
    .head { fill: #57606a }
    .gate { fill: #ffffff; stroke: #57606a; stroke-width: 1.6 }
    .token { fill: #aeb6bf }
    .local { fill: #56b4e9 }
    .memory { fill: #e69f00 }
    .empty { fill: none; stroke: #e69f00; stroke-width: 1.6; stroke-dasharray: 4 3 }
    .output { fill: #009e73 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 }
      .small { fill: #9da7b3 }
      .panel { fill: #0d1117; stroke: #3d444d }
      .line { stroke: #9da7b3 }
      .head { fill: #9da7b3 }
      .gate { fill: #0d1117; stroke: #9da7b3 }
      .token { fill: #656d76 }
    }"""


def picture() -> str:
    """Return the picture as SVG, which brings its own panel and so is readable on light and on dark pages."""
    shapes = [shape for index in range(SEGMENTS) for shape in segment(LEFT + STEP * index, index)]
    shapes += [*memory(LEFT + STEP * SEGMENTS, SEGMENTS), *legend()]
    body = "\n  ".join(shapes)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">
  <title>{WORDS}</title>
  <style>{STYLE}
  </style>
  <defs>
    <marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">
      <path d="M0 0 L8 4 L0 8 Z" class="head"/>
    </marker>
  </defs>
  <rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" class="panel"/>
  {body}
</svg>
"""


def segment(left: float, index: int) -> list[str]:
    """Return a segment with the memory that it reads, what its tokens attend to, its gate, and its output."""
    local = left + 84
    middle = local + TOKEN * TOKENS_EACH / 2
    memory_middle = left + 2 * NUMBER
    pairs = [(i, j) for j in range(TOKENS_EACH) for i in range(j + 1)]
    return [
        *memory(left, index),
        *(square(local + TOKEN * i, KEPT + TOKEN * j, TOKEN - 2, "local") for i, j in pairs),
        *(square(local + TOKEN * i, TOKENS, TOKEN - 2, "token") for i in range(TOKENS_EACH)),
        *(square(local + TOKEN * i, OUTPUT, TOKEN - 2, "output") for i in range(TOKENS_EACH)),
        arrow((middle, TOKENS - 4), (middle, KEPT + TOKEN * TOKENS_EACH + 4)),
        arrow((middle, KEPT - 4), (middle, GATE + RADIUS + 3)),
        arrow((memory_middle, KEPT - 4), (memory_middle, GATE), (middle - RADIUS - 3, GATE)),
        arrow((middle, GATE - RADIUS - 2), (middle, OUTPUT + TOKEN + 4)),
        f'<circle cx="{middle}" cy="{GATE}" r="{RADIUS}" class="gate"/>',
        text(middle, GATE + 6, "g", "", "middle"),
        text(memory_middle + 6, GATE - 9, "read", "small"),
        text(middle, TOKENS + 36, f"segment {index + 1}", "", "middle"),
        # what a segment's keys and values add to the memory before makes the memory after
        arrow(
            (memory_middle, KEPT + 94),
            (memory_middle, LINE),
            (memory_middle + STEP, LINE),
            (memory_middle + STEP, KEPT + 96),
        ),
        arrow((middle + 36, TOKENS - 4), (middle + 36, LINE + 4)),
        text(middle + 42, LINE + 26, "write", "small"),
    ]


def memory(left: float, index: int) -> list[str]:
    """Return a memory with its name above it; the first one is empty."""
    top, side = KEPT + 28, 4 * NUMBER - 2
    cells = [(left + NUMBER * i, top + NUMBER * j) for j in range(4) for i in range(4)]
    full = [square(x, y, NUMBER - 2, "memory") for x, y in cells]
    return [
        *(full if index else [square(left, top, side, "empty")]),
        text(left + side / 2, KEPT + 20, f"M{'₀₁₂₃'[index]}", "", "middle"),
    ]


def legend() -> list[str]:
    """Return what each colour stands for."""
    entries = (
        (0, 0, "local", "local attention, inside a segment"),
        (0, 1, "memory", "memory, always of one size"),
        (322, 0, "output", "output: g · read + (1 − g) · local"),
        (322, 1, "token", "tokens: q, k, v"),
    )
    return [
        shape
        for x, row, kind, words in entries
        for shape in (
            square(LEFT + x, LEGEND + 26 * row - 13, 14, kind),
            text(LEFT + x + 24, LEGEND + 26 * row, words, "small"),
        )
    ]


def square(x: float, y: float, side: float, kind: str) -> str:
    """Return a square of a class."""
    return f'<rect x="{x:g}" y="{y:g}" width="{side}" height="{side}" rx="2" class="{kind}"/>'


def arrow(*points: tuple[float, float]) -> str:
    """Return a line through points with a head at the last one."""
    line = " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M{line}" class="line" marker-end="url(#head)"/>'


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    """Return words at a place."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


if __name__ == "__main__":
    PATH.write_text(picture(), encoding="utf-8")
