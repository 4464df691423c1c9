"""The options that commands share: taken from the configurations, from files, from the environment."""

import json
import os
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import click

if typing.TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from fastdiff.config import Stage, StageConfig
    from fastdiff.progress import Progress

DIRECTORY = click.Path(file_okay=False, path_type=Path)
Command = Callable[..., None]


class Existing(click.Path):
    """A path that must be there; if not, that is bad input (exit 3) like any other missing file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        from fastdiff.errors import InputError

        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.exists():
            raise InputError(f"{path}: no such {'file or directory' if self.file_okay else 'directory'}")
        return path


class Run(Existing):
    """A directory in which there is a run, or a comparison of two; a store is a frequent mistake for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        from fastdiff.errors import InputError

        path = super().convert(value, param, ctx)
        if (path / "store.json").exists() and not (path / "crosscoder").exists():
            raise InputError(f"{path}: is a store and no run; `fastdiff train {path} -o RUN` makes one of it")
        return path


RUN = Run(file_okay=False)
EXISTING = Existing()


class StageCommand(click.Command):
    """A command whose options are the fields of a stage's configuration.

    The fields are read when the command's parameters are first asked for, so that `fastdiff --help` does not
    import pydantic.
    """

    _complete = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All parameters."""
        if not self._complete:
            self._complete = True
            model = _model(str(self.name))
            fields = model.model_fields.items()
            self.params += [_option(model, name) for name, field in fields if not _says(field, "of_run")]
        return super().get_params(ctx)


def _model(stage: str) -> "type[StageConfig]":
    from fastdiff import config

    found: type[StageConfig] = getattr(config, f"{stage.capitalize()}Config")
    return found


def _says(field: "FieldInfo", mark: str) -> bool:
    """Whether a field is marked so: `of_run` if it says whether `fastdiff run` takes the stage, or `derived`."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(mark))


def _as_given(model: "type[Stage]", name: str, value: Any) -> str:
    """A field's value as a user would give it."""
    from fastdiff.config import flag

    option = flag(model, name)
    if isinstance(value, bool):
        return option if value else f"--no-{option[2:]}"
    return f"{option} {','.join(map(str, value)) if isinstance(value, list) else value}"


