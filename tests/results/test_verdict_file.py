"""`verdict.json` comes back as it was written, and a damaged one is refused in one line."""

import json

import pytest
from pydantic import ValidationError

from fastdiff.errors import InputError
from fastdiff.results.verdict import Comparison, Estimate, TauFrom, Tested, TopLatent, Verdict, VerdictFile, read, write


def example():
    tested = Tested(mean=0.2, low=0.1, high=0.3, p=0.001, q=0.002)
    row = Verdict(
        category="German",
        change="gained",
        verdict="confirmed",
        documents=40,
        documents_nats=20,
        B=tested,
        L=tested,
        V=tested,
        latents=Estimate(mean=0.1, low=0.05, high=0.2),
        seed_means=[0.2, 0.1],
        signs="++",
        top_latents=[TopLatent(seed=0, latent=7, nats=0.05)],
    )
    pair = Comparison(
        name="it", kind="pair", runs=["it"], base="b", tuned="t", state="checked", sentences=["One."], rows=[row]
    )
    return VerdictFile(
        tau=0.06, tau_from=TauFrom(run="aa", largest=0.06), alpha=0.05, confidence=0.95, comparisons=[pair]
    )


def test_round_trip(tmp_path):
    path = tmp_path / "verdict.json"
    write(path, example())
    assert json.loads(path.read_text())["schema"] == 1
    assert read(path) == example()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema=2), "schema 2"),
        (lambda v: v["comparisons"][0]["rows"][0].update(verdict="improved"), "comparisons.0.rows.0.verdict"),
        (lambda v: v["comparisons"][0].update(sentences=["a"] * 5), "comparisons.0.sentences"),
        (lambda v: v.pop("tau"), "tau"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    path = tmp_path / "verdict.json"
    write(path, example())
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_nan_is_no_number():
    with pytest.raises(ValidationError):
        Estimate(mean=float("nan"), low=None, high=None)
