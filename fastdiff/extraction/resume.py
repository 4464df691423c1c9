"""What an output directory holds, and whether extraction may write there.

    empty or absent                         extract
    store of the same options and inputs    complete: nothing to do
    `.extracting` and `.journal`            cut off: continue behind the rows that the journal acknowledges
    `.extracting` without `.journal`        cut off before a row was acknowledged: start again
    store, or journal, of other options     refused, unless it may be overwritten
    anything else                           refused, even with overwrite

`.extracting` stands in the directory from before the first file until after `store.json`. It holds the metadata of
the store that is being made, so that a continuation can be compared with it like with a complete store.
"""

from enum import Enum, auto
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastdiff.config import ExtractConfig
from fastdiff.errors import InputError, OptionError
from fastdiff.extraction.models import weights_sha256
from fastdiff.progress import SILENT, Progress
from fastdiff.rundir import canonical_json, fsync_directory, read_json, sha256_file, write_text
from fastdiff.store.directory import remove_store
from fastdiff.store.format import STORE_FILE, VOCABULARY_FILE, StoreMeta
from fastdiff.store.journal import JOURNAL
from fastdiff.store.left_out import default_max_norm
from fastdiff.store.reader import ActivationStore

_MARK = ".extracting"


class Found(Enum):
    """What stands in an output directory."""

    NOTHING = auto()
    CUT_OFF = auto()
    COMPLETE = auto()


def look(
    out: Path,
    config: ExtractConfig,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress = SILENT,
) -> Found:
    """What `out` holds of the store that `config` makes; changes nothing.

    Returns:
        COMPLETE if there is nothing to do, CUT_OFF if there are rows, of whatever options, that an interrupted
        extraction has kept, NOTHING if what may be there does not count.

    Raises:
        OptionError: `out` holds something that may not be replaced.
        InputError: `out` holds a damaged store.
    """
    if not out.exists():
        return Found.NOTHING
    if not out.is_dir():
        raise OptionError(f"{out}: is a file; a store is a directory, choose another -o")
    if not (out / STORE_FILE).exists():
        return _look_at_the_unfinished(out, resume, overwrite, progress)
    if overwrite:
        return Found.NOTHING
    if not resume:
        raise OptionError(f"{out}: holds a store; --overwrite replaces it")
    with ActivationStore(out) as store:
        _require_same(out, store.meta, config)
        wanted = store.meta.vocabulary_sha256
    if wanted is not None and sha256_file(out / VOCABULARY_FILE) != wanted:
        raise InputError(f"{out / VOCABULARY_FILE}: changed since it was written; --overwrite makes the store anew")
    return Found.COMPLETE


def _look_at_the_unfinished(out: Path, resume: bool, overwrite: bool, progress: Progress) -> Found:
    if not (out / _MARK).exists():
        ours = (".lock", f".{_MARK}.tmp")
        if found := sorted(path.name for path in out.iterdir() if path.name not in ours):
            raise OptionError(f"{out}: holds {found[0]} but no store; choose an empty directory for -o")
        return Found.NOTHING
    if overwrite:
        return Found.NOTHING
    if not resume:
        raise OptionError(f"{out}: holds an interrupted extraction; leave out --no-resume to continue it")
    if not keeps_rows(out):
        progress.say(f"{out}: an extraction was interrupted here before it had kept a row; it starts again")
        return Found.NOTHING
    return Found.CUT_OFF


def keeps_rows(out: Path) -> bool:
    """Whether `out` holds rows of an extraction that was cut off."""
    return (out / JOURNAL).exists()


def is_tidy(out: Path) -> bool:
    """Whether nothing is left in `out` of the work on a store that is complete."""
    return not (out / _MARK).exists() and not (out / JOURNAL).exists()


def begin(out: Path, meta: dict[str, Any]) -> None:
    """Mark `out` as being written, and take away what was there.

    Args:
        out: Directory of the store.
        meta: Metadata of the store without shards and statistics.
    """
    # first, so that a journal never stands beside the mark of another extraction
    if keeps_rows(out):
        (out / JOURNAL).unlink()
        fsync_directory(out)
    write_text(out / _MARK, canonical_json(meta) + "\n")
    _remove(out)


def require_same(out: Path, config: ExtractConfig) -> None:
    """Refuse to continue an extraction of other options, or of inputs that have changed since.

    Raises:
        OptionError: They differ.
        InputError: What was begun can no longer be read.
    """
    _require_same(out, _begun(out), config)


def require_continuation(out: Path, meta: dict[str, Any]) -> None:
    """Refuse to continue what was begun with other facts than options and inputs: another tokenizer or library.

    Args:
        out: Directory of a store that was cut off.
        meta: Metadata of the store that would be made now.

    Raises:
        OptionError: They differ.
    """
    then, now = _begun(out).to_json(), StoreMeta.model_validate(meta).to_json()
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            raise OptionError(
                f"{out}: the extraction that was interrupted here had other {name}: {_difference(then, now, name)}; "
                "choose another -o, or --overwrite to start again"
            )


def _difference(then: dict[str, Any], now: dict[str, Any], name: str) -> str:
    """The first part of a field that differs."""
    before, after = then.get(name), now.get(name)
    if isinstance(before, dict) and isinstance(after, dict):
        key = min(key for key in {*before, *after} if before.get(key) != after.get(key))
        return f"{key} {before.get(key)}, not {after.get(key)}"
    return f"{_shown(before)}, not {_shown(after)}"


def _begun(out: Path) -> StoreMeta:
    """Metadata of the store that an interrupted extraction was making."""
    try:
        return StoreMeta.model_validate(read_json(out / _MARK, schema=None))
    except (InputError, ValidationError) as error:
        raise InputError(f"{out / _MARK}: damaged, so it cannot be continued; --overwrite starts again") from error


def finish(out: Path) -> None:
    """Take the marks of work away from a complete store."""
    for name in (JOURNAL, _MARK):
        (out / name).unlink(missing_ok=True)
    fsync_directory(out)


def clear(out: Path) -> None:
    """Leave nothing of an extraction that failed."""
    _remove(out)
    (out / _MARK).unlink(missing_ok=True)


def _remove(out: Path) -> None:
    remove_store(out)
    for name in (VOCABULARY_FILE, f".{VOCABULARY_FILE}.tmp", f".{_MARK}.tmp"):
        (out / name).unlink(missing_ok=True)


def _require_same(out: Path, meta: StoreMeta, config: ExtractConfig) -> None:
    """Refuse a store of other options, or of inputs that have changed since."""
    if meta.config is None:
        raise OptionError(f"{out}: holds a store that `fastdiff extract` did not make; choose another -o")
    for name, value in config.model_dump(mode="json").items():
        had = meta.config.get(name)
        # a store from before the option is held against the default rule whenever it is used
        if name == "max_norm" and name not in meta.config:
            had = default_max_norm(config.hook)
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
