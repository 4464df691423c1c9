"""Δ_norm, cosine and classes on latents whose answer is plain."""

import math

import numpy as np
import pytest
import torch

from fastdiff.analysis.classes import classify, decoder_cosine, delta_norm, specific


def test_delta_norm_direction_and_range():
    W_dec = torch.tensor([[[3.0], [0.0]], [[1.0], [1.0]], [[0.0], [2.0]], [[2.0], [1.0]], [[0.0], [0.0]]])
    delta = delta_norm(W_dec).tolist()
    assert delta[:4] == [0.0, 0.5, 1.0, 0.25] and math.isnan(delta[4])


def test_delta_norm_wants_two_models():
    with pytest.raises(ValueError, match=r"\[F, 2, D\], got \(4, 3, 5\)"):
        delta_norm(torch.zeros(4, 3, 5))


def test_cosine_between_the_two_rows():
    W_dec = torch.tensor([[[1.0, 0], [0, 2]], [[1, 1], [3, 3]], [[1, 0], [-5, 0]]])
    assert decoder_cosine(W_dec).tolist() == pytest.approx([0, 1, -1])


def test_classes_by_delta_norm_only():
    delta = np.array([0.0, 0.0999, 0.1, 0.39, 0.4, 0.6, 0.61, 0.9, 0.901, 1.0, np.nan])
    assert classify(delta).tolist() == [
        "base_only", "base_only", "other", "other", "shared", "shared", "other", "other", "tuned_only", "tuned_only",
        "other",
    ]  # fmt: skip


def test_specific_needs_both_ratios_small_and_a_side():
    delta = np.array([0.8, 0.2, 0.8, 0.8, 0.5, 0.8, 0.8, 0.55, 0.45, 0.61, 0.39])
    nu_error = np.array([0.1, -0.1, 0.3, 0.1, 0.0, np.nan, -0.3, 0.0, 0.0, 0.0, 0.0])
    nu_reconstruction = np.array([0.4, 0.4, 0.1, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = specific(delta, nu_error, nu_reconstruction).tolist()
    assert found == ["tuned", "base", "", "", "", "", "", "", "", "tuned", "base"]
