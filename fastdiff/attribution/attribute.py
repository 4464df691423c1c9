"""The attribution stage: how much of what the tuned model does better or worse runs through which latent.

`fastdiff.results.attribution` says what it writes into `<run>/attribution`, `nats` what that means, `choose` of which
documents. Both models are opened again; all seeds of the run share their passes. A run whose models cannot be run as
they were is "not checked", with the reason and what to do about it, and everything else goes on without.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdiff import rundir
from fastdiff.attribution.choose import choice_of
from fastdiff.attribution.tracing import CALLER, Tracer
from fastdiff.config import AttributeConfig
from fastdiff.crosscoder.inputs import chosen_models
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.seeds import finished_seeds, store_of
from fastdiff.errors import InputError, OptionError
from fastdiff.extraction.models import quiet
from fastdiff.patching.documents import DocumentIndex
from fastdiff.patching.opening import find_target
from fastdiff.patching.refusal import CannotRun
from fastdiff.progress import SILENT, Progress
from fastdiff.results.attribution import (
    BRANCHES,
    DIRECTORY,
    OUTPUTS,
    SCHEMA,
    SUMMARY,
    Attribution,
    Summary,
    read_summary,
    write_attribution,
)
from fastdiff.store.reader import ActivationStore


def attribute(
    run: Path, config: AttributeConfig, progress: Progress = SILENT, *, store_path: Path | None = None
) -> Path:
    """Trace the change of both models' cross entropy to the latents of all finished seeds of a run.

    Args:
        run: A run directory that `train` has finished.
        config: How.
        progress: Where to report.
        store_path: The store, if it is no longer where `train` read it.

    Returns:
        `<run>/attribution`.

    Raises:
        OptionError: There is no such model or device.
        InputError: A crosscoder or the store is missing, damaged or changed; or the models cannot be run, and an
            earlier result stands.
        ResourceError: Out of memory.
        FastdiffError: A cross entropy or a gradient is NaN or infinite.
        LockedError: Another process writes to the run.
    """
    target, settings = run / DIRECTORY, config.model_dump(exclude={"enabled"})
    with rundir.locked(run) as lock:
        seeds, store_sha256 = _seeds(run, store_path, progress)
        inputs = {"store": store_sha256, **{f"seed-{seed}": sha256 for seed, (_, sha256) in seeds.items()}}
        stage = lock.stage(target, "attribute", settings, inputs, OUTPUTS, schemas={SUMMARY: SCHEMA})
        # models that could not be run may have been put back since
        if stage.up_to_date() and read_summary(target).state == "checked":
            progress.say(f"attribute: {target} is up to date")
            return target
        with ActivationStore(store_path or store_of(run)) as store:
            if store.sha256() != store_sha256:
                raise InputError(f"{store.path}: not the store these crosscoders were trained on (its hash differs)")
            found = _attribute(store, {seed: directory for seed, (directory, _) in seeds.items()}, config, progress)
        checked = found.summary.state == "checked"
        if not checked and _stands(target, inputs):
            raise InputError(f"{found.summary.reason}; {found.summary.remedy}; the earlier result in {target} stands")
        with stage if checked else replace(stage, outputs=(SUMMARY,)):
            write_attribution(target, found)
    return target


def _stands(target: Path, inputs: dict[str, str]) -> bool:
    """Whether there is a whole result of the same store and crosscoders that was checked, by other settings."""
    try:
        done = rundir.require_done(target, "")
    except InputError:
        return False
    return done["inputs"] == inputs and set(done["outputs"]) == set(OUTPUTS)


def _seeds(run: Path, store_path: Path | None, progress: Progress) -> tuple[dict[int, tuple[Path, str]], str]:
    """The finished crosscoders of one store, each with the hash of its weights, and the hash of the store."""
    finished = finished_seeds(run)
    if not finished:
        raise InputError(f"{run}: has no finished crosscoder; run `fastdiff train STORE -o {run}` first")
    trained = {
        seed: rundir.require_done(directory, f"fastdiff train STORE -o {run} --seed {seed}")
        for seed, directory in finished.items()
    }
    stores = {done["inputs"]["store"] for done in trained.values()}
    if len(stores) == 1:
        wanted = stores.pop()
    else:
        with ActivationStore(store_path or store_of(run)) as store:
            wanted = store.sha256()
    seeds = {}
    for seed, done in trained.items():
        if done["inputs"]["store"] == wanted:
            seeds[seed] = finished[seed], done["outputs"]["model.safetensors"]
        else:
            progress.say(f"attribute: {finished[seed]}: of another store, left out")
    if not seeds:
        raise InputError(f"{run}: no crosscoder was trained on this store (its hash differs); give the right --store")
    return seeds, wanted


def _attribute(
    store: ActivationStore, seeds: dict[int, Path], config: AttributeConfig, progress: Progress
) -> Attribution:
    """All of it, or why it cannot be had."""
    models = [info.name for info in store.meta.models]
    tuned = _tuned(config.tuned, models)
    infos = [store.meta.models[number] for number in sorted({0, min(tuned, len(models) - 1)})]
    hook = infos[-1].hook
    about: dict[str, Any] = {
        "branch": hook if hook in BRANCHES else None,
        "models": [info.name for info in infos],
        "layer": infos[-1].layer,
        "hook": hook,
        "tau": config.tau,
    }
    try:
        crosscoders, holdout = _crosscoders(store, seeds, tuned, progress)
        about |= {"seeds": list(crosscoders), "dict_size": next(iter(crosscoders.values())).dict_size}
        targets = [find_target(store, index, number, CALLER) for index, number in enumerate((0, tuned))]
        if (targets[0].layer, targets[0].hook) != (targets[1].layer, targets[1].hook):
            where = " and ".join(f"{of.source.name} at {of.hook} of layer {of.layer}" for of in targets)
            raise CannotRun(
                f"{store.path}: has {where}, between which there is no path", "extract both at one layer and hook"
            )
        if store.must_be_measured:
            progress.say(f"attribute: {store.path} has no column norms; its rows are measured")
        index = DocumentIndex(store, CALLER)
        choice = choice_of(store, index, holdout)
        with quiet():
            return Tracer(store, crosscoders, targets, index, choice, config, progress).result(about)
    except CannotRun as error:
        progress.say(f"attribute: not checked: {error}")
        return Attribution(Summary(state="not checked", reason=error.reason, remedy=error.remedy, **about), None, None)


def _tuned(wanted: str, models: Sequence[str]) -> int:
    """Number of the model that is compared with model 0.

    Raises:
        OptionError: There is no such model, or it is the base.
    """
    named = [i for i, name in enumerate(models) if wanted in (name, Path(name).name)]
    number = int(wanted) if wanted.isdecimal() else named[0] if len(named) == 1 else -1
    # a store of one model is not wrong, but cannot be checked
    if number < 1 or (number >= len(models) and (len(models) > 1 or wanted != "1")):
        have = ", ".join(f"{i}: {name}" for i, name in enumerate(models))
        raise OptionError(f"--tuned {wanted}: name one model of the store other than 0, by its number ({have})")
    return number


def _crosscoders(
    store: ActivationStore, seeds: dict[int, Path], tuned: int, progress: Progress
) -> tuple[dict[int, Crosscoder], float]:
    """Those that read both models, on the CPU, and the share of documents that none of them was trained on.

    Raises:
        CannotRun: There is none.
    """
    if store.n_models < 2:
        raise CannotRun(f"{store.path}: holds one model only", "extract a base and a tuned model")
    if store.n_models > 2:
        name = store.meta.models[tuned].name
        progress.say(f"attribute: model {tuned} ({name}) against model 0; --tuned chooses another")
    found: dict[int, Crosscoder] = {}
    holdout, refusals = 1.0, []
    for seed, directory in seeds.items():
        crosscoder, facts = load_crosscoder(directory)
        numbers = chosen_models(crosscoder.inputs, store.n_models)
        first = next(iter(found.values()), crosscoder)
        if len(numbers) < 2:
            why = (f"{directory}: reads one model only", "train with --inputs all or --inputs difference")
        elif not {0, tuned} <= set(numbers):
            why = (f"{directory}: does not read models 0 and {tuned}", "choose another --tuned, or train with both")
        elif crosscoder.dict_size != first.dict_size:
            why = (f"{directory}: has {crosscoder.dict_size} latents, not {first.dict_size}", "train all seeds alike")
        else:
            found[seed] = crosscoder.requires_grad_(False)
            holdout = min(holdout, float(facts["train"]["holdout"]))
            continue
        refusals.append(why)
    if not found:
        raise CannotRun(*refusals[0])
    for reason, remedy in refusals:
        progress.say(f"attribute: {reason}, left out; {remedy}")
    return found, holdout
