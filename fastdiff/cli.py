"""The command line: parse, call one function, print. Torch is imported inside commands only.

Precedence: option > FASTDIFF_<COMMAND>_<OPTION> > configuration file > default. Results go to stdout, everything
else to stderr. Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input, 4 out of a resource, 5 remote service,
6 locked, 130 interrupted, 143 terminated.
"""

import errno
import json
import os
import signal
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

import fastdiff

if typing.TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from fastdiff.config import Stage, StageConfig
    from fastdiff.progress import Progress

_DIRECTORY = click.Path(file_okay=False, path_type=Path)
Command = Callable[..., None]


class _Existing(click.Path):
    """A path that must be there; if not, that is bad input (exit 3) like any other missing file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        from fastdiff.errors import InputError

        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.exists():
            raise InputError(f"{path}: no such {'file or directory' if self.file_okay else 'directory'}")
        return path


_EXISTING_DIRECTORY = _Existing(file_okay=False)
_EXISTING = _Existing()


class _StageCommand(click.Command):
    """A command whose options are the fields of a stage's configuration.

    The fields are read when the command's parameters are first asked for, so that `fastdiff --help` does not
    import pydantic.
    """

    _complete = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All parameters."""
        if not self._complete:
            self._complete = True
            self.params += [_option(name, field) for name, field in _model(str(self.name)).model_fields.items()]
        return super().get_params(ctx)


def _model(stage: str) -> "type[StageConfig]":
    from fastdiff import config

    found: type[StageConfig] = getattr(config, f"{stage.capitalize()}Config")
    return found


def _option(name: str, field: "FieldInfo") -> click.Option:
    """One option; its default stays with the configuration, so that a file's value can stand below it."""
    flag = "--" + name.replace("_", "-")
    kind = field.annotation
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    many = typing.get_origin(kind) is list
    if field.is_required():
        note = "[required]"
    elif field.default is None:
        note = ""
    else:
        default = f"{field.default:.5g}" if isinstance(field.default, float) else field.default
        note = f"[default: {default}]"
    text = f"{field.description} {note}".strip()
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    if typing.get_origin(kind) is Literal:
        return click.Option([flag], type=click.Choice(typing.get_args(kind)), help=text)
    return click.Option([flag], type=str if many else kind, multiple=many, help=text)


def _shared(command: Command) -> Command:
    """Options of every command."""
    for decorate in (
        click.option(
            "--progress", "progress_mode", type=click.Choice(["auto", "on", "off"]), default="auto",
            envvar="FASTDIFF_PROGRESS",
            help="Progress on stderr: bars on a terminal and lines elsewhere, bars, or nothing.",
        ),
        click.option("-q", "--quiet", is_flag=True, envvar="FASTDIFF_QUIET", help="Print nothing but the result."),
        click.option("--json", "as_json", is_flag=True, envvar="FASTDIFF_JSON", help="Print the result as JSON."),
    ):  # fmt: skip
        command = decorate(command)
    return command


def _configured(command: Command) -> Command:
    """Options of commands that take a configuration."""
    for decorate in (
        click.option(
            "-c", "--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
            envvar="FASTDIFF_CONFIG", help="YAML file with a section per stage.",
        ),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a field; may be repeated."),
    ):  # fmt: skip
        command = decorate(command)
    return _shared(command)


def _replacing(command: Command) -> Command:
    """Options of commands that leave results of another configuration alone."""
    command = click.option("--overwrite", is_flag=True, help="Replace results of another configuration.")(command)
    return click.option("--resume/--no-resume", default=True, help="Continue what was cut off, or start anew.")(command)


