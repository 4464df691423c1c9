"""Stores of planted activations with two categories, and the settings of small crosscoders on them."""

import csv

import numpy as np

from fastdiff.config import TrainConfig
from fastdiff.store.writer import StoreWriter

LENGTH = 20  # tokens of a document


def write_store(path, activations, **meta):
    n, M, d_model = activations.shape
    i = np.arange(n)
    meta = {
        "models": [{"name": "base"}, {"name": "tuned"}],
        "roles": ["text", "bos"],
        "sources": [{"dataset": "d", "category": "x"}, {"dataset": "d", "category": "y"}],
        **meta,
    }
    with StoreWriter(path, n_rows=n, n_models=M, d_model=d_model, dtype="float32", shard_rows=n, meta=meta) as w:
        w.append(
            activations,
            token_ids=i % 97,
            sequence_ids=i // LENGTH,
            positions=i % LENGTH,
            roles=i * 0,
            sources=i // LENGTH % 2,
        )
    return path


def small_config(**changes) -> TrainConfig:
    values = {
        "dict_size": 64,
        "k": 4,
        "steps": 300,
        "batch_size": 256,
        "lr": 2e-3,
        "dead_tokens": 20_000,
        "threads": 1,
    }
    return TrainConfig(**(values | changes))


def table(run):
    with (run / "analysis" / "latents.csv").open(newline="") as f:
        return list(csv.DictReader(f))
