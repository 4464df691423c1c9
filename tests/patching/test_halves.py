"""Upper halves of models: they give what the whole model gives, from its own activation and from another."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2MoeConfig,
)

from fastdiff.errors import OptionError
from fastdiff.extraction.models import quiet
from fastdiff.patching.halves import Halves, UpperHalf, hooked
from fastdiff.patching.refusal import CannotRun

D, VOCAB = 32, 90
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON, num_key_value_heads=2),
    "gemma2": lambda: Gemma2Config(
        **_COMMON, num_key_value_heads=2, head_dim=8, sliding_window=3, final_logit_softcapping=2.0
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=4, n_head=4, n_positions=32),
    "neox": lambda: GPTNeoXConfig(**_COMMON),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
    ),
    "moe": lambda: Qwen2MoeConfig(
        **_COMMON, num_key_value_heads=2, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
PLACES = [
    ("llama", 0, "resid_post"),
    ("llama", 2, "resid_post"),
    ("llama", 3, "resid_post"),
    ("llama", 0, "mlp_out"),
    ("llama", 2, "attn_out"),
    ("gemma2", 1, "resid_post"),
    ("gemma2", 2, "mlp_out"),
    ("gpt2", 2, "resid_post"),
    ("gpt2", 2, "attn_out"),
    ("neox", 2, "resid_post"),
    ("opt", 1, "resid_post"),
    ("moe", 1, "resid_post"),
]


def make(kind: str):
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded():
    ids = torch.randint(4, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 3:] = 0
    return ids * mask, mask


def by_plain_hook(model, layer, hook, ids, mask, activation):
    """Last hidden states of the whole model, in which nothing is skipped."""

    def put(_module, _args, out):
        return (activation, *out[1:]) if isinstance(out, tuple) else activation

    handle = hooked(model, layer, hook).register_forward_hook(put)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    handle.remove()
    return hidden


@pytest.mark.parametrize(("kind", "layer", "hook"), PLACES)
def test_the_upper_half_is_the_models_own_value_and_gradient(kind, layer, hook):
    model, (ids, mask) = make(kind), padded()
    upper = UpperHalf(Halves(model, "x"), layer, hook)
    upper.check(ids, mask)
    assert upper._skips
    own, hidden = upper.read(ids, mask)
    real = mask.bool()
    assert torch.equal(upper.go_on(own)[real], hidden[real])
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)) * mask[..., None]
    ran = []
    for block in upper._skipped:
        block.register_forward_pre_hook(lambda *_: ran.append(1))
    gradients = []
    for go_on in (upper.go_on, lambda h: by_plain_hook(model, layer, hook, ids, mask, h)):
        given = (own + torch.randn(own.shape, generator=torch.Generator().manual_seed(2))).requires_grad_(True)
        out = go_on(given)
        (out * weight).sum().backward()
        gradients.append((out[real].detach(), given.grad))
    assert (gradients[0][0] - hidden[real]).abs().max() > 1e-3
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs) and ours.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_and_their_gradient_are_those_of_the_whole_model(kind, monkeypatch):
    monkeypatch.setattr("fastdiff.patching.halves.LOGIT_BYTES", 4 * 4 * VOCAB)
    model, (ids, mask) = make(kind), padded()
    halves = Halves(model, "x")
    counted = mask[:, 1:].bool()
    hidden = halves.hidden(ids, mask)[:, :-1][counted]
    targets = ids[:, 1:][counted]
    weights = torch.rand(len(targets), generator=torch.Generator().manual_seed(4))
    logits = model(ids, attention_mask=mask).logits[:, :-1][counted]
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(halves.losses(hidden, targets).float(), want, atol=1e-5)
    given = hidden.clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(halves.logits(given), targets, reduction="none")
    (loss * weights).sum().backward()
    assert torch.allclose(halves.loss_gradient(hidden, targets, weights), given.grad, rtol=1e-4, atol=1e-6)
    assert len(halves.losses(hidden[:0], targets[:0])) == 0


def test_nothing_is_skipped_where_a_later_block_looks_at_an_earlier_one():
    model, (ids, mask) = make("llama"), padded()
    first, last = model.model.layers[0], model.model.layers[3]
    seen = []
    first.register_forward_hook(lambda _module, _args, out: seen.append(out))
    last.register_forward_hook(lambda _module, _args, out: out + seen[-1])
    upper = UpperHalf(Halves(model, "x"), 2, "resid_post")
    upper.check(ids, mask)
    assert not upper._skips
    own, hidden = upper.read(ids, mask)
    assert torch.equal(upper.go_on(own), hidden)
    given = (own + 1).requires_grad_(True)
    upper.go_on(given).sum().backward()
    assert given.grad.abs().max() > 0


def test_a_model_that_does_not_repeat_itself_is_refused():
    model, (ids, mask) = make("llama"), padded()
    model.model.norm.register_forward_hook(lambda _module, _args, out: out + torch.randn_like(out))
    upper = UpperHalf(Halves(model, "x"), 2, "resid_post")
    with pytest.raises(CannotRun, match=r"^does not repeat itself"):
        upper.check(ids, mask)


def test_a_model_that_gives_nan_is_refused():
    model, (ids, mask) = make("llama"), padded()
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("nan")
    upper = UpperHalf(Halves(model, "x"), 2, "resid_post")
    with pytest.raises(CannotRun, match=r"^gives NaN or infinity; try --dtype float32"):
        upper.check(ids, mask)


def test_a_branch_that_is_not_what_is_added_is_refused():
    model, (ids, mask) = make("llama"), padded()
    model.model.layers[1].register_forward_hook(lambda _module, _args, out: out * 1.5)
    with pytest.raises(OptionError, match="do not add up"):
        UpperHalf(Halves(model, "x"), 1, "mlp_out").read(ids, mask)