def _resolve(
    model: "type[Stage]",
    section: str | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    given: dict[str, Any],
) -> "Stage":
    """Merge defaults, the file's section, given options and --set, and check the whole."""
    import yaml

    from fastdiff.config import validated

    values: dict[str, Any] = {}
    if config_file is not None:
        try:
            loaded = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise click.UsageError(f"{config_file}: not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(loaded, dict):
            raise click.UsageError(f"{config_file}: expected sections, found {type(loaded).__name__}")
        for name, fields in loaded.items():
            if name not in ("extract", "train", "analyze", "annotate", "compare"):
                raise click.UsageError(f"{config_file}: unknown section {name!r}")
            # a section whose every line is a comment is None
            if not isinstance(fields, dict | None):
                raise click.UsageError(f"{config_file}: section {name} holds {fields!r}, not KEY: VALUE lines")
        sections = {name: fields or {} for name, fields in loaded.items()}
        values = sections if section is None else sections.get(section, {})
    values |= {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v not in (None, ())}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--set {setting}: expected KEY=VALUE")
        place = values
        *path, last = key.replace("-", "_").split(".")
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"--set {setting}: {part!r} is a value, not a section")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.UsageError(f"--set {setting}: the value is not YAML") from error
    return validated(model, values)


def _progress(mode: Literal["auto", "on", "off"], quiet: bool) -> "Progress":
    from fastdiff.progress import Progress

    return Progress(mode, quiet)


def _print(as_json: bool, text: str, **facts: Any) -> None:
    if as_json:
        click.echo(json.dumps({"schema": 1, **facts}, default=str, ensure_ascii=False))
    else:
        click.echo(text)


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
    fastdiff analyze run/ && fastdiff annotate run/ && fastdiff compare run/ && fastdiff report run/
    """


@cli.command()
@click.option("-o", "--out", type=_DIRECTORY, default=Path("fastdiff-demo"), help="Where everything goes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the models, the order and the crosscoders.")
@click.option("--small", is_flag=True, help="Less text and fewer steps.")
@_shared
def demo(out: Path, seed: int, small: bool, as_json: bool, quiet: bool, progress_mode: Any) -> None:
    """Make tiny models with planted differences, offline, and find those differences.

    \b
    fastdiff demo
    """
    from fastdiff.demo.demo import run_demo
    from fastdiff.run import read_json

    result = run_demo(out, seed, _progress(progress_mode, quiet), small=small)
    verdict = read_json(out / "compare" / "statistics.json")["verdict"]
    _print(
        as_json,
        "\n".join([*verdict, f"planted truth: {result.sentence}", f"report: {result.report}"]),
        report=result.report,
        verdict=verdict,
        recovered=result.n_recovered,
        planted=result.n_planted,
    )


@cli.command(cls=_StageCommand)
@click.option("-o", "--out", type=_DIRECTORY, required=True, help="Store directory to create.")
@_replacing
@_configured
def extract(
    out: Path, resume: bool, overwrite: bool, config_file: Path | None, settings: tuple[str, ...], as_json: bool,
    quiet: bool, progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Run two models over text and store their activations.

    \b
    fastdiff extract --base ./base --tuned ./tuned --layer 0.5 --dataset texts.jsonl -o acts/
    """
    from fastdiff.config import ExtractConfig
    from fastdiff.extract.harvest import extract as extract_store

    config = _resolve(ExtractConfig, "extract", config_file, settings, given)
    store = extract_store(config, out, _progress(progress_mode, quiet), resume=resume, overwrite=overwrite)
    _print(as_json, str(store), store=store)


