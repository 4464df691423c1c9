"""Made-up results of `fastdiff attribute`: nats per latent, with everything else zero."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastdiff import rundir
from fastdiff.results.attribution import Attribution, DocumentTable, Summary, write_attribution


def write_nats(
    run: Path,
    nats: np.ndarray,
    category: Sequence[int],
    names: Sequence[str],
    *,
    model: str,
    seeds: Sequence[int] = (0,),
) -> None:
    """Finish the stage in a run.

    Args:
        run: Where.
        nats: [S, N, F] of the documents with nats; behind each of them stands a document without, of its category.
        category: [N] of each of them.
        names: Of the categories.
        model: Hash of the crosscoder's weights, the same for every seed.
        seeds: S of them.
    """
    n, both = len(category), 2 * len(category)
    zeros, by_seed = np.zeros(both), np.zeros((len(seeds), both))
    table = DocumentTable(
        document=np.arange(both),
        text=np.arange(both),
        category=np.repeat(np.asarray(category, np.int64), 2),
        held_out=np.zeros(both, bool),
        scored=np.full(both, 9),
        ce=np.zeros((both, 2)),
        has_nats=np.tile([True, False], n),
        steps=np.tile([3, 0], n),
        layer=zeros,
        latents=by_seed,
        offset=by_seed,
        error=by_seed,
        left_out=zeros,
        bos=zeros,
    )
    summary = Summary(
        state="checked", seeds=list(seeds), categories=list(names), unigram_entropy=dict.fromkeys(names, 5.0), tau=0.05,
        dict_size=nats.shape[2],
    )  # fmt: skip
    outputs = write_attribution(run / "attribution", Attribution(summary, table, nats.astype(np.float32)))
    rundir.finish(run / "attribution", "attribute", {}, {f"seed-{seed}": model for seed in seeds}, outputs)
