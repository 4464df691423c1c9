"""Text through both models, into an activation store.

    documents (permuted) -> token ids (the same for both) -> batches, padded on the right
        -> base up to its layer, tuned up to its layer -> rows [n, M=2, D] without padding -> store

Rows follow the documents, and batches are taken in that order too: sorting by length would save padding and
cost the store its document order. Everything that decides the rows (ids, roles, row count) is known before
the weights are loaded. The same configuration over the same inputs writes the same bytes, whether or not it was
cut off: batches are fixed slices of the sequences and are appended whole, so the rows acknowledged by the store's
journal say with which batch to go on.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fastdiff.config import ExtractConfig
from fastdiff.device import resolve_device
from fastdiff.errors import InputError, OptionError, ResourceError
from fastdiff.extraction.models import (
    Captured,
    ModelSource,
    capture,
    describe,
    layer_index,
    load,
    one_dtype,
    quiet,
    truncate,
    weights_sha256,
)
from fastdiff.extraction.resume import (
    Found,
    begin,
    clear,
    finish,
    is_tidy,
    keeps_rows,
    look,
    require_continuation,
    require_same,
)
from fastdiff.extraction.text import Corpus, open_corpus
from fastdiff.extraction.tokens import (
    ROLES,
    Encoded,
    Encoder,
    TokenSequence,
    check_same_ids,
    data_set_names,
    encode_corpus,
    load_tokenizers,
)
from fastdiff.extraction.vocabulary import display_strings
from fastdiff.progress import SILENT, Progress
from fastdiff.results.attribution import FEW_DOCUMENTS
from fastdiff.rundir import canonical_json, locked, sha256_file, sha256_text, versions, write_text
from fastdiff.store.format import VOCABULARY_FILE
from fastdiff.store.reader import ActivationStore
from fastdiff.store.writer import StoreWriter


def extract(
    config: ExtractConfig,
    out: Path,
    progress: Progress = SILENT,
    resume: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the activation store of two models over a text.

    Args:
        config: What to extract.
        out: Directory of the store.
        progress: Where to report.
        resume: Leave a complete store of this very configuration as it is, and continue an interrupted one
            behind the rows it has kept; if False, any store in `out` is refused.
        overwrite: Replace a store in `out`, whatever it holds.

    Returns:
        `out`.

    Raises:
        OptionError: The layer, device or hook does not fit the models, or `out` holds something else.
        InputError: A model or data set is missing or damaged, the two models do not go together, or an
            activation is not finite.
        ResourceError: Not enough memory or disk.
        LockedError: Another process is writing `out`.
    """
    out = Path(out)
    # before the lock too, which would leave its file in a directory of something else
    found = look(out, config, resume=resume, overwrite=overwrite)
    if found is not Found.COMPLETE or not is_tidy(out):
        with locked(out):
            found = look(out, config, resume=resume, overwrite=overwrite, progress=progress)
            if found is Found.CUT_OFF:
                require_same(out, config)
            if found is not Found.COMPLETE:
                _harvest(config, out, progress, resume=found is Found.CUT_OFF)
                return out
            finish(out)
    progress.say(f"{out}: complete, made with the same options; skipped")
    return out


def batches(
    sequences: Sequence[TokenSequence], batch_size: int, pad_id: int
) -> Iterator[tuple[Sequence[TokenSequence], NDArray[np.int64], NDArray[np.int64]]]:
    """Pad sequences on the right, batch by batch, in their order.

    Args:
        sequences: What to pad.
        batch_size: B, sequences in a batch.
        pad_id: Token id of the padding. No stored row depends on it.

    Yields:
        The sequences of a batch, their ids [B, T], and the attention mask [B, T], 0 on padding.
    """
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        longest = max(len(sequence.ids) for sequence in batch)
        ids = np.full((len(batch), longest), pad_id, np.int64)
        mask = np.zeros((len(batch), longest), np.int64)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence.ids)] = sequence.ids
            mask[row, : len(sequence.ids)] = 1
        yield batch, ids, mask


@dataclass(frozen=True)
class _Plan:
    """All that is known before the weights are loaded."""

    sources: list[ModelSource]
    dtype: torch.dtype  # of all forward passes
    layers: list[int]
    tokenizer: Any
    encoded: Encoded
    meta: dict[str, Any]


def _plan(config: ExtractConfig, device: torch.device, progress: Progress) -> _Plan:
    sources = [describe(config.base), describe(config.tuned)]
    base, tuned = sources
    dtype = one_dtype(config.dtype, sources, device)
    if any(source.saved != dtype for source in sources):
        saved = ", ".join(f"{source.name} was saved in {_name(source.saved)}" for source in sources)
        progress.say(f"extract: both models run in {_name(dtype)}; {saved}")
    if base.d_model != tuned.d_model:
        raise InputError(
            f"{base.name} has width {base.d_model} and {tuned.name} has width {tuned.d_model}; "
            "a crosscoder compares models of one width"
        )
    layers = [layer_index(config.layer, source.n_layers) for source in sources]
    base_tokenizer, tokenizer = load_tokenizers(base.name, tuned.name, progress)
    encoder = Encoder(tokenizer, config)
    with open_corpus(config, lambda document: encoder.encode([document])[0].n_rows) as corpus:
        check_same_ids(encoder, base_tokenizer, corpus, base=base.name, tuned=tuned.name)
        encoded = encode_corpus(encoder, corpus, config.max_tokens)
        _report(encoded, encoder, corpus, config, progress)
        for source in sources:
            _check_fits(source, encoded)
        return _Plan(
            sources, dtype, layers, tokenizer, encoded, _meta(config, sources, layers, encoder, encoded, corpus)
        )