@cli.command(cls=_StageCommand)
@click.argument("store", type=_EXISTING)
@click.option("-o", "--out", type=_DIRECTORY, required=True, help="Run directory to create or continue.")
@_replacing
@_configured
def train(
    store: Path, out: Path, resume: bool, overwrite: bool, config_file: Path | None, settings: tuple[str, ...],
    as_json: bool, quiet: bool, progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Train a crosscoder on the activations in STORE.

    \b
    fastdiff train acts/ -o run/ --dict-size 32768 --k 100 --steps 20000
    """
    from fastdiff.config import TrainConfig
    from fastdiff.crosscoder.train import train as train_crosscoder

    config = _resolve(TrainConfig, "train", config_file, settings, given)
    directory = train_crosscoder(
        store, out, config, _progress(progress_mode, quiet), resume=resume, overwrite=overwrite
    )
    _print(as_json, str(directory), run=out, crosscoder=directory)


@cli.command(cls=_StageCommand)
@click.argument("run", type=_EXISTING_DIRECTORY)
@click.option("--store", type=_EXISTING, help="The store, if it has moved since training.")
@_configured
def analyze(
    run: Path, store: Path | None, config_file: Path | None, settings: tuple[str, ...], as_json: bool, quiet: bool,
    progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Measure every latent of RUN: classes, latent scaling, examples.

    \b
    fastdiff analyze run/
    """
    from fastdiff.analyze.analyze import analyze as analyze_run
    from fastdiff.config import AnalyzeConfig
    from fastdiff.run import read_json

    config = _resolve(AnalyzeConfig, "analyze", config_file, settings, given)
    directory = analyze_run(run, config, _progress(progress_mode, quiet), store_path=store)
    summary = read_json(directory / "summary.json")
    shown = {key: summary[key] for key in ("classes", "specific", "never_fired", "quality")}
    _print(as_json, str(directory / "latents.csv"), latents=directory / "latents.csv", **shown)


@cli.command(cls=_StageCommand)
@click.argument("run", type=_EXISTING_DIRECTORY)
@_configured
def annotate(
    run: Path, config_file: Path | None, settings: tuple[str, ...], as_json: bool, quiet: bool, progress_mode: Any,
    **given: Any,
) -> None:  # fmt: skip
    """Label the latents of RUN and sort them into categories.

    \b
    fastdiff annotate run/
    """
    from fastdiff.annotate.annotate import annotate as annotate_run
    from fastdiff.config import AnnotateConfig

    config = _resolve(AnnotateConfig, "annotate", config_file, settings, given)
    directory = annotate_run(run, config, _progress(progress_mode, quiet))
    _print(as_json, str(directory / "labels.jsonl"), labels=directory / "labels.jsonl")


@cli.command(cls=_StageCommand)
@click.argument("runs", nargs=-1, required=True, type=_EXISTING_DIRECTORY)
@click.option("-o", "--out", type=_DIRECTORY, help="Where two runs are compared; one run is compared in place.")
@_configured
def compare(
    runs: tuple[Path, ...], out: Path | None, config_file: Path | None, settings: tuple[str, ...], as_json: bool,
    quiet: bool, progress_mode: Any, **given: Any,
) -> None:  # fmt: skip
    """Say which categories were gained and lost, in one run or between two with the same base.

    \b
    fastdiff compare run/
    fastdiff compare run-it/ run-simpo/ -o compare/
    """
    from fastdiff.compare.compare import compare as compare_runs
    from fastdiff.config import CompareConfig
    from fastdiff.run import read_json

    if len(runs) == 1 and out is not None and out.resolve() != runs[0].resolve():
        raise click.UsageError("one run is compared in place; -o is for two runs")
    if len(runs) > 1 and out is None:
        raise click.UsageError("two runs need -o, a directory for the comparison")
    config = _resolve(CompareConfig, "compare", config_file, settings, given)
    directory = compare_runs(list(runs), out or runs[0], config, _progress(progress_mode, True))
    verdict = read_json(directory / "statistics.json")["verdict"]
    _print(as_json, "\n".join(verdict), categories=directory / "categories.csv", verdict=verdict)


@cli.command()
@click.argument("directory", type=_EXISTING_DIRECTORY)
@_shared
def report(directory: Path, as_json: bool, quiet: bool, progress_mode: Any) -> None:
    """Write the one-file HTML report of a run or a comparison.

    \b
    fastdiff report run/
    """
    from fastdiff.report.builder import build_report

    path = build_report(directory, _progress(progress_mode, quiet))
    _print(as_json, str(path), report=path)


@cli.command()
@click.option("-o", "--out", type=_DIRECTORY, required=True, help="Run directory to create or continue.")
@_replacing
@_configured
def run(
    out: Path, resume: bool, overwrite: bool, config_file: Path | None, settings: tuple[str, ...], as_json: bool,
    quiet: bool, progress_mode: Any,
) -> None:  # fmt: skip
    """Go the whole road from one configuration file.

    \b
    fastdiff config init > fastdiff.yaml
    fastdiff run -c fastdiff.yaml -o run/ --set train.k=64
    """
    from fastdiff.config import RunConfig
    from fastdiff.pipeline import run_pipeline
    from fastdiff.run import read_json

    config = _resolve(RunConfig, None, config_file, settings, {})
    path = run_pipeline(config, out, _progress(progress_mode, quiet), resume=resume, overwrite=overwrite)
    verdict = read_json(out / "compare" / "statistics.json")["verdict"]
    _print(as_json, "\n".join([*verdict, f"report: {path}"]), report=path, verdict=verdict)


@cli.command("import")
@click.argument("sources", nargs=-1, required=True)
@click.option("-o", "--out", type=_DIRECTORY, required=True, help="Store directory to create.")
@click.option("--name", "names", multiple=True, help="Name of a model, in the order of the sources; may be repeated.")
@click.option("--dataset-name", help="Tensor or data set to take from each file.")
@click.option("--bits", type=click.Choice(["bfloat16"]), help="What 2-byte values without a float type hold.")
@click.option(
    "--store-dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Type to store; else the sources' own."
)
@click.option("--shard-rows", type=click.IntRange(min=1), default=1_000_000, help="Rows in one shard file.")
@click.option("--token-ids", type=_EXISTING, help=".npy or .pt file with the token of each row.")
@click.option("--sequence-ids", type=_EXISTING, help=".npy or .pt file with the document of each row.")
@click.option("--bos-token-id", type=int, help="Leave rows of this token out of training; it begins a sequence.")
@_replacing
@_shared
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
        sources, out, ImportOptions(**given), _progress(progress_mode, quiet), resume=resume, overwrite=overwrite
    )
    _print(as_json, str(store), store=store)


