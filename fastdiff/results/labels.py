"""`<run>/annotate/labels.jsonl`: what an annotator says of the latents, one JSON object per labelled latent."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fastdiff import rundir
from fastdiff.errors import InputError
from fastdiff.results.validation import validated

DIRECTORY = "annotate"
LABELS = "labels.jsonl"
# categories that are none: a label that names no category, and a latent without a label
UNINTERPRETABLE = "uninterpretable"
UNLABELLED = "unlabelled"


class Label(BaseModel):
    """What an annotator says of one latent.

    Attributes:
        latent: Its index.
        label: In words.
        category: The category it stands for, or `UNINTERPRETABLE`.
        confidence: 0 to 1; None where the annotator gives none.
        annotator: Who says so.
        top_tokens: On which it fires most strongly.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    latent: int
    label: str
    category: str
    confidence: Annotated[float, Field(allow_inf_nan=False)] | None = None
    annotator: str = ""
    top_tokens: list[str] = []


def write_labels(run: Path, labels: Iterable[Label]) -> None:
    """Write the file, whole or not at all.

    Raises:
        ResourceError: The disk is full.
    """
    lines = [json.dumps(label.model_dump(), ensure_ascii=False) + "\n" for label in labels]
    rundir.write_text(run / DIRECTORY / LABELS, "".join(lines))


def read_labels(run: Path) -> dict[int, Label]:
    """The labels of a run, by latent.

    Raises:
        InputError: `annotate` has not run, or its file is damaged or has changed.
    """
    rundir.require_done(run / DIRECTORY, f"fastdiff annotate {run}")
    path, labels = run / DIRECTORY / LABELS, {}
    try:
        # not splitlines, which also splits at U+0085 and U+2028, and tokens hold those
        lines = path.read_text(encoding="utf-8").split("\n")
        values: list[tuple[int, Any]] = [(i, json.loads(line)) for i, line in enumerate(lines, start=1) if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON lines ({error})") from error
    for i, value in values:
        label = validated(Label, value, f"{path}: line {i}", f"run `fastdiff annotate {run}` again")
        labels[label.latent] = label
    return labels


def require_labelled(run: Path) -> dict[str, dict[str, Any]]:
    """`DONE.json` of a run's analysis and annotation, once it is sure that the labels are of this very analysis.

    Raises:
        InputError: One has not run, one of its files has changed, or the labels are of another analysis.
    """
    analysis = rundir.require_done(run / "analysis", f"fastdiff analyze {run}")
    annotated = rundir.require_done(run / DIRECTORY, f"fastdiff annotate {run}")
    if annotated["inputs"] != analysis["outputs"]:
        raise InputError(f"{run / DIRECTORY}: labels another analysis; run `fastdiff annotate {run}` again")
    return {"analysis": analysis, DIRECTORY: annotated}
