"""Which latents stand for a category's row, from the files of `fastdiff attribute`."""

import numpy as np
import pytest
from attributions import write_nats

from fastdiff import rundir
from fastdiff.errors import InputError
from fastdiff.results.attribution import Attribution, Summary, write_attribution
from fastdiff.results.nats import ROW_LATENTS, LatentNats, read_latent_nats

MODEL = "a" * 64


def test_nats_are_means_over_the_documents_of_a_category_and_of_the_seed_that_is_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    category = [0, 0, 1, 0, 2]
    nats = rng.normal(size=(2, 5, 7))
    write_nats(tmp_path, nats, category, ["a", "b", "c", "empty"], model=MODEL, seeds=(0, 3))
    found, hashes = read_latent_nats(tmp_path, 3, MODEL)
    assert found is not None and found.categories == ["a", "b", "c", "empty"]
    wanted = [nats[1, [0, 1, 3]].mean(axis=0), nats[1, 2], nats[1, 4], np.full(7, np.nan)]
    np.testing.assert_allclose(found.nats, wanted, rtol=1e-6)
    assert set(hashes) == {
        f"attribution/{name}" for name in rundir.read_json(tmp_path / "attribution/DONE.json", 1)["outputs"]
    }


def test_a_row_has_the_latents_with_most_nats_of_its_sign():
    nats = np.array([[0.3, -0.5, 0.1, 0, -0.2, 0.25, 0.01, 0.02], [np.nan] * 8])
    found = LatentNats(["a", "empty"], nats)
    assert ROW_LATENTS == 5
    assert found.of_row("a", 1) == [0, 5, 2, 7, 6]
    assert found.of_row("a", -1) == [1, 4]
    assert found.of_row("a", 0) == [1, 0, 5, 4, 2]
    assert found.of_row("empty", 0) == found.of_row("unknown", 1) == []
    assert found.of_any_row() == [0, 1, 2, 4, 5, 6, 7]


def test_every_row_whatever_its_change_is_among_those_of_any_row():
    found = LatentNats(["a", "b"], np.random.default_rng(1).normal(size=(2, 60)))
    any_row = set(found.of_any_row())
    for name in found.categories:
        for sign in (-1, 0, 1):
            assert set(found.of_row(name, sign)) <= any_row


def test_a_run_without_attribution_or_with_that_of_other_crosscoders_has_none(tmp_path):
    assert read_latent_nats(tmp_path, 0, MODEL) == (None, {})
    write_nats(tmp_path, np.ones((1, 1, 3)), [0], ["a"], model=MODEL)
    assert read_latent_nats(tmp_path, 0, "b" * 64) == (None, {})
    assert read_latent_nats(tmp_path, 1, MODEL) == (None, {})


def test_an_attribution_that_checked_nothing_has_none_but_its_hash_counts(tmp_path):
    summary = Summary(state="not checked", reason="no models", tau=0.05)
    outputs = write_attribution(tmp_path / "attribution", Attribution(summary, None, None))
    rundir.finish(tmp_path / "attribution", "attribute", {}, {"seed-0": MODEL}, outputs)
    found, hashes = read_latent_nats(tmp_path, 0, MODEL)
    assert found is None and set(hashes) == {"attribution/summary.json"}


def test_a_changed_file_is_refused(tmp_path):
    write_nats(tmp_path, np.ones((1, 1, 3)), [0], ["a"], model=MODEL)
    (tmp_path / "attribution" / "latents.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="run `fastdiff attribute"):
        read_latent_nats(tmp_path, 0, MODEL)