@cli.command()
@click.argument("path", type=_EXISTING)
@click.option("--quick", is_flag=True, help="Leave the activations unread: structure, metadata and columns only.")
@click.option("--threads", type=click.IntRange(min=1), default=2, help="Threads that read and sum.")
@_shared
def verify(path: Path, quick: bool, threads: int, as_json: bool, quiet: bool, progress_mode: Any) -> None:
    """Check a store (directory or .h5) or a run directory against its own checksums.

    \b
    fastdiff verify acts/
    fastdiff verify run/
    """
    from fastdiff.store.verify import verify_store
    from fastdiff.store.verify_run import is_run, verify_run

    if is_run(path):
        found = verify_run(path, quick=quick, n_threads=threads, progress=_progress(progress_mode, quiet))
    else:
        found = verify_store(path, quick=quick, n_threads=threads, progress=_progress(progress_mode, quiet))
    facts = {"problems": found.problems, "n_problems": found.n_problems, "notes": found.notes, **found.facts}
    _print(as_json, "\n".join(found.summary()), path=path, sound=not found.n_problems, **facts)
    if found.n_problems:
        click.get_current_context().exit(3)


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


def _terminated(_signal: int, _frame: Any) -> NoReturn:
    raise SystemExit(143)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    from fastdiff.errors import FastdiffError

    signal.signal(signal.SIGTERM, _terminated)
    # read when torch loads OpenMP: threads that spin while they wait made tiny steps 7 to 12 times slower on a
    # machine whose cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        # torch's are RuntimeErrors: a class of its own on CUDA, a message on the CPU
        out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not out and "can't allocate memory" not in str(error):
            raise
        click.echo("Error: out of memory; lower --batch-size or --dict-size", err=True)
        sys.exit(4)
    except OSError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(4 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 1)
    sys.exit(code if isinstance(code, int) else 0)
