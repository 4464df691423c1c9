"""The command line: parse, call one function, print. Torch is imported inside commands only.

Precedence: option > FASTDIFF_<COMMAND>_<OPTION> > configuration file > default. Results go to stdout, everything
else to stderr. Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input, 4 out of a resource, 5 remote service,
6 locked, 129 terminal closed while training, 130 interrupted, 143 terminated.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import fastdiff
from fastdiff.cli_options import (
    DIRECTORY,
    EXISTING,
    RUN,
    StageCommand,
    configured,
    print_result,
    progress_of,
    replacing,
    resolve,
    shared,
)

if TYPE_CHECKING:
    from fastdiff.progress import Progress
    from fastdiff.results.trust import Name


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "FASTDIFF",
        "show_default": True,
    }
)
@click.version_option(fastdiff.__version__, package_name="fastdiff")
def cli() -> None:
    """What changed inside a language model when it was fine-tuned?

    \b
    fastdiff demo                                      see it work, offline
    fastdiff extract --base A --tuned B --dataset texts.jsonl -o acts/
    fastdiff train acts/ -o run/
    fastdiff attribute run/ && fastdiff analyze run/ && fastdiff annotate run/
    fastdiff compare run/ && fastdiff report run/
    """


@cli.command()
@click.option("-o", "--out", type=DIRECTORY, default=Path("fastdiff-demo"), help="Where everything goes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the models, the order and the crosscoders.")
@click.option("--small", is_flag=True, help="Less text and fewer steps.")
@click.option(
    "--attribute/--no-attribute", default=True, help="Run the models again, for behaviour and nats; else no verdict."
)
@shared
def demo(out: Path, seed: int, small: bool, attribute: bool, as_json: bool, quiet: bool, progress_mode: Any) -> None:
    """Make tiny models with planted differences, offline, and find those differences.

    \b
    fastdiff demo
    """
    from fastdiff.demo.demo import run_demo

    result = run_demo(out, seed, progress_of(progress_mode, quiet), small=small, attribute=attribute)
    lines, facts = _verdict(out / "compare", progress_of(progress_mode, quiet))
    print_result(
        as_json,
        "\n".join([*lines, f"planted truth: {result.sentence}", f"report: {result.report}"]),
        report=result.report,
        **facts,
        recovered=result.n_recovered,
        planted=result.n_planted,
        false_claims=result.n_false,
    )


@cli.command(cls=StageCommand)
@click.option("-o", "--out", type=DIRECTORY, required=True, help="Store directory to create.")
@replacing
@configured
def extract(
    out: Path, resume: bool, overwrite: bool, config_file: Path | None, settings: tuple[str, ...], as_json: bool,
    quiet: bool, progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Run two models over text and store their activations.

    \b
    fastdiff extract --base ./base --tuned ./tuned --layer 0.5 --dataset texts.jsonl -o acts/
    """
    from fastdiff.config import ExtractConfig
    from fastdiff.extraction.harvest import extract as extract_store

    config = resolve(ExtractConfig, "extract", config_file, settings, given)
    store = extract_store(config, out, progress_of(progress_mode, quiet), resume=resume, overwrite=overwrite)
    print_result(as_json, str(store), store=store, left_out=_left_out(store) if as_json else None)


