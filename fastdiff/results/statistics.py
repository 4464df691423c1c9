"""Files of `<dir>/compare/` beside the verdict: the paper's view of specific latents by category, the demo's truth."""

from pathlib import Path

from fastdiff.rundir import read_json

STATISTICS = "statistics.json"
STATISTICS_SCHEMA = 1
TRUTH_SCHEMA = 1


def compared_runs(compare: Path) -> dict[str, Path]:
    """Run directories of a comparison by the names it gives them.

    Args:
        compare: `<dir>/compare`.

    Raises:
        InputError: `statistics.json` is missing, damaged, or of another schema.
    """
    runs = read_json(compare / STATISTICS, STATISTICS_SCHEMA, "fastdiff compare")["runs"]
    return {run["name"]: compare.parent / run["path"] for run in runs}
