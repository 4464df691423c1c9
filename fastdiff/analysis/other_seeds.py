"""The latents that one model alone has in the crosscoders of a run's other seeds: counted, and not shown."""

from pathlib import Path

import numpy as np

from fastdiff.analysis.measure import concepts_of_sides, latent_table, one_pass
from fastdiff.config import AnalyzeConfig
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.device import resolve_device
from fastdiff.progress import Progress
from fastdiff.results.seeds import SIDES, SeedLatents
from fastdiff.store.reader import ActivationStore


def other_seeds(
    store: ActivationStore,
    others: dict[int, Path],
    n_rows: int,
    rows: np.ndarray,
    config: AnalyzeConfig,
    progress: Progress,
) -> SeedLatents:
    """Go through the store once for each crosscoder, one at a time.

    Args:
        store: The activations.
        others: Directories of the crosscoders by seed; they read what the analysed one reads.
        n_rows: Rows to read.
        rows: Which of these are in use, (n,), ascending.
        config: The thresholds of the analysed seed.
        progress: Where to report.

    Raises:
        InputError: A directory holds no crosscoder that can be read.
    """
    found = [SeedLatents.none(max(1, len(store.meta.sources or [])))]
    for seed, directory in others.items():
        crosscoder, _ = load_crosscoder(directory)
        crosscoder.to(resolve_device(config.device))
        sums, firing, _ = one_pass(store, crosscoder, n_rows, rows, config.batch_size, 0, progress)
        table = latent_table(crosscoder, sums, firing, len(rows), config)
        concept = concepts_of_sides(store, crosscoder, rows, table, config, progress)
        latent = np.flatnonzero(table["specific"] != "")
        side = np.array([SIDES.index(name) for name in table["specific"][latent]], np.int64)
        counts = ", ".join(f"{(side == i).sum()} only {name}" for i, name in reversed(list(enumerate(SIDES))))
        progress.say(f"analyze: seed {seed}: by latent scaling {counts}")
        found.append(
            SeedLatents(
                seed=np.full(len(latent), seed, np.int64),
                latent=latent,
                side=side,
                concept=concept[latent].astype(np.int64),
                count=firing.count[latent],
                documents_by_source=firing.documents_by_source[latent],
                mean_by_source=firing.mean_by_source[latent],
                squares_by_source=firing.squares_by_source[latent],
                peaks_by_source=firing.peaks_by_source[latent],
            )
        )
    return SeedLatents.joined(found)