def _option(model: "type[StageConfig]", name: str) -> click.Option:
    """One option; its default stays with the configuration, so that a file's value can stand below it."""
    from fastdiff import config

    field, flag = model.model_fields[name], config.flag(model, name)
    kind = field.annotation
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    many = typing.get_origin(kind) is list  # the option is repeated
    if many:
        kind = typing.get_args(kind)[0]
    listed = typing.get_origin(kind) is tuple  # comma-separated
    if field.is_required():
        note = "[required]"
    elif field.default in (None, (), []):
        note = ""
    else:
        default = f"{field.default:.5g}" if isinstance(field.default, float) else field.default
        note = f"[default: {default}]"
    text = f"{field.description} {note}".strip()
    if kind is bool:
        return click.Option([name, f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    if typing.get_origin(kind) is Literal:
        return click.Option([name, flag], type=click.Choice(typing.get_args(kind)), multiple=many, help=text)
    return click.Option([name, flag], type=str if listed else kind, multiple=many, help=text)


def shared(command: Command) -> Command:
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


def configured(command: Command) -> Command:
    """Options of commands that take a configuration."""
    for decorate in (
        click.option(
            "-c", "--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
            envvar="FASTDIFF_CONFIG", help="YAML file with a section per stage.",
        ),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a field; may be repeated."),
    ):  # fmt: skip
        command = decorate(command)
    return shared(command)


def replacing(command: Command) -> Command:
    """Options of commands that leave results of another configuration alone."""
    command = click.option("--overwrite", is_flag=True, help="Replace results of another configuration.")(command)
    return click.option("--resume/--no-resume", default=True, help="Continue what was cut off, or start anew.")(command)


def remembered(directory: Path, model: "type[Stage]") -> dict[str, Any]:
    """What of `model` the result in `directory` was made with and is not the default; nothing where there is none."""
    from fastdiff.config import validated
    from fastdiff.errors import InputError
    from fastdiff.rundir import DONE, read_mark

    if not (directory / DONE).exists():
        return {}
    try:
        settings = read_mark(directory, "")["config"]
    except InputError:
        return {}  # the stage says what is wrong with its mark
    defaults = {name: field.get_default() for name, field in model.model_fields.items()}
    # JSON has lists where fields have tuples
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    kept = {name: value for name, value in settings.items() if name in plain and value != plain[name]}
    derived = [name for name in kept if _says(model.model_fields[name], "derived")]
    if derived:
        # what follows from the other fields follows from them again, also where one of them is now given
        follows = validated(model, {name: value for name, value in kept.items() if name not in derived})
        kept = {name: value for name, value in kept.items() if name not in derived or getattr(follows, name) != value}
    return kept


def resolve(
    model: "type[Stage]",
    section: str | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    given: dict[str, Any],
    *,
    last: tuple[Path, "Progress"] | None = None,
) -> "Stage":
    """Merge defaults, the file's section, given options and --set, and check the whole.

    Args:
        model: The configuration.
        section: Its part of the file; None if it is all of the file.
        config_file: The file.
        settings: Of --set.
        given: Options of the command; None and () are not given.
        last: Where the stage's result of the last time is, and where to report. Without a file, what that was made with
            takes the place of the defaults, so that a command given again leaves the result as it is.
    """
    import yaml

    from fastdiff.config import RunConfig, flag, validated

    values: dict[str, Any] = {}
    if config_file is None and last is not None:
        directory, progress = last
        values = remembered(directory, model)
        kept = [_as_given(model, name, value) for name, value in values.items() if given.get(name) in (None, ())]
        if kept:
            progress.say(f"{section}: as {directory} was made: {', '.join(kept)}; an option or -c FILE changes that")
    if config_file is not None:
        try:
            loaded = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise click.UsageError(f"{config_file}: not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(loaded, dict):
            raise click.UsageError(f"{config_file}: expected sections, found {type(loaded).__name__}")
        for name, fields in loaded.items():
            if name not in RunConfig.model_fields:
                raise click.UsageError(f"{config_file}: unknown section {name!r}")
            # a section whose every line is a comment is None
            if not isinstance(fields, dict | None):
                raise click.UsageError(f"{config_file}: section {name} holds {fields!r}, not KEY: VALUE lines")
        sections = {name: fields or {} for name, fields in loaded.items()}
        values = sections if section is None else sections.get(section, {})
    in_file = set(_paths(values)) if config_file is not None else set()
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v not in (None, ())}
    values |= options
    variables = _environment() if section is None else {}
    for (stage, name), (_, text) in variables.items():
        values.setdefault(stage, {})[name] = text
    places = set()
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--set {setting}: expected KEY=VALUE")
        place = values
        *path, leaf = key.replace("-", "_").split(".")
        places.add((*path, leaf))
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"--set {setting}: {part!r} is a value, not a section")
        try:
            place[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.UsageError(f"--set {setting}: the value is not YAML") from error

    def called(path: tuple[str, ...]) -> str:
        """What the user calls the field: --set over the option over the file."""
        if any(place[: len(path)] == path for place in places):
            return f"--set {'.'.join(path)}"
        if path[:2] in variables:
            return variables[path[0], path[1]][0]
        if path[0] in options or (section is not None and path not in in_file):
            return flag(model, path[0])
        return f"{config_file}: {'.'.join(path if section is None else (section, *path))}"

    return validated(model, values, called)


def _environment() -> dict[tuple[str, str], tuple[str, Any]]:
    """Of every stage's field that the environment sets: the variable, and its value; `run` has no options of theirs."""
    from fastdiff.config import RunConfig

    found: dict[tuple[str, str], tuple[str, Any]] = {}
    for stage, field in RunConfig.model_fields.items():
        model: Any = field.annotation
        for name, option in model.model_fields.items():
            variable = f"FASTDIFF_{stage}_{name}".upper()
            if (text := os.environ.get(variable)) is not None:
                many = typing.get_origin(option.annotation) is list
                found[stage, name] = variable, text.split() if many else text
    return found


def _paths(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field in a file's sections, and of the sections."""
    for name, value in values.items():
        yield (*above, str(name))
        if isinstance(value, dict):
            yield from _paths(value, (*above, str(name)))


def progress_of(mode: Literal["auto", "on", "off"], quiet: bool) -> "Progress":
    """Where a command reports how far it is."""
    from fastdiff.progress import Progress

    return Progress(mode, quiet)


def print_result(as_json: bool, text: str, **facts: Any) -> None:
    """Print a command's result: its text, or its facts as JSON."""
    if as_json:
        click.echo(json.dumps({"schema": 1, **facts}, default=str, ensure_ascii=False))
    else:
        click.echo(text)
