"""The latents of the seeds that are not analysed are those that an analysis of each seed itself would find."""

import shutil
from collections import Counter

import numpy as np
import pytest
from planted_runs import small_config, table, write_store
from safetensors.numpy import load_file, save_file

from fastdiff.analysis.analyze import analyze
from fastdiff.annotation.annotate import annotate
from fastdiff.comparison.compare import compare
from fastdiff.config import AnalyzeConfig, AnnotateConfig, CompareConfig
from fastdiff.crosscoder.train import train
from fastdiff.demo.planted import planted_activations
from fastdiff.errors import InputError
from fastdiff.results.analysis import read_analysis_summary
from fastdiff.results.labels import read_labels
from fastdiff.results.seeds import read_seed_labels, read_seed_latents

pytestmark = pytest.mark.slow
CONFIG = AnalyzeConfig(batch_size=512, examples=2, cards=10, nu_error_max=0.6, nu_reconstruction_max=0.9)
TABLES = ("documents_by_source", "mean_by_source", "squares_by_source", "peaks_by_source")


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory):
    """A run of three seeds on planted activations."""
    folder = tmp_path_factory.mktemp("three")
    planted = planted_activations(0, n_tokens=6000, d_model=16, shared=12, exclusive={0.05: 5})
    acts = write_store(folder / "acts", planted.activations)
    for seed in (0, 1, 2):
        train(acts, folder / "run", small_config(seed=seed))
    return folder / "run"


def test_they_are_those_of_an_analysis_of_the_seed_itself(three_seeds, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_seeds, run)
    labelled = AnnotateConfig(min_count=1, min_lift=1.01)
    analyze(run, CONFIG)
    annotate(run, labelled)
    found, labels = read_seed_latents(run), read_seed_labels(run)
    assert read_analysis_summary(run)["seeds"] == {"analysed": 0, "others": [1, 2]}
    assert set(found.seed.tolist()) == {1, 2} and len(labels) == len(found.seed)
    for seed in (1, 2):
        alone = tmp_path / f"alone-{seed}"
        shutil.copytree(three_seeds, alone)
        analyze(alone, CONFIG.model_copy(update={"train_seed": seed}))
        annotate(alone, labelled)
        assert read_analysis_summary(alone)["seeds"] == {
            "analysed": seed,
            "others": [s for s in (0, 1, 2) if s != seed],
        }
        rows = [row for row in table(alone) if row["specific"]]
        own = read_labels(alone)
        want = [
            (int(row["latent"]), row["specific"], int(row["concept"]), own[int(row["latent"])].category) for row in rows
        ]
        mine = [label[1:] for label in labels if label.seed == seed]
        assert len(mine) > 3 and mine == want
        at = [int(row["latent"]) for row in rows]
        firing = load_file(alone / "analysis" / "firing.safetensors")
        assert found.count[found.seed == seed].tolist() == [int(row["count"]) for row in rows]
        for name in TABLES:
            assert np.array_equal(getattr(found, name)[found.seed == seed], firing[name][at]), name


def test_the_comparison_counts_them(three_seeds, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_seeds, run)
    analyze(run, CONFIG)
    annotate(run, AnnotateConfig(min_count=1, min_lift=1.01))
    compare([run], run, CompareConfig())
    header, *lines = (run / "compare" / "seeds.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    for seed in (1, 2):
        mine = [label for label in read_seed_labels(run) if (label.seed, label.specific) == (seed, "tuned")]
        counted = {row["category"]: int(row["count_b"]) for row in rows if row["seed"] == str(seed)}
        assert Counter(label.category for label in mine) == +Counter(counted) and mine


def test_other_seeds_can_be_left_out(three_seeds, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_seeds, run)
    analyze(run, CONFIG.model_copy(update={"all_seeds": False}))
    assert read_analysis_summary(run)["seeds"] == {"analysed": 0, "others": []} and not len(read_seed_latents(run).seed)
    assert read_analysis_summary(run)["stability"]["seeds"] == [1, 2]


def test_a_file_of_another_shape_is_refused_with_the_command(three_seeds, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_seeds, run)
    analyze(run, CONFIG)
    path = run / "analysis" / "seeds.safetensors"
    tensors = load_file(path)
    for harm in (
        lambda: save_file({name: of for name, of in tensors.items() if name != "side"}, path),
        lambda: path.write_bytes(b"junk"),
        lambda: path.unlink(),
        lambda: save_file({**tensors, "latent": tensors["latent"][:-1]}, path),
        lambda: save_file({**tensors, "side": tensors["side"] + 2}, path),
    ):
        harm()
        with pytest.raises(InputError, match=r"seeds\.safetensors: .*; run `fastdiff analyze .*` again$"):
            read_seed_latents(run)
    annotated = tmp_path / "labels"
    (annotated / "annotate").mkdir(parents=True)
    for line in ("x,1,base,1,c", "1,1,both,1,c", "1,-1,base,1,c"):
        (annotated / "annotate" / "seeds.csv").write_text(f"seed,latent,specific,concept,category\n{line}\n")
        with pytest.raises(InputError, match=r"seeds\.csv: line 2 is no latent of a seed; run `fastdiff annotate"):
            read_seed_labels(annotated)
