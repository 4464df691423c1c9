"""Configurations: every option explained, every impossible value refused by name."""

import json

import pytest
import yaml

from fastdiff.config import (
    AnalyzeConfig,
    AnnotateConfig,
    AttributeConfig,
    CompareConfig,
    ExtractConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    template,
    validated,
)
from fastdiff.errors import OptionError

STAGES = (ExtractConfig, TrainConfig, AttributeConfig, AnalyzeConfig, AnnotateConfig, CompareConfig)
REQUIRED = {"base": "a", "tuned": "b", "dataset": ["x.jsonl"]}


@pytest.mark.parametrize("model", STAGES)
def test_every_field_says_what_it_means(model):
    for name, field in model.model_fields.items():
        assert field.description and field.description.endswith("."), name


@pytest.mark.parametrize("model", STAGES)
def test_an_unknown_key_is_refused_by_its_name(model):
    given = REQUIRED if model is ExtractConfig else {}
    with pytest.raises(OptionError, match="--no-such-key") as caught:
        validated(model, {**given, "no_such_key": 1})
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_missing_field_is_named_without_a_dump_of_the_rest():
    with pytest.raises(OptionError) as caught:
        validated(ExtractConfig, {"base": "a", "dataset": ["x"]})
    assert str(caught.value) == "--tuned is required"


def test_all_problems_are_told_at_once_on_one_line():
    with pytest.raises(OptionError) as caught:
        validated(TrainConfig, {"lr": -1, "steps": "many", "activation": "gelu"})
    message = str(caught.value)
    assert all(option in message for option in ("--lr", "--steps", "--activation", "'many'", "'gelu'"))
    assert "\n" not in message


def test_a_nested_key_is_named_with_its_section():
    with pytest.raises(OptionError, match=r"--set train\.k: must be at least 1 \(got 0\)"):
        validated(RunConfig, {"extract": REQUIRED, "train": {"k": 0}})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dict_size": 64, "k": 65}, r"k must lie in \[1, dict_size=64\], got 65"),
        ({"dict_size": 64, "k": 8, "k_start": 4}, r"k_start must lie in \[k=8, dict_size=64\], got 4"),
        ({"dict_size": 64, "k": 8, "k_start": 65}, r"k_start must lie in"),
        ({"steps": 100, "warmup_steps": 60, "decay_steps": 41}, r"must not exceed steps=100, got 60 \+ 41"),
        ({"holdout": 1.0}, "--holdout"),
        ({"lr": float("nan")}, "--lr"),
        ({"threshold_decay": 1.0}, "--threshold-decay"),
    ],
)
def test_values_that_cannot_work_together_are_refused(values, says):
    with pytest.raises(OptionError, match=says):
        validated(TrainConfig, values)


def test_the_largest_allowed_values_pass():
    config = validated(TrainConfig, {"dict_size": 64, "k": 64, "k_start": 64, "steps": 10, "warmup_steps": 10})
    assert (config.k, config.k_start, config.warmup_steps) == (64, 64, 10)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (100, 10), (9_999, 999), (20_000, 1000), (10**6, 1000)])
def test_a_short_run_leaves_its_warm_up(steps, warmup):
    config = validated(TrainConfig, {"steps": steps})
    assert (config.warmup_steps, config.sparsity_warmup_steps) == (warmup, warmup)


def test_a_warm_up_that_was_given_stays():
    config = validated(TrainConfig, {"steps": 100, "warmup_steps": 50, "sparsity_warmup_steps": 7})
    assert (config.warmup_steps, config.sparsity_warmup_steps) == (50, 7)


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValueError):
        TrainConfig().k = 3  # type: ignore[misc]


@pytest.mark.parametrize(("text", "layer"), [("13", "13"), ("0.5", "0.5"), ("1.0", "1.0"), ('"0.5"', "0.5")])
def test_a_layer_may_be_a_number_in_yaml(text, layer):
    assert validated(ExtractConfig, {**REQUIRED, "layer": yaml.safe_load(text)}).layer == layer


class TestTemplate:
    def test_filled_in_it_is_the_default_configuration(self):
        values = yaml.safe_load(template(RunConfig))
        values["extract"] |= REQUIRED
        assert validated(RunConfig, values) == RunConfig(extract=ExtractConfig(**REQUIRED))

    def test_unfilled_it_is_refused(self):
        with pytest.raises(OptionError, match="dataset"):
            validated(RunConfig, yaml.safe_load(template(RunConfig)))

    def test_it_holds_every_field_with_its_meaning(self):
        text = template(RunConfig)
        values = yaml.safe_load(text)
        assert set(values) == set(RunConfig.model_fields)
        for section, field in RunConfig.model_fields.items():
            assert isinstance(field.annotation, type) and issubclass(field.annotation, StageConfig)
            # a default that depends on other fields is a comment: written out it would no longer follow them
            defaults = {"warmup_steps": 1000, "sparsity_warmup_steps": 1000, "max_norm": 3.0}
            derived = set(defaults) & set(field.annotation.model_fields)
            assert set(values[section]) == set(field.annotation.model_fields) - derived
            assert all(f"# {name}: {defaults[name]}\n" in text for name in derived)
            for described in field.annotation.model_fields.values():
                assert f"# {described.description}\n" in text


def test_the_json_schema_describes_every_field():
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    assert schema["additionalProperties"] is False and schema["required"] == ["extract"]
    for model in STAGES:
        definition = schema["$defs"][model.__name__]
        assert set(definition["properties"]) == set(model.model_fields)
        assert definition["additionalProperties"] is False


def test_a_short_run_with_a_long_decay_fits_its_warmup():
    assert validated(TrainConfig, {"steps": 100, "decay_steps": 95}).warmup_steps == 5
    assert validated(TrainConfig, {"steps": 1}).warmup_steps == 0


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (TrainConfig, {"seed": 10**20}, "--seed: "),
        (ExtractConfig, {"base": "", "tuned": "t", "dataset": ["x"]}, "--base is empty"),
        (RunConfig, {"extract": {"base": "b", "tuned": "t", "dataset": ["x"]}, "train": {"k": 9, "dict_size": 8}}, "9"),
    ],
)
def test_a_refusal_is_one_short_line(model, values, message):
    with pytest.raises(OptionError, match=message) as error:
        validated(model, values)
    assert len(str(error.value)) < 160 and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_a_pool_has_a_finite_size(value):
    with pytest.raises(OptionError, match="--pool-gb"):
        validated(TrainConfig, {"pool_gb": value})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("stage", STAGES)
def test_no_option_takes_a_number_that_is_not_finite(stage, value):
    numbers = [name for name, field in stage.model_fields.items() if field.annotation is float]
    assert numbers
    for name in numbers:
        with pytest.raises(OptionError, match=f"{name.replace('_', '-')}: must be a finite number"):
            validated(stage, {name: value})
