"""Text of two categories, tiny models, and runs over them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import WORDS, make_run, make_store, save_model, tokenizer


def chat(prompt: str, answer: str, topic: str) -> dict:
    return {"m": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], "topic": topic}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Models `base`, `tuned`, `third`, and `plain-*` without BOS; texts, and chats with answers."""
    root = tmp_path_factory.mktemp("inputs")
    save_model(root / "base", 0)
    save_model(root / "tuned", 1, like=root / "base")
    save_model(root / "third", 2, like=root / "base")
    for name in ("base", "tuned"):
        shutil.copytree(root / name, root / f"plain-{name}")
        tokenizer(bos=False).save_pretrained(root / f"plain-{name}")
    generator = np.random.Generator(np.random.PCG64(5))

    def words(category: str, low: int, high: int) -> str:
        return " ".join(generator.choice(WORDS[category], int(generator.integers(low, high))))

    texts = [{"text": words(c, 4, 13), "topic": c} for _ in range(12) for c in WORDS]
    # one scored token beside BOS, and so too short without it
    texts += [{"text": "cat", "topic": "pets"}]
    (root / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    chats = [
        {
            "m": [{"role": "user", "content": words(c, 2, 6)}, {"role": "assistant", "content": words(c, 3, 7)}],
            "topic": c,
        }
        for _ in range(10)
        for c in WORDS
    ]
    chats.append(
        {"m": [{"role": "user", "content": "cat sat"}, {"role": "assistant", "content": "mat"}], "topic": "pets"}
    )
    (root / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    asks = [{"m": c["m"][:1], "topic": c["topic"]} for c in chats]
    (root / "asks.jsonl").write_text("".join(json.dumps(c) + "\n" for c in asks))
    return root


@pytest.fixture(scope="session")
def runs(inputs, tmp_path_factory):
    """Gives a run over a store, each made once for its options; a test that changes one asks for `fresh`."""
    made: dict[str, tuple[Path, Path]] = {}
    folder = tmp_path_factory.mktemp("runs")

    def of(*, train=None, fresh: Path | None = None, **options) -> tuple[Path, Path]:
        key = json.dumps([options, train], sort_keys=True)
        if key not in made:
            store = make_store(inputs, folder / f"acts-{len(made)}", **options)
            made[key] = store, make_run(store, folder / f"run-{len(made)}", **(train or {}))
        store, run = made[key]
        if fresh is not None:
            shutil.copytree(run, fresh, ignore=shutil.ignore_patterns("attribution"))
            run = fresh
        return store, run

    return of