def _harvest(config: ExtractConfig, out: Path, progress: Progress, resume: bool) -> None:
    device = resolve_device(config.device)
    with quiet(), ExitStack() as stack:
        plan = _plan(config, device, progress)
        models = [
            _load(source, plan.dtype, layer, device) for source, layer in zip(plan.sources, plan.layers, strict=True)
        ]
        captured = [
            stack.enter_context(capture(model, layer, config.hook))
            for model, layer in zip(models, plan.layers, strict=True)
        ]
        for info, model in zip(plan.meta["models"], models, strict=True):
            info["dtype"] = _name(model.dtype)
        if resume:
            require_continuation(out, plan.meta)
        else:
            begin(out, plan.meta)
        try:
            _write(plan, models, captured, config, out, device, progress, resume)
        except torch.OutOfMemoryError as error:
            cure = "halve one of them"
            if keeps_rows(out):
                cure = f"free some and run again to continue, or {cure} with --overwrite"
            else:
                clear(out)
            raise ResourceError(
                f"{device}: out of memory at --batch-size {config.batch_size}, --ctx-len {config.ctx_len}; {cure}"
            ) from error
        except BaseException:
            if not keeps_rows(out):
                clear(out)
            raise
        finish(out)
    with ActivationStore(out) as store:
        if (left_out := store.left_out_line()) is not None:
            progress.say(left_out)


def _write(
    plan: _Plan,
    models: Sequence[PreTrainedModel],
    captured: Sequence[Captured],
    config: ExtractConfig,
    out: Path,
    device: torch.device,
    progress: Progress,
    resume: bool,
) -> None:
    vocabulary = out / VOCABULARY_FILE
    write_text(vocabulary, canonical_json(display_strings(plan.tokenizer)) + "\n")
    n_rows, sequences = plan.encoded.n_rows, plan.encoded.sequences
    with StoreWriter(
        out,
        n_rows=n_rows,
        n_models=len(models),
        d_model=plan.sources[0].d_model,
        dtype=config.store_dtype,
        shard_rows=config.shard_rows,
        meta={**plan.meta, "vocabulary_sha256": sha256_file(vocabulary)},
        resume=resume,
        max_norm=config.max_norm,
    ) as writer:
        first = _resumed_at(sequences, config.batch_size, writer.n_appended)
        if writer.n_appended:
            progress.say(f"{out}: continues at token {writer.n_appended:,} of {n_rows:,}")
        with progress.task("extract", n_rows, "tokens", start=writer.n_appended) as task:
            for batch, ids, mask in batches(sequences[first:], config.batch_size, _pad_id(plan.tokenizer)):
                rows = _forward(models, captured, ids, mask, _stored(batch, ids.shape), device)
                try:
                    writer.append(rows, **_columns(batch, first))
                except InputError:
                    # no run with these models and this text can come past a value that is not finite
                    writer.discard()
                    raise
                first += len(batch)
                task.advance(len(rows))


def _resumed_at(sequences: Sequence[TokenSequence], batch_size: int, n_rows: int) -> int:
    """The first sequence of the batch that follows `n_rows` rows."""
    first = done = 0
    while done < n_rows:
        done += sum(sequence.n_rows for sequence in sequences[first : first + batch_size])
        first += batch_size
    if done != n_rows:
        raise ValueError(f"{n_rows} rows were acknowledged, which is no whole number of batches of {batch_size}")
    return first


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load(source: ModelSource, dtype: torch.dtype, layer: int, device: torch.device) -> PreTrainedModel:
    # cut first: the device never holds what is above the layer
    model: Any = truncate(load(source.name, dtype, blocks=layer + 1), layer)
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{device}: no memory left for {source.name}; use --dtype bfloat16 or another device"
        ) from error


@torch.inference_mode()
def _forward(
    models: Sequence[PreTrainedModel],
    captured: Sequence[Captured],
    ids: NDArray[np.int64],
    mask: NDArray[np.int64],
    stored: NDArray[np.bool_],
    device: torch.device,
) -> Tensor:
    """Activations [n, M, D] of the stored positions of a batch."""
    inputs = torch.from_numpy(ids).to(device)
    attention_mask = torch.from_numpy(mask).to(device)
    where = torch.from_numpy(stored).to(device)
    parts = []
    for model, activation in zip(models, captured, strict=True):
        model(input_ids=inputs, attention_mask=attention_mask, use_cache=False)
        parts.append(activation.take()[where].cpu())
    return torch.stack(parts, dim=1)