@cli.command(cls=StageCommand)
@click.argument("store", type=EXISTING)
@click.option("-o", "--out", type=DIRECTORY, required=True, help="Run directory to create or continue.")
@replacing
@configured
def train(
    store: Path, out: Path, resume: bool, overwrite: bool, config_file: Path | None, settings: tuple[str, ...],
    as_json: bool, quiet: bool, progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Train a crosscoder on the activations in STORE.

    \b
    fastdiff train acts/ -o run/ --dict-size 32768 --k 100 --steps 20000
    """
    from fastdiff.config import TrainConfig
    from fastdiff.crosscoder.saved import read_config
    from fastdiff.crosscoder.seeds import first_crosscoder
    from fastdiff.crosscoder.train import train_seeds
    from fastdiff.results.trust import TRAINED

    progress = progress_of(progress_mode, quiet)
    config = resolve(TrainConfig, "train", config_file, settings, given, last=(first_crosscoder(out), progress))
    directories = train_seeds(store, out, config, progress, resume=resume, overwrite=overwrite)
    # what training found; a crosscoder of a version before it says nothing
    left_out = read_config(directories[0]).get("left_out")
    trust = _trust(out, TRAINED, progress)
    print_result(
        as_json,
        "\n".join(map(str, directories)),
        run=out,
        crosscoder=directories[0],
        crosscoders=directories,
        left_out=left_out,
        trust=trust,
    )


@cli.command(cls=StageCommand)
@click.argument("run", type=RUN)
@click.option("--store", type=EXISTING, help="The store, if it has moved since training.")
@configured
def attribute(
    run: Path, store: Path | None, config_file: Path | None, settings: tuple[str, ...], as_json: bool, quiet: bool,
    progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Run the models of RUN again: what got better and worse, and how much of it by which latent.

    \b
    fastdiff attribute run/
    """
    from fastdiff.attribution.attribute import attribute as attribute_run
    from fastdiff.config import AttributeConfig
    from fastdiff.results.attribution import DIRECTORY, category_means, read_attribution
    from fastdiff.results.trust import ATTRIBUTED

    progress = progress_of(progress_mode, quiet)
    config = resolve(AttributeConfig, "attribute", config_file, settings, given, last=(run / DIRECTORY, progress))
    directory = attribute_run(run, config, progress, store_path=store)
    found = read_attribution(directory)
    facts = {key: value for key, value in found.summary.model_dump(by_alias=True).items() if key != "schema"}
    trust = _trust(run, ATTRIBUTED, progress)
    print_result(as_json, str(directory), attribution=directory, **facts, means=category_means(found), trust=trust)


@cli.command(cls=StageCommand)
@click.argument("run", type=RUN)
@click.option("--store", type=EXISTING, help="The store, if it has moved since training.")
@configured
def analyze(
    run: Path, store: Path | None, config_file: Path | None, settings: tuple[str, ...], as_json: bool, quiet: bool,
    progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Measure every latent of RUN: classes, latent scaling, examples.

    \b
    fastdiff analyze run/
    """
    from fastdiff.analysis.analyze import analyze as analyze_run
    from fastdiff.config import AnalyzeConfig
    from fastdiff.results.analysis import read_analysis_summary
    from fastdiff.results.trust import ANALYZED

    progress = progress_of(progress_mode, quiet)
    config = resolve(AnalyzeConfig, "analyze", config_file, settings, given, last=(run / "analysis", progress))
    directory = analyze_run(run, config, progress, store_path=store)
    summary = read_analysis_summary(run)
    shown = {
        key: summary.get(key)
        for key in ("left_out", "classes", "specific", "never_fired", "stability", "splice", "quality")
    }
    trust = _trust(run, ANALYZED, progress)
    print_result(as_json, str(directory / "latents.csv"), latents=directory / "latents.csv", **shown, trust=trust)


@cli.command(cls=StageCommand)
@click.argument("run", type=RUN)
@configured
def annotate(
    run: Path, config_file: Path | None, settings: tuple[str, ...], as_json: bool, quiet: bool, progress_mode: Any,
    **given: Any,
) -> None:  # fmt: skip
    """Label the latents of RUN and sort them into categories.

    \b
    fastdiff annotate run/
    """
    from fastdiff.annotation.annotate import annotate as annotate_run
    from fastdiff.config import AnnotateConfig
    from fastdiff.results.labels import DIRECTORY

    progress = progress_of(progress_mode, quiet)
    config = resolve(AnnotateConfig, "annotate", config_file, settings, given, last=(run / DIRECTORY, progress))
    directory = annotate_run(run, config, progress)
    print_result(as_json, str(directory / "labels.jsonl"), labels=directory / "labels.jsonl")


@cli.command(cls=StageCommand)
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option("-o", "--out", type=DIRECTORY, help="Where two runs are compared; one run is compared in place.")
@configured
def compare(
    runs: tuple[Path, ...], out: Path | None, config_file: Path | None, settings: tuple[str, ...], as_json: bool,
    quiet: bool, progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Decide which categories were gained and lost, in one run or between two with the same base.

    \b
    fastdiff compare run/
    fastdiff compare run-it/ run-simpo/ -o compare/
    """
    from fastdiff.comparison.compare import compare as compare_runs
    from fastdiff.config import CompareConfig

    if len(runs) == 1 and out is not None and out.resolve() != runs[0].resolve():
        raise click.UsageError("one run is compared in place; -o is for two runs")
    if len(runs) > 1 and out is None:
        raise click.UsageError("two runs need -o, a directory for the comparison")
    progress, target = progress_of(progress_mode, quiet), out or runs[0]
    config = resolve(CompareConfig, "compare", config_file, settings, given, last=(target / "compare", progress))
    directory = compare_runs(list(runs), target, config, progress_of(progress_mode, True))
    lines, facts = _verdict(directory, progress)
    print_result(as_json, "\n".join(lines), categories=directory / "categories.csv", **facts)


def _verdict(directory: Path, progress: "Progress") -> tuple[list[str], dict[str, Any]]:
    """What a comparison found: a line per sentence and category for people, and all of it for scripts.

    How far it can be trusted goes to stderr and into the facts.
    """
    from fastdiff.results.statistics import compared_runs
    from fastdiff.results.trust import compared
    from fastdiff.results.verdict import facts, lines, read

    found = read(directory / "verdict.json")
    trusted = compared(compared_runs(directory), found)
    for of in trusted:
        progress.say(f"trust in {of.of}: {of.sentence()}")
        for check in of.checks:
            progress.say(f"  {check.line()}")
    trust = [{"of": of.of, "state": of.state, "checks": [check.model_dump() for check in of.checks]} for of in trusted]
    return lines(found), {**facts(found), "trust": trust}


def _trust(run: Path, names: "Sequence[Name]", progress: "Progress") -> list[dict[str, Any]]:
    """How far a stage's result can be trusted: in lines on stderr, and for JSON."""
    from fastdiff.results.trust import run_checks

    checks = run_checks(run, names)
    for check in checks:
        progress.say(f"trust: {check.line()}")
    return [check.model_dump() for check in checks]


@cli.command()
@click.argument("directory", type=RUN)
@shared
def report(directory: Path, as_json: bool, quiet: bool, progress_mode: Any) -> None:
    """Write the one-file HTML report of a run or a comparison.

    \b
    fastdiff report run/
    """
    from fastdiff.reporting.builder import build_report

    path = build_report(directory, progress_of(progress_mode, quiet))
    print_result(as_json, str(path), report=path)


@cli.command()
@click.option("-o", "--out", type=DIRECTORY, required=True, help="Run directory to create or continue.")
@click.option(
    "--attribute/--no-attribute", default=None, help="Run the models again, for behaviour and nats; else the file says."
)
@replacing
@configured
def run(
    out: Path, attribute: bool | None, resume: bool, overwrite: bool, config_file: Path | None,
    settings: tuple[str, ...], as_json: bool, quiet: bool, progress_mode: Any,
) -> None:  # fmt: skip
    """Go the whole road from one configuration file.

    \b
    fastdiff config init > fastdiff.yaml
    fastdiff run -c fastdiff.yaml -o run/ --set train.k=64
    """
    from fastdiff.config import RunConfig
    from fastdiff.pipeline import run_pipeline

    if config_file is None:
        raise click.UsageError("-c FILE is needed; `fastdiff config init > fastdiff.yaml` writes one to fill in")
    if attribute is not None:
        settings = (*settings, f"attribute.enabled={str(attribute).lower()}")
    config = resolve(RunConfig, None, config_file, settings, {})
    path = run_pipeline(config, out, progress_of(progress_mode, quiet), resume=resume, overwrite=overwrite)
    lines, facts = _verdict(out / "compare", progress_of(progress_mode, quiet))
    print_result(as_json, "\n".join([*lines, f"report: {path}"]), report=path, **facts)


@cli.command("import")
@click.argument("sources", nargs=-1, required=True)
@click.option("-o", "--out", type=DIRECTORY, required=True, help="Store directory to create.")
@click.option("--name", "names", multiple=True, help="Name of a model, in the order of the sources; may be repeated.")
@click.option("--dataset-name", help="Tensor or data set to take from each file.")
@click.option("--bits", type=click.Choice(["bfloat16"]), help="What 2-byte values without a float type hold.")
@click.option(
    "--store-dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Type to store; else the sources' own."
)
@click.option("--shard-rows", type=click.IntRange(min=1), default=1_000_000, help="Rows in one shard file.")
@click.option("--token-ids", type=EXISTING, help=".npy or .pt file with the token of each row.")
@click.option("--sequence-ids", type=EXISTING, help=".npy or .pt file with the document of each row.")
@click.option("--bos-token-id", type=int, help="Leave rows of this token out of training; it begins a sequence.")
@click.option(
    "--max-norm",
    type=click.FloatRange(min=0),
    default=3.0,
    help="Leave rows out of use whose norm is over so many times the median. 0: none.",
)
@replacing
@shared
def import_(
    sources: tuple[str, ...], out: Path, resume: bool, overwrite: bool, as_json: bool, quiet: bool, progress_mode: Any,
    **given: Any,
) -> None:  # fmt: skip
    """Make a store from activations that other tools have written.

    SOURCES are activation caches of dictionary_learning or diffing-toolkit, .npy, .safetensors or .h5 files: one with
    all models (rows, models, width), or one per model (rows, width), base first. FILE:NAME takes one of several
    tensors or data sets.

    \b
    fastdiff import base/layer_13_out tuned/layer_13_out -o acts/
    fastdiff import base.npy tuned.npy --token-ids tokens.npy -o acts/
    """
    from fastdiff.store.importers import ImportOptions, import_store

    store = import_store(
        sources, out, ImportOptions(**given), progress_of(progress_mode, quiet), resume=resume, overwrite=overwrite
    )
    print_result(as_json, str(store), store=store, left_out=_left_out(store) if as_json else None)


@cli.command()
@click.argument("path", type=EXISTING)
@click.option("--quick", is_flag=True, help="Leave the activations unread: structure, metadata and columns only.")
@click.option("--threads", type=click.IntRange(min=1), default=2, help="Threads that read and sum.")
@shared
def verify(path: Path, quick: bool, threads: int, as_json: bool, quiet: bool, progress_mode: Any) -> None:
    """Check a store (directory or .h5) or a run directory against its own checksums.

    \b
    fastdiff verify acts/
    fastdiff verify run/
    """
    from fastdiff.store.verify import verify_store
    from fastdiff.store.verify_run import is_run, verify_run

    if is_run(path):
        found = verify_run(path, quick=quick, n_threads=threads, progress=progress_of(progress_mode, quiet))
    else:
        found = verify_store(path, quick=quick, n_threads=threads, progress=progress_of(progress_mode, quiet))
    facts = {"problems": found.problems, "n_problems": found.n_problems, "notes": found.notes, **found.facts}
    print_result(as_json, "\n".join(found.summary()), path=path, sound=not found.n_problems, **facts)
    if found.n_problems:
        click.get_current_context().exit(3)


@cli.command()
@click.option(
    "--size",
    type=click.Choice(["auto", "A", "B", "C"]),
    default="auto",
    help="A: D 3584, F 114,688, k 100. B: D 2304, F 73,728. C: D 256, F 4096, k 32, for CPUs. "
    "auto: A on a GPU of 40 GB, B on a smaller one, C on a CPU.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Tokens in one step, if not those of the size.")
@click.option("--d-model", type=click.IntRange(min=2), help="Width of one model, likewise.")
@click.option("--dict-size", type=click.IntRange(min=1), help="Number of latents, likewise.")
@click.option("--k", type=click.IntRange(min=1), help="Active latents per token, likewise.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="What the products multiply; auto is bfloat16 on CUDA, else float32.",
)
@click.option("--moments", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Adam's moments.")
@click.option("--device", default="auto", help="cuda, cuda:1, cpu or auto.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0 is what torch chooses.")
@click.option("--samples", type=click.IntRange(min=1), default=10, help="Timed samples of each.")
@shared
def benchmark(
    size: str, device: str, threads: int, precision: str, moments: str, samples: int, as_json: bool, quiet: bool,
    progress_mode: Any, **sizes: int | None,
) -> None:  # fmt: skip
    """Measure training steps on this machine, what it would allow, and say what limits them.

    \b
    fastdiff benchmark
    fastdiff benchmark --size B --json
    """
    from fastdiff.benchmark.benchmark import benchmark_command

    found = benchmark_command(
        size, sizes, device, threads, precision=precision, moments=moments, n=samples,
        progress=progress_of(progress_mode, quiet),
    )  # fmt: skip
    print_result(as_json, found.text(), **found.facts())


@cli.group()
def config() -> None:
    """Make and describe configuration files."""


@config.command("init")
def config_init() -> None:
    """Print a configuration file with every field, its default and its meaning.

    \b
    fastdiff config init > fastdiff.yaml
    """
    from fastdiff.config import RunConfig, template

    click.echo(template(RunConfig), nl=False)


@config.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of configuration files, for editors.

    \b
    fastdiff config schema > fastdiff.schema.json
    """
    from fastdiff.config import RunConfig

    click.echo(json.dumps(RunConfig.model_json_schema(), indent=1))


def _left_out(path: Path) -> dict[str, Any]:
    """Which rows of a store are left out of use, for JSON."""
    from fastdiff.store.reader import ActivationStore

    with ActivationStore(path) as store:
        return store.left_out_facts()


def _terminated(_signal: int, _frame: Any) -> NoReturn:
    raise SystemExit(143)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    from fastdiff.errors import FastdiffError
    from fastdiff.memory import is_out_of_memory

    signal.signal(signal.SIGTERM, _terminated)
    # read when torch loads OpenMP: threads that spin while they wait made tiny steps 7 to 12 times slower on a
    # machine whose cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # read when CUDA starts: with other workspaces cuBLAS may add up in another order in every run
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        code = cli.main(arguments, prog_name="fastdiff", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" (see `{context.command_path} --help`)" if context else ""
        click.echo(f"Error: {' '.join(error.format_message().split()).rstrip('.')}{hint}", err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except FastdiffError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        click.echo("Error: out of memory; lower --batch-size or --dict-size", err=True)
        sys.exit(4)
    except OSError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(4 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 1)
    sys.exit(code if isinstance(code, int) else 0)
