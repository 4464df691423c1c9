"""The whole road on two tiny random models, through the command line, and back again over what is done."""

import importlib.util
import json

import pytest
import torch
import yaml
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdiff.cli import cli, main
from fastdiff.comparison.compare import compare
from fastdiff.config import CompareConfig
from fastdiff.reporting.builder import build_report

WORDS = {
    "animals": ["cat", "dog", "cow", "hen", "pig", "owl", "fox", "bee", "ant", "eel"],
    "numbers": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
}


def save_model(path, seed, tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models, their tokenizer, and 200 documents of two categories."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [" ".join(words) for words in WORDS.values()], trainers.WordLevelTrainer(special_tokens=["?"])
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="?")
    for seed, name in enumerate(("base", "tuned", "other")):
        save_model(folder / name, seed, fast)
    generator = torch.Generator().manual_seed(0)
    with (folder / "texts.jsonl").open("w") as f:
        for i in range(200):
            category = list(WORDS)[i % 2]
            picked = torch.randint(10, (30,), generator=generator).tolist()
            f.write(json.dumps({"text": " ".join(WORDS[category][j] for j in picked), "topic": category}) + "\n")
    return folder


def config_file(path, inputs, tuned="tuned"):
    values = {
        "extract": {
            "base": str(inputs / "base"),
            "tuned": str(inputs / tuned),
            "layer": 1,
            "dataset": [str(inputs / "texts.jsonl")],
            "category_field": "topic",
            "ctx_len": 64,
        },
        "train": {"dict_size": 48, "k": 3, "steps": 60, "batch_size": 256, "lr": 3e-3, "seed": 3, "threads": 1},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def run_command(*arguments):
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_from_text_to_report_and_back_over_what_is_done(inputs, tmp_path):
    config = config_file(tmp_path / "run.yaml", inputs)
    run = tmp_path / "run"
    first = run_command("run", "-c", config, "-o", run, "--json", "-q")
    found = json.loads(first.stdout)
    report = run / "report" / "report.html"
    assert found["report"] == str(report) and found["verdict"]
    stages = ["crosscoder/seed-3", "attribution", "analysis", "annotate", "compare", "report"]
    stamps = {stage: (run / stage / "DONE.json").stat().st_mtime_ns for stage in stages}
    resolved = yaml.safe_load((run / "fastdiff.yaml").read_text())
    assert json.loads((run / "attribution" / "summary.json").read_text())["state"] == "checked"
    assert set(resolved) >= {"train", "attribute", "analyze", "annotate", "compare"} and resolved["train"]["seed"] == 3
    labels = [json.loads(line) for line in (run / "annotate" / "labels.jsonl").read_text().splitlines()]
    assert {"animals", "numbers"} & {label["category"] for label in labels}
    # what the run says it was made with is a file that makes it
    for file in (config, run / "fastdiff.yaml"):
        again = run_command("run", "-c", file, "-o", run, "--json", "-q")
        assert json.loads(again.stdout) == found
    assert {stage: (run / stage / "DONE.json").stat().st_mtime_ns for stage in stages} == stamps


@pytest.mark.slow
def test_a_stage_given_again_keeps_its_options_and_what_is_older_than_it_is_named(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    config = config_file(tmp_path / "run.yaml", inputs)
    run_command(
        "run", "-c", config, "-o", run, "-q", "--no-attribute", "--set", "analyze.cards=7", "--set", "compare.tau=0.1"
    )

    def settings(stage):
        return json.loads((run / stage / "DONE.json").read_text())["config"]

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        return ended.value.code or 0, capsys.readouterr()

    # as the demonstration or a configuration file left it
    marks = {stage: (run / stage / "DONE.json").read_text() for stage in ("analysis", "annotate", "compare")}
    for name in ("analyze", "annotate", "compare"):
        code, said = command(name, run)
        assert (
            code == 0
            and ("--cards 7" in said.err) == (name == "analyze")
            and ("--tau 0.1" in said.err) == (name == "compare")
        )
    assert {stage: (run / stage / "DONE.json").read_text() for stage in marks} == marks
    store = run / "acts"
    assert command("train", store, "-o", run, "--seeds", "3,4")[0] == 0
    assert settings("crosscoder/seed-4") == settings("crosscoder/seed-3") | {"seed": 4}

    # what follows from the steps follows from those that are given now
    code, said = command("train", store, "-o", run, "--seed", 3, "--steps", 40, "--overwrite")
    assert code == 0 and "--warmup-steps" not in said.err and settings("crosscoder/seed-3")["warmup_steps"] == 4
    assert settings("crosscoder/seed-3")["dict_size"] == 48

    # another option beside those of the last time; verify says which results it made old, before compare refuses
    assert command("analyze", run, "--examples", 3)[0] == 0
    assert (settings("analysis")["cards"], settings("analysis")["examples"]) == (7, 3)
    code, said = command("verify", run)
    assert code == 3 and f"{run / 'annotate'}: made of another version of analysis/" in said.out
    assert command("compare", run)[0] == 3
    assert command("annotate", run)[0] == 0
    assert f"{run / 'compare'}: made of another version of run/analysis/" in command("verify", run)[1].out
    assert command("compare", run)[0] == 0 and settings("compare")["tau"] == 0.1
    assert command("report", run)[0] == 0 and command("verify", run)[0] == 0
    # a file stands for all options
    assert command("analyze", run, "-c", config, "--train-seed", 3)[0] == 0 and settings("analysis")["cards"] == 400


@pytest.mark.parametrize("by_option", [True, False])
def test_the_models_are_not_run_again_where_that_is_not_wanted(inputs, tmp_path, by_option):
    config = config_file(tmp_path / "run.yaml", inputs)
    if not by_option:
        config.write_text(config.read_text() + yaml.safe_dump({"attribute": {"enabled": False}}))
    options = ["--no-attribute"] if by_option else []
    run_command("run", "-c", config, "-o", tmp_path / "run", "-q", *options)
    assert (tmp_path / "run" / "report" / "report.html").exists() and not (tmp_path / "run" / "attribution").exists()


def test_a_tracker_that_is_missing_is_said_before_anything_is_extracted(inputs, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "wandb" else find(name, *at))
    config = config_file(tmp_path / "run.yaml", inputs)
    with pytest.raises(SystemExit) as ended:
        main(["run", "-c", str(config), "-o", str(tmp_path / "run"), "--set", "train.track=[wandb]"])
    assert ended.value.code == 2 and "--track wandb: not installed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "acts").exists()


@pytest.mark.slow
def test_the_everyday_road_command_by_command_and_a_triangle(inputs, tmp_path):
    for name in ("tuned", "other"):
        store, run = tmp_path / f"acts-{name}", tmp_path / name
        options = ("--base", inputs / "base", "--tuned", inputs / name, "--layer", "0.5", "--dataset")
        run_command(
            "extract", *options, inputs / "texts.jsonl", "--category-field", "topic", "--ctx-len", 64, "-o", store
        )
        run_command("train", store, "-o", run, "--dict-size", 48, "--k", 3, "--steps", 60, "--batch-size", 256)
        for command in ("analyze", "annotate", "compare", "report"):
            run_command(command, run)
        assert (run / "report" / "report.html").stat().st_size > 10_000
    run_command("compare", tmp_path / "tuned", tmp_path / "other", "-o", tmp_path / "triangle")
    run_command("report", tmp_path / "triangle")
    assert (tmp_path / "triangle" / "report" / "report.html").exists()


def test_a_model_against_itself_shows_no_difference(inputs, tmp_path):
    config = config_file(tmp_path / "run.yaml", inputs, tuned="base")
    run = tmp_path / "run"
    run_command("run", "-c", config, "-o", run, "-q", "--set", "train.init=shared")
    with (run / "analysis" / "latents.csv").open() as f:
        header = f.readline().split(",")
        delta = [line.split(",")[header.index("delta_norm")] for line in f]
    assert {float(value) for value in delta} == {0.5}
    compare([run], run, CompareConfig())
    build_report(run)
    statistics = json.loads((run / "compare" / "statistics.json").read_text())
    assert statistics["comparisons"][0]["total_a"] == statistics["comparisons"][0]["total_b"] == 0
