"""CSV files that stages exchange, read as text first and checked when a column is used."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import InputError


@dataclass(frozen=True)
class Table:
    """A CSV file: text as it stands there.

    Attributes:
        columns: Their names.
        rows: Of each row its cells.
    """

    columns: list[str]
    rows: list[list[str]]

    def text(self, name: str) -> list[str]:
        """One column as text."""
        i = self.columns.index(name)
        return [row[i] for row in self.rows]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """One column as float64 (rows,); empty cells are NaN.

        Raises:
            ValueError: A cell is no number.
        """
        return np.array([float(cell) if cell else math.nan for cell in self.text(name)], dtype=np.float64)


def read_table(path: Path, wanted: Sequence[str]) -> Table:
    """Read a CSV file that has at least these columns.

    Raises:
        InputError: It is missing or not CSV, lacks a column, or a row has another number of cells.
    """
    try:
        with path.open(encoding="utf-8", newline="") as f:
            table = list(csv.reader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not readable as CSV ({error})") from error
    header = table[0] if table else []
    missing = [name for name in wanted if name not in header]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; run the stage that wrote it again")
    for i, row in enumerate(table[1:], start=2):
        if len(row) != len(header):
            raise InputError(f"{path}: line {i} has {len(row)} cells, the header {len(header)}")
    return Table(header, table[1:])