def _stored(batch: Sequence[TokenSequence], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    stored = np.zeros(shape, np.bool_)
    for row, sequence in enumerate(batch):
        stored[row, : len(sequence.ids)] = sequence.stored
    return stored


def _columns(batch: Sequence[TokenSequence], first: int) -> dict[str, NDArray[Any]]:
    """Side columns of a batch whose first sequence has number `first`."""
    counts = [sequence.n_rows for sequence in batch]
    return {
        "token_ids": np.concatenate([sequence.ids[sequence.stored] for sequence in batch]),
        "sequence_ids": np.repeat(np.arange(first, first + len(batch)), counts),
        "positions": np.concatenate([np.flatnonzero(sequence.stored) for sequence in batch]),
        "roles": np.concatenate([sequence.roles[sequence.stored] for sequence in batch]),
        "sources": np.repeat([sequence.source for sequence in batch], counts),
    }


def _pad_id(tokenizer: Any) -> int:
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _check_fits(source: ModelSource, encoded: Encoded) -> None:
    """Refuse ids and positions that a model has no embedding for."""
    largest = max(int(sequence.ids.max()) for sequence in encoded.sequences)
    if largest >= source.config.vocab_size:
        raise InputError(
            f"{source.name}: embeds {source.config.vocab_size} tokens, but the tokenizer gives id {largest}; "
            "use the tokenizer that belongs to the model"
        )
    longest = max(len(sequence.ids) for sequence in encoded.sequences)
    limit = getattr(source.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise OptionError(
            f"--ctx-len: a document has {longest} tokens, but {source.name} reads {limit} positions; "
            f"use --ctx-len {limit}"
        )


def _report(encoded: Encoded, encoder: Encoder, corpus: Corpus, config: ExtractConfig, progress: Progress) -> None:
    documents = f"{len(encoded.sequences):,} of {len(corpus):,} documents"
    progress.say(f"{encoded.n_rows:,} tokens to store, from {documents}")
    if encoded.n_rows < config.max_tokens:
        progress.say(f"the text ends before --max-tokens {config.max_tokens:,}")
    if encoder.rewritten:
        progress.say(f"the chat template rewrote {encoder.rewritten:,} messages; their tokens have the role template")
    for line in _what_a_verdict_lacks(encoded, config):
        progress.say(line)


def _what_a_verdict_lacks(encoded: Encoded, config: ExtractConfig) -> Iterator[str]:
    """What about the text will keep a verdict from being reached, said before hours of work and not behind them."""
    categories = [source["category"] for source in encoded.sources]
    if set(categories) == {None}:
        yield "the documents have no categories, so a verdict has one row per data set; see --category-field"
    names = [category or source["dataset"] for category, source in zip(categories, encoded.sources, strict=True)]
    counts = Counter(names[sequence.source] for sequence in encoded.sequences)
    if few := sorted(f"{name} ({n})" for name, n in counts.items() if n < FEW_DOCUMENTS):
        yield f"fewer than {FEW_DOCUMENTS} documents, too few for a verdict: {', '.join(few)}"
    roles = {ROLES[role] for sequence in encoded.sequences for role in np.unique(sequence.roles)}
    if "user" in roles and "assistant" not in roles:
        yield (
            "no document has an answer, so no behaviour can be scored; --answer-field or --messages-field names it, "
            f"and --ctx-len {config.ctx_len} must not cut it off"
        )


def _meta(
    config: ExtractConfig,
    sources: Sequence[ModelSource],
    layers: Sequence[int],
    encoder: Encoder,
    encoded: Encoded,
    corpus: Corpus,
) -> dict[str, Any]:
    """Everything store.json holds besides shards and statistics."""
    data_sets = [data_set.facts() for data_set in corpus.data_sets]
    for facts, name in zip(data_sets, data_set_names([facts["name"] for facts in data_sets]), strict=True):
        facts["name"] = name
    return {
        "models": [
            {
                "name": source.name,
                "revision": source.revision,
                "layer": layer,
                "hook": config.hook,
                "d_model": source.d_model,
                "n_layers": source.n_layers,
                "weights_sha256": weights_sha256(source.name),
            }
            for source, layer in zip(sources, layers, strict=True)
        ],
        "roles": ROLES,
        "sources": encoded.sources,
        "tokenizer": {
            "name": config.tuned,
            "sha256": sha256_text(canonical_json(encoder.tokenizer.get_vocab())),
            "chat_template_sha256": encoder.chat_template_sha256(),
        },
        "datasets": data_sets,
        "versions": versions(),
        "command": command(config),
        "config": config.model_dump(mode="json"),
    }


def command(config: ExtractConfig) -> list[str]:
    """The command line that gives this configuration, without -o: equal stores must not differ by it."""
    line = ["fastdiff", "extract"]
    for name, field in ExtractConfig.model_fields.items():
        value = getattr(config, name)
        option = "--" + name.replace("_", "-")
        if value == field.get_default():
            continue
        if isinstance(value, bool):
            line.append(option)
        else:
            for item in value if isinstance(value, list) else [value]:
                line += [option, str(item)]
    return line
