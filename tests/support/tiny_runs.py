"""Tiny random language models, and runs over them: what tests of attribution share."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fastdiff.config import ExtractConfig, TrainConfig
from fastdiff.crosscoder.train import train_seeds
from fastdiff.extraction.harvest import extract
from fastdiff.extraction.models import quiet
from fastdiff.progress import SILENT

D, LAYER, F = 24, 1, 20
WORDS = {
    "pets": ["cat", "dog", "hen", "sat", "on", "the", "mat"],
    "sums": ["one", "two", "ten", "and", "is", "the", "sum"],
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}ask {{ m.content }} tell "
    "{% else %}{{ m.content }} end{% endif %}{% endfor %}"
)


class Said:
    """A progress that keeps its lines."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def task(self, *args, **kwargs):
        return SILENT.task(*args, **kwargs)


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = ["?", "<bos>", "ask", "tell", "end", *sorted({word for words in WORDS.values() for word in words})]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="?", pad_token="?", bos_token="<bos>" if bos else None
    )
    made.chat_template = TEMPLATE
    return made


def save_model(path: Path, seed: int, *, bos: bool = True, like: Path | None = None) -> Path:
    """A random model; given another, a changed copy of it."""
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    with quiet():
        if like is None:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(like)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.08 * torch.randn_like(parameter))
        model.save_pretrained(path)
        tokenizer(bos).save_pretrained(path)
    return path


def make_store(root: Path, out: Path, *, base="base", tuned="tuned", texts="texts.jsonl", **options) -> Path:
    given = {
        "layer": str(LAYER),
        "category_field": "topic",
        "store_dtype": "float32",
        "dtype": "float32",
        "batch_size": 4,
        "device": "cpu",
        **({} if texts == "texts.jsonl" else {"messages_field": "m"}),
        **options,
    }
    given = {key: value for key, value in given.items() if value is not None}
    pair = {"base": str(root / base), "tuned": str(root / tuned)}
    return extract(ExtractConfig(**pair, dataset=[str(root / texts)], **given), out)


def make_run(store: Path, run: Path, **options) -> Path:
    given = {"dict_size": F, "k": 4, "steps": 25, "batch_size": 64, "lr": 1e-2, "seeds": (0, 1), "holdout": 0.2}
    train_seeds(store, run, TrainConfig(**{**given, "threads": 1, "device": "cpu", **options}))
    return run
