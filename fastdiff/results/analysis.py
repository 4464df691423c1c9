"""Files of `<run>/analysis/` that other stages read."""

from pathlib import Path
from typing import Any

from fastdiff.rundir import read_json

SUMMARY = "summary.json"
SUMMARY_SCHEMA = 1


def read_analysis_summary(run: Path) -> dict[str, Any]:
    """`summary.json` of a run's analysis.

    Raises:
        InputError: It is missing, damaged, or of another schema.
    """
    facts: dict[str, Any] = read_json(run / "analysis" / SUMMARY, SUMMARY_SCHEMA, f"fastdiff analyze {run}")
    return facts
