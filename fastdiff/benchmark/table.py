"""One table of figures, as text and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# column, heading, how a value is written; a column appears if any row has it
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("shape", "size", "{}"),
    ("name", "", "{}"),
    ("clip", "clip", "{}"),
    ("dead", "dead", "{:.0%}"),
    ("ms", "ms", "{:,.3g}"),
    ("cpu_ms", "CPU ms", "{:,.3g}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("gb_per_s", "GB/s", "{:,.0f}"),
    ("tflop_per_s", "TFLOP/s", "{:,.3g}"),
    ("of_floor", "of floor", "{:.0%}"),
    ("peak_gb", "peak GB", "{:.2f}"),
    ("repeats", "repeats", "{}"),
    ("error", "error", "{:.1e}"),
    ("ratio", "ours is faster by", "{:.2f}"),
    ("cpu_ratio", "by CPU time", "{:.2f}"),
    ("note", "", "{}"),
)


def format_table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]] = COLUMNS) -> str:
    """Rows under headings; text to the left, numbers to the right, nothing where a row has no value."""
    shown = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    cells = [[_cell(row.get(key), form) for key, _, form in shown] for row in rows]
    lines = [[heading for _, heading, _ in shown], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    left = [any(isinstance(row.get(key), str) for row in rows) for key, _, _ in shown]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if at_left else '>'}{width}}" for cell, width, at_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float) and form == "{:,.3g}" and value >= 1000:
        form = "{:,.0f}"
    return form.format(value)


def write_json(path: Path, **facts: Any) -> None:
    """Write facts, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"schema": 1, **facts}, indent=1, default=str, ensure_ascii=False) + "\n")
    part.replace(path)
