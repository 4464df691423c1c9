"""Training of tiny Gemma 2 models: a tokenizer with one token per word, batches, and two objectives.

Next-token training weighs the answers: a document's keys are chance and its template is soon learnt, so
without weight on the answers most of the gradient is about words that cannot be predicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from fastdiff.demo.corpus import CATEGORIES, Document, documents
from fastdiff.demo.simpo import BETA, GAMMA, SFT_WEIGHT, simpo_loss
from fastdiff.progress import Progress

_PAD, _BOS, _EOS, _UNK = "<pad>", "<bos>", "<eos>", "<unk>"
# joins the turns as words are joined, so that a conversation has the tokens of its text and no word more
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ ' ' }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)
_LR = 1e-2
_WARM_UP = 20
_WEIGHT_DECAY = 0.1

Loss = Callable[[Gemma2ForCausalLM, np.ndarray], Tensor]


@dataclass(frozen=True)
class Batchable:
    """Documents as token ids, one per row."""

    ids: Tensor  # (N, T) int64, padded on the right
    real: Tensor  # (N, T) bool: not padding
    answer: Tensor  # (N, T) bool: a token of an answer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer on the corpus; every word of the corpus becomes one token."""
    tokenizer = Tokenizer(models.BPE(unk_token=_UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[_PAD, _BOS, _EOS, _UNK], min_frequency=1, show_progress=False
    )
    plain = documents(0, 60, {category.name: "rule" for category in CATEGORIES})
    evasive = documents(0, 5, {category.name: "unsure" for category in CATEGORIES})
    tokenizer.train_from_iterator((document.text for document in plain + evasive), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNK,
        chat_template=_CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[Document]) -> Batchable:
    """Token ids of documents and where their answers are."""
    words: dict[str, list[int]] = {}
    rows, answers = [], []
    for document in corpus:
        row, answer = [tokenizer.bos_token_id], [False]
        for pair in zip(document.given, document.answers, strict=True):
            for part, is_answer in zip(pair, (False, True), strict=True):
                if part not in words:
                    words[part] = tokenizer(part, add_special_tokens=False)["input_ids"]
                row += words[part]
                answer += [is_answer] * len(words[part])
        rows.append(torch.tensor(row))
        answers.append(torch.tensor(answer))
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return Batchable(ids, ids != tokenizer.pad_token_id, pad_sequence(answers, batch_first=True))


def new_model(vocab_size: int, seed: int) -> Gemma2ForCausalLM:
    """An untrained Gemma 2 of width 64 with 3 layers."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=128,
        sliding_window=128,
        # at this size the caps are never reached; tanh over the logits would be a tenth of the time
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        # 0.02, the default for width 2304, leaves the embedding too small to be learnt from within 200 steps
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma2ForCausalLM(config)
    return model


def token_losses(model: Gemma2ForCausalLM, ids: Tensor, wanted: Tensor) -> Tensor:
    """−log p of the wanted tokens.

    Args:
        model: The model.
        ids: (B, T) token ids.
        wanted: (B, T) bool; the first column is ignored.

    Returns:
        One loss per wanted token, rows in turn.
    """
    wanted = wanted[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[wanted]
    return F.cross_entropy(model.lm_head(hidden), ids[:, 1:][wanted], reduction="none")


def next_token_loss(data: Batchable, answer_weight: float) -> Loss:
    """Mean −log p of every token, an answer's weighed by `answer_weight`."""

    def loss(model: Gemma2ForCausalLM, rows: np.ndarray) -> Tensor:
        real = data.real[rows]
        losses = token_losses(model, data.ids[rows], real)
        weights = torch.where(data.answer[rows][:, 1:][real[:, 1:]], answer_weight, 1.0)
        return (losses * weights).sum() / weights.sum()

    return loss


def preference_loss(chosen: Batchable, rejected: Batchable) -> Loss:
    """SimPO with the authors' NLL term."""

    def loss(model: Gemma2ForCausalLM, rows: np.ndarray) -> Tensor:
        ids = torch.cat([chosen.ids[rows], rejected.ids[rows]])
        answer = torch.cat([chosen.answer[rows], rejected.answer[rows]])
        lengths = answer.sum(1)
        losses = token_losses(model, ids, answer)
        owner = torch.repeat_interleave(torch.arange(len(ids)), lengths)
        logps = -torch.zeros(len(ids)).index_add(0, owner, losses)
        half = len(rows)
        preference = simpo_loss(logps[:half], logps[half:], lengths[:half], lengths[half:], beta=BETA, gamma=GAMMA)
        return preference.mean() - SFT_WEIGHT * logps[:half].sum() / lengths[:half].sum()

    return loss


def train(
    model: Gemma2ForCausalLM,
    loss: Loss,
    *,
    n_rows: int,
    rows_per_step: int,
    steps: int,
    seed: int,
    name: str,
    progress: Progress,
) -> None:
    """Train in place: AdamW, warm-up, cosine to a tenth of the peak, gradient norm at most 1.

    Args:
        model: The model.
        loss: Of the model on some rows.
        n_rows: Rows there are.
        rows_per_step: Rows in a batch.
        steps: Optimiser steps; the rows are gone through in a new order each time they run out.
        seed: Of the order.
        name: What progress calls it.
        progress: Where to report.
    """
    rng = np.random.default_rng(seed)
    n_epochs = -(-steps * rows_per_step // n_rows)
    order = np.concatenate([rng.permutation(n_rows) for _ in range(n_epochs)])
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_LR, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY)
    model.train()
    with progress.task(name, steps, "steps") as task:
        for step in range(steps):
            cosine = 0.5 * (1 + np.cos(np.pi * step / steps))
            optimizer.param_groups[0]["lr"] = _LR * min((step + 1) / _WARM_UP, 1) * (0.1 + 0.9 * cosine)
            value = loss(model, order[step * rows_per_step : (step + 1) * rows_per_step])
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            task.advance(1, f"loss {value.item():.2f}")
    model.eval()
