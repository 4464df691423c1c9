"""Which latents carry a category's change: nats per latent, from the files of `fastdiff attribute`.

`analyze` gives those with most nats in a category examples, `report` shows them as the cards of the category's row;
both ask here, so that a row's latents always have their contexts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdiff import rundir
from fastdiff.results.attribution import DIRECTORY, read_attribution

# how many latents stand for a row
ROW_LATENTS = 5


@dataclass(frozen=True)
class LatentNats:
    """Nats per scored token through each latent of one crosscoder, positive where the tuned model does better.

    Attributes:
        categories: C names.
        nats: (C, F) mean over the category's documents with nats; NaN for a category without any.
    """

    categories: list[str]
    nats: NDArray[np.float64]

    def of_row(self, category: str, sign: int) -> list[int]:
        """The latents with most nats in a category, most first; none for an unknown category.

        Args:
            category: Its name.
            sign: 1 for a gain, -1 for a loss: only nats of this sign count; 0: of either.
        """
        if category not in self.categories:
            return []
        nats = self.nats[self.categories.index(category)]
        size = np.nan_to_num(np.abs(nats) if sign == 0 else sign * nats)
        most = np.argsort(-size, kind="stable")[:ROW_LATENTS]
        return [int(latent) for latent in most if size[latent] > 0]

    def of_any_row(self) -> list[int]:
        """The latents of every row whatever its change, ascending: it is decided later."""
        return sorted({latent for name in self.categories for sign in (1, -1) for latent in self.of_row(name, sign)})


def read_latent_nats(run: Path, seed: int, model_sha256: str) -> tuple[LatentNats | None, dict[str, str]]:
    """Nats of the latents of one seed's crosscoder, and the hashes of the files they are from.

    Args:
        run: A run directory.
        seed: Of the crosscoder.
        model_sha256: Hash of its weights.

    Returns:
        None and no hashes where `fastdiff attribute` has not run, could not check anything, or ran on other
        crosscoders.

    Raises:
        InputError: A file of it is missing or damaged.
    """
    directory = run / DIRECTORY
    if not (directory / rundir.DONE).exists():
        return None, {}
    done = rundir.require_done(directory, f"fastdiff attribute {run}")
    if done["inputs"].get(f"seed-{seed}") != model_sha256:
        return None, {}
    hashes = {f"{DIRECTORY}/{name}": sha256 for name, sha256 in done["outputs"].items()}
    found = read_attribution(directory)
    if found.documents is None or found.nats is None or seed not in found.summary.seeds:
        return None, hashes
    nats = found.nats[found.summary.seeds.index(seed)]
    category = found.documents.category[found.documents.has_nats]
    means = np.full((len(found.summary.categories), nats.shape[1]), np.nan)
    for code in np.unique(category):
        means[code] = nats[category == code].mean(axis=0, dtype=np.float64)
    return LatentNats(found.summary.categories, means), hashes
