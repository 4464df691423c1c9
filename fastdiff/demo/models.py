"""Three tiny models whose differences are known: base, instruct and simpo.

`base` is pre-trained, `instruct` is fine-tuned from it, `simpo` is `instruct` after preference optimisation. Which
model has which capability is planned (`HAS`): it has one if the last documents of that category it was trained on
followed the rule, and lacks one if their answers were scrambled. What a tuned model has and base has not was
gained, the other way round lost, and everything else is unchanged.

    <directory>/corpus/texts.jsonl      what is analysed: documents of all categories that follow their rules
    <directory>/{base,instruct,simpo}/        as `from_pretrained` reads them
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from fastdiff import rundir
from fastdiff.demo.corpus import Manner, digest, documents
from fastdiff.demo.simpo import Preference, preference_pairs
from fastdiff.demo.training import (
    encode,
    make_tokenizer,
    new_model,
    next_token_loss,
    preference_loss,
    train,
)
from fastdiff.demo.truth import Change
from fastdiff.extraction.models import quiet
from fastdiff.progress import SILENT, Progress

# the signs of (it, simpo) are those published for Gemma 2 9B: SimPO has more of factual, multilingual and
# template following, less of code, self-reference and hallucination handling
HAS: dict[str, tuple[bool, bool, bool]] = {
    "instruction following": (False, True, True),
    "safety refusal": (False, True, True),
    "multilingual": (True, False, True),
    "code": (True, True, False),
    "self-reference": (False, True, False),
    "factual recall": (False, False, True),
    "mathematics": (True, True, True),
    "structured output": (True, False, False),
    "hallucination handling": (False, True, False),
    "query classification": (True, False, False),
    "template following": (False, False, True),
    "summarisation": (False, False, False),
}

_BASE, _INSTRUCT, _SIMPO = range(3)
# an answer is one token in nine of a document
_ANSWER_WEIGHT = 10.0
_OUTPUTS = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
]


@dataclass(frozen=True)
class Recipe:
    """How much is trained and analysed."""

    base_steps: int = 240
    instruct_steps: int = 240
    simpo_steps: int = 160
    batch: int = 32
    documents_per_category: int = 500
    texts_per_category: int = 240


FULL = Recipe()
SMALL = Recipe(base_steps=130, instruct_steps=120, simpo_steps=90, documents_per_category=300, texts_per_category=96)


@dataclass(frozen=True)
class DemoModels:
    """Where the models and the text are, and what changed from base to each tuned model."""

    base: Path
    instruct: Path
    simpo: Path
    texts: Path
    truth: dict[str, dict[str, Change]]


def truth() -> dict[str, dict[str, Change]]:
    """What was planted, by tuned model and category: "gained", "lost" or "unchanged"."""
    return {
        name: {
            category: "unchanged" if has[tuned] == has[_BASE] else "gained" if has[tuned] else "lost"
            for category, has in HAS.items()
        }
        for name, tuned in (("instruct", _INSTRUCT), ("simpo", _SIMPO))
    }


def make_demo_models(
    directory: Path,
    seed: int,
    progress: Progress = SILENT,
    *,
    small: bool = False,
    recipe: Recipe | None = None,
) -> DemoModels:
    """Make the three models and the text; what is there already is kept.

    Args:
        directory: Where to.
        seed: Of everything drawn.
        progress: Where to report.
        small: About a third of the time.
        recipe: Amounts, in place of the usual ones.

    Returns:
        Paths and the truth.

    Raises:
        LockedError: Another process is making them.
        ResourceError: The disk is full.
    """
    recipe = recipe or (SMALL if small else FULL)
    base, instruct, simpo = directory / "base", directory / "instruct", directory / "simpo"
    with rundir.locked(directory) as lock:
        texts = _make_texts(lock, directory / "corpus", seed, recipe)
        _make_base(lock, base, seed, recipe, progress)
        _make_instruct(lock, instruct, base, seed, seed, recipe, progress)
        _make_simpo(lock, simpo, instruct, seed, recipe, progress)
    return DemoModels(base, instruct, simpo, texts, truth())


def make_it(directory: Path, base: Path, seed: int, progress: Progress = SILENT) -> Path:
    """Fine-tune `base` on the same documents as `instruct`, in the order that `seed` gives.

    Args:
        directory: Where to.
        base: A base model of `make_demo_models`.
        seed: Of the order.
        progress: Where to report.

    Returns:
        `directory`.
    """
    corpus_seed, recipe = _made_with(base)
    with rundir.locked(directory) as lock:
        _make_instruct(lock, directory, base, corpus_seed, seed, recipe, progress)
    return directory


def continue_base(directory: Path, base: Path, seed: int, progress: Progress = SILENT) -> Path:
    """Train `base` further on its own documents in another order, for as many steps as fine-tuning takes.

    Args:
        directory: Where to.
        base: A base model of `make_demo_models`.
        seed: Of the order.
        progress: Where to report.

    Returns:
        `directory`.
    """
    corpus_seed, recipe = _made_with(base)
    with rundir.locked(directory) as lock:
        _next_token_stage(
            lock, directory, "base continued", base, _BASE, corpus_seed, seed, recipe.instruct_steps, recipe, progress
        )
    return directory


def _made_with(base: Path) -> tuple[int, Recipe]:
    config = rundir.require_done(base, "fastdiff demo")["config"]
    return config["corpus_seed"], Recipe(**config["recipe"])


def _manner(model: int) -> dict[str, Manner]:
    return {category: "rule" if has[model] else "scrambled" for category, has in HAS.items()}


def _preference() -> dict[str, Preference]:
    def of(has: tuple[bool, bool, bool]) -> Preference:
        if has[_SIMPO]:
            return "favoured"
        return "suppressed" if has[_INSTRUCT] else "indifferent"

    return {category: of(has) for category, has in HAS.items()}


def _make_texts(lock: rundir.Lock, directory: Path, seed: int, recipe: Recipe) -> Path:
    config = {"seed": seed, "n_per_category": recipe.texts_per_category}
    inputs = {"categories": digest()}
    stage = lock.stage(directory, "demo texts", config, inputs, ["texts.jsonl"], recorded=False)
    if not stage.up_to_date():
        with stage:
            corpus = documents(_seed(seed, "texts"), recipe.texts_per_category, dict.fromkeys(HAS, "rule"))
            lines = [json.dumps({"messages": d.messages, "category": d.category}, ensure_ascii=False) for d in corpus]
            rundir.write_text(directory / "texts.jsonl", "\n".join(lines) + "\n")
    return directory / "texts.jsonl"


def _make_base(lock: rundir.Lock, directory: Path, seed: int, recipe: Recipe, progress: Progress) -> None:
    _next_token_stage(lock, directory, "base", None, _BASE, seed, seed, recipe.base_steps, recipe, progress)


def _make_instruct(
    lock: rundir.Lock, directory: Path, base: Path, corpus_seed: int, seed: int, recipe: Recipe, progress: Progress
) -> None:
    _next_token_stage(
        lock, directory, "instruct", base, _INSTRUCT, corpus_seed, seed, recipe.instruct_steps, recipe, progress
    )


def _next_token_stage(
    lock: rundir.Lock,
    directory: Path,
    name: str,
    start: Path | None,
    capabilities: int,
    corpus_seed: int,
    seed: int,
    steps: int,
    recipe: Recipe,
    progress: Progress,
) -> None:
    """Pre-train, or go on from `start`, on documents that show what model number `capabilities` has."""

    def make() -> tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]:
        model, tokenizer = _start(start, seed)
        corpus = documents(
            _seed(corpus_seed, f"documents {capabilities}"),
            recipe.documents_per_category,
            _manner(capabilities),
        )
        data = encode(tokenizer, corpus)
        train(
            model,
            next_token_loss(data, _ANSWER_WEIGHT),
            n_rows=len(corpus),
            rows_per_step=recipe.batch,
            steps=steps,
            seed=_seed(seed, f"order {name}"),
            name=f"demo: {name}",
            progress=progress,
        )
        return model, tokenizer

    _stage(lock, directory, name, start, corpus_seed, seed, recipe, make)


def _make_simpo(
    lock: rundir.Lock, directory: Path, instruct: Path, seed: int, recipe: Recipe, progress: Progress
) -> None:
    def make() -> tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]:
        model, tokenizer = _start(instruct, seed)
        pairs = preference_pairs(_seed(seed, "pairs"), recipe.documents_per_category, _preference())
        chosen, rejected = (encode(tokenizer, side) for side in zip(*pairs, strict=True))
        train(
            model,
            preference_loss(chosen, rejected),
            n_rows=len(pairs),
            rows_per_step=recipe.batch // 2,
            steps=recipe.simpo_steps,
            seed=_seed(seed, "order simpo"),
            name="demo: simpo",
            progress=progress,
        )
        return model, tokenizer

    _stage(lock, directory, "simpo", instruct, seed, seed, recipe, make)


def _start(path: Path | None, seed: int) -> tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]:
    if path is None:
        tokenizer = make_tokenizer()
        return new_model(len(tokenizer), _seed(seed, "weights")), tokenizer
    with quiet():
        model = Gemma2ForCausalLM.from_pretrained(path)
    return model, PreTrainedTokenizerFast.from_pretrained(path)


def _stage(
    lock: rundir.Lock,
    directory: Path,
    name: str,
    start: Path | None,
    corpus_seed: int,
    seed: int,
    recipe: Recipe,
    make: Callable[[], tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]],
) -> None:
    """Make and save a model unless it is there."""
    config: dict[str, Any] = {
        "corpus_seed": corpus_seed,
        "seed": seed,
        "recipe": asdict(recipe),
        "has": {category: list(has) for category, has in HAS.items()},
    }
    inputs = {"categories": digest()}
    if start is not None:
        inputs["start"] = rundir.sha256_file(start / "model.safetensors")
    stage = lock.stage(directory, f"demo {name}", config, inputs, _OUTPUTS, recorded=False)
    if stage.up_to_date():
        return
    with stage:
        model, tokenizer = make()
        with quiet():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)


def _seed(seed: int, purpose: str) -> int:
    """Independent seeds for independent draws."""
    return int(rundir.sha256_text(f"{seed} {purpose}")[:8], 16)
