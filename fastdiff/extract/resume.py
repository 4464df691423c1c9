"""What an output directory holds, and whether extraction may write there.

    empty or absent              extract
    store of the same options and inputs    complete: nothing to do
    store of other options       refused, unless it may be overwritten
    `.extracting` and no store   an extraction was cut off here: start again
    anything else                refused, even with overwrite

`.extracting` stands in the directory from before the first file until after `store.json`.
"""

from pathlib import Path
from typing import Any

from fastdiff.config import ExtractConfig
from fastdiff.errors import InputError, OptionError
from fastdiff.extract.models import weights_sha256
from fastdiff.progress import SILENT, Progress
from fastdiff.run import canonical_json, fsync_directory, sha256_file, write_text
from fastdiff.store.format import STORE_FILE, VOCABULARY_FILE, StoreMeta
from fastdiff.store.reader import ActivationStore

_MARK = ".extracting"


def is_complete(
    out: Path,
    config: ExtractConfig,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress = SILENT,
) -> bool:
    """Whether `out` already holds the store that `config` makes; changes nothing.

    Raises:
        OptionError: `out` holds something that may not be replaced.
        InputError: `out` holds a damaged store.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise OptionError(f"{out}: is a file; a store is a directory, choose another -o")
    if not (out / STORE_FILE).exists():
        if (out / _MARK).exists():
            if not (resume or overwrite):
                raise OptionError(f"{out}: holds an interrupted extraction; leave out --no-resume to start it again")
            progress.say(f"{out}: an extraction was interrupted here; it starts again")
        elif found := sorted(path.name for path in out.iterdir() if path.name != ".lock"):
            raise OptionError(f"{out}: holds {found[0]} but no store; choose an empty directory for -o")
        return False
    if overwrite:
        return False
    if not resume:
        raise OptionError(f"{out}: holds a store; --overwrite replaces it")
    with ActivationStore(out) as store:
        _require_same(out, store.meta, config)
        wanted = store.meta.vocabulary_sha256
    if wanted is not None and sha256_file(out / VOCABULARY_FILE) != wanted:
        raise InputError(f"{out / VOCABULARY_FILE}: changed since it was written; --overwrite makes the store anew")
    return True


def begin(out: Path, config: ExtractConfig) -> None:
    """Mark `out` as being written, and take away the store that was there."""
    write_text(out / _MARK, canonical_json(config.model_dump(mode="json")) + "\n")
    _remove(out)


def finish(out: Path) -> None:
    """Take the mark away from a complete store."""
    (out / _MARK).unlink(missing_ok=True)
    fsync_directory(out)


def clear(out: Path) -> None:
    """Leave nothing of an extraction that failed."""
    _remove(out)
    (out / _MARK).unlink(missing_ok=True)


def _remove(out: Path) -> None:
    # the mark of a whole store goes first
    (out / STORE_FILE).unlink(missing_ok=True)
    (out / VOCABULARY_FILE).unlink(missing_ok=True)
    for pattern in ("shard-*.h5", ".shard-*.h5.tmp", f".{VOCABULARY_FILE}.tmp", f".{STORE_FILE}.tmp"):
        for path in out.glob(pattern):
            path.unlink()


def _require_same(out: Path, meta: StoreMeta, config: ExtractConfig) -> None:
    """Refuse a store of other options, or of inputs that have changed since."""
    if meta.config is None:
        raise OptionError(f"{out}: holds a store that `fastdiff extract` did not make; choose another -o")
    for name, value in config.model_dump(mode="json").items():
        had = meta.config.get(name)
        if had != value:
            option = "--" + name.replace("_", "-")
            raise OptionError(
                f"{out}: holds a store made with {option} {_shown(had)}, not {_shown(value)}; "
                "choose another -o, or --overwrite to replace it"
            )
    now = {model: weights_sha256(model) for model in (config.base, config.tuned)}
    then = {model.name: model.weights_sha256 for model in meta.models}
    for facts, spec in zip(meta.datasets or [], config.dataset, strict=False):
        if "sha256" in facts:
            now[spec], then[spec] = sha256_file(Path(spec)), facts["sha256"]
    for name, sha256 in now.items():
        if sha256 != then.get(name):
            raise OptionError(f"{out}: {name} has changed since this store was made from it; --overwrite makes it anew")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
