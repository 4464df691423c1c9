"""Every objective against a dense float64 transcription that shares no code with the trainer; the losses against finite
differences; what structure and parts of a batch must keep."""

import math

import pytest
import torch

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import losses
from fastdiff.crosscoder.inputs import chosen_models, n_inputs
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.structure import Structure, structure_of
from fastdiff.crosscoder.trainer import Trainer
from fastdiff.errors import OptionError

B, D, F, K = 24, 10, 40, 3


def batch(M: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    code = (torch.rand(B, 12, generator=generator) < 0.3) * torch.rand(B, 12, generator=generator) * 2
    mixing = torch.randn(12, M, D, generator=torch.Generator().manual_seed(99))
    return torch.einsum("bj,jmd->bmd", code, mixing) + 0.1 * torch.randn(B, M, D, generator=generator)


def make(M: int = 2, **options) -> Trainer:
    values = {"dict_size": F, "k": K, "steps": 40, "batch_size": B, "lr": 2e-3, "warmup_steps": 0, "clip": 0.0,
              "sparsity_warmup_steps": 0, "auxk_coef": 0.0}  # fmt: skip
    config = TrainConfig(**values | options)
    crosscoder = Crosscoder(F, M, D, activation=config.activation, k=K, code_norm=config.code_norm)
    crosscoder.initialize(batch(M), init="independent", seed=3, structure=structure_of(config, M))
    if config.activation == "jumprelu":
        crosscoder.threshold.data.copy_(torch.linspace(0.05, 0.6, F))
    crosscoder.b_enc.data.copy_(torch.linspace(-0.2, 0.2, F))
    return Trainer(crosscoder, config)


def reconstruction(error, config):
    return error.norm(dim=-1).mean() if config.loss == "l2norm" else error.square().mean()


def dense_loss(config: TrainConfig, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The whole objective in float64, every product dense."""
    pre = torch.einsum("bmd,fmd->bf", x, p["W_enc"]) + p["b_enc"]
    s = {
        "crosscoder": p["W_dec"].norm(dim=-1).sum(dim=1),
        "sae": p["W_dec"].flatten(1).norm(dim=1),
        "none": torch.ones(F, dtype=torch.float64),
    }[config.code_norm]
    weight = torch.ones(F, dtype=torch.float64)
    weight[: config.shared_latents] = config.shared_penalty

    def keep(k):
        score = (pre.relu() * s).detach()
        if config.activation == "topk":
            kept = torch.zeros_like(score).scatter(1, score.topk(k, dim=1).indices, 1.0)
        else:
            kept = torch.zeros(score.numel()).double().scatter(0, score.flatten().topk(B * k).indices, 1.0).view(B, F)
        return pre * kept * (score > 0)

    def decode(f):
        return torch.einsum("bf,fmd->bmd", f, p["W_dec"]) + p["b_dec"]

    extra = 0.0
    if config.activation == "relu":
        f = pre.relu()
        extra = config.l1_coef * (f * s * weight).sum(dim=1).mean()
    elif config.activation == "jumprelu":
        theta, width = p["threshold"], config.bandwidth
        fires = (pre > theta).double().detach()
        window = ((pre - theta).abs() < width / 2).double().detach()
        moved = (theta - theta.detach()) / width * window  # 0, with the gradient of the straight-through window
        f = pre * fires - theta.detach() * moved
        steps = fires - moved
        if config.sparsity == "target":
            extra = config.l0_coef * (steps.sum(dim=1).mean() / K - 1) ** 2
        elif config.sparsity == "l0":
            extra = config.l0_coef * (steps * weight).sum(dim=1).mean()
        else:
            extra = config.l0_coef * (weight * torch.tanh(config.tanh_scale * f * s)).sum(dim=1).mean()
        extra = extra + config.preact_coef * ((theta - pre).relu() * s).sum(dim=1).mean()
    else:
        f = keep(K)
        if config.multi_topk_coef:
            extra = config.multi_topk_coef * reconstruction(x - decode(keep(4 * K)), config)
    error = x - decode(f)
    ends = [round(share * F) for share in config.matryoshka] + [F]
    first = [reconstruction(x - decode(f * (torch.arange(F) < end)), config) for end in ends]
    loss = sum(first) / len(first) + extra
    if config.delta_coef:
        loss = loss + config.delta_coef * reconstruction(error[:, 1:] - error[:, :1], config)
    return loss


OBJECTIVES = [
    (1, {}),
    (3, {"loss": "mse"}),
    (2, {"activation": "topk", "multi_topk_coef": 0.125}),
    (2, {"multi_topk_coef": 0.5, "code_norm": "sae"}),
    (2, {"code_norm": "none", "loss": "mse"}),
    (2, {"delta_coef": 0.7}),
    (3, {"delta_coef": 0.7, "loss": "mse"}),
    (2, {"matryoshka": (0.25, 0.5), "delta_coef": 0.3}),
    (2, {"shared_latents": 8}),
    (2, {"exclusive": 0.1, "shared_latents": 5, "delta_coef": 1.0}),
    (2, {"activation": "relu", "shared_latents": 8, "code_norm": "sae"}),
    (2, {"activation": "jumprelu"}),
    (2, {"activation": "jumprelu", "sparsity": "l0", "l0_coef": 0.02, "shared_latents": 8}),
    (2, {"activation": "jumprelu", "sparsity": "tanh", "l0_coef": 0.1, "preact_coef": 0.01, "shared_latents": 8}),
]


@pytest.mark.parametrize(("M", "options"), OBJECTIVES, ids=lambda value: str(value))
@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_loss_and_every_gradient_equal_the_dense_transcription(M, options, backend):
    trainer = make(M, backend=backend, **options)
    c, config = trainer.crosscoder, trainer.config
    p = {name: value.detach().double().requires_grad_() for name, value in c.named_parameters()}
    loss = dense_loss(config, p, batch(M).double())
    gradients = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
    trainer._structure.project(gradients["W_enc"], gradients["W_dec"])
    trainer.step(batch(M))
    assert trainer.window().loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in c.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=2e-4, atol=2e-6, msg=name)
        assert gradients[name].abs().max() > 0, name


@pytest.mark.parametrize("loss", ["l2norm", "mse"])
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "topk"},
        {"activation": "relu", "delta_coef": 0.5},
        {"activation": "jumprelu"},
        {"activation": "jumprelu", "sparsity": "tanh", "l0_coef": 0.1, "preact_coef": 0.01},
    ],
    ids=str,
)
def test_parts_of_a_batch_add_up_to_it(options, loss):
    whole, parts = make(loss=loss, **options), make(loss=loss, micro_batch=6, **options)
    for step in range(4):
        whole.step(batch(2, step))
        parts.step(batch(2, step))
    assert parts.window().loss == pytest.approx(whole.window().loss, rel=1e-5)
    for (name, a), b in zip(whole.crosscoder.named_parameters(), parts.crosscoder.parameters(), strict=True):
        assert ((a - b).norm() / a.norm()).item() < 1e-4, name
    assert torch.equal(whole.tokens_since_fired, parts.tokens_since_fired)


def test_structure_is_kept_to_the_last_bit():
    trainer = make(exclusive=0.1, shared_latents=6, auxk_coef=1 / 32, dead_tokens=3 * B)
    c = trainer.crosscoder
    for step in range(20):
        trainer.step(batch(2, step))
    base, tuned = trainer._structure.owned(F, 2)
    assert (base, tuned) == (slice(32, 36), slice(36, 40))
    for weight in (c.W_enc, c.W_dec):
        assert not weight[base, 1].any() and not weight[tuned, 0].any()
        assert weight[base, 0].any() and weight[tuned, 1].any()
    assert torch.equal(c.W_dec[:6, 0], c.W_dec[:6, 1])
    assert not torch.equal(c.W_dec[6, 0], c.W_dec[6, 1])


def test_structure_that_does_not_fit_is_refused():
    for M, options, message in (
        (1, {"exclusive": 0.1}, "--exclusive 0.1 needs two models"),
        (2, {"exclusive": 0.01}, "less than one latent"),
        (2, {"exclusive": 0.4, "shared_latents": 10}, "more than --dict-size 40"),
    ):
        with pytest.raises(OptionError, match=message):
            structure_of(TrainConfig(dict_size=F, k=K, **options), M)
    assert structure_of(TrainConfig(dict_size=F, k=K), 1) == Structure(0, 0)


@pytest.mark.parametrize(("inputs", "message"), [("2", "the store has 2 models"), ("0,0", "at most once")])
def test_inputs_that_are_not_there_are_refused(inputs, message):
    with pytest.raises(OptionError, match=message):
        chosen_models(inputs, 2)


def test_a_difference_or_one_model_trains_as_if_it_had_been_stored():
    stored = [batch(2, step).bfloat16() for step in range(5)]
    for inputs, taken in (
        ("1", [x[:, 1:] for x in stored]),
        ("difference", [x[:, 1:].float() - x[:, :1].float() for x in stored]),
    ):
        assert n_inputs(inputs, 2) == 1
        config = TrainConfig(dict_size=F, k=K, steps=10, batch_size=B, inputs=inputs)
        weights = []
        for spec, data in ((inputs, stored), ("all", taken)):
            c = Crosscoder(F, 1, D, activation="batchtopk", k=K, inputs=spec)
            c.input_mean.fill_(0.1)
            c.input_scale.fill_(1.7)
            torch.testing.assert_close(c.denormalize(c.normalize(data[0])), c.take(data[0]).float())
            c.initialize(c.normalize(data[0]), init="independent", seed=0)
            trainer = Trainer(c, config)
            for x in data:
                trainer.step(x)
            weights.append(c.W_dec.detach())
        assert torch.equal(*weights)


def test_pure_losses_against_finite_differences():
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    error, pre, W_dec, norm = random(4, 2, 5), random(4, 6), random(6, 2, 5), random(6)
    latents, values = torch.tensor([0, 3, 3, 5]), random(4)
    weight = torch.tensor([0.1, 1, 1, 1, 1, 1], dtype=torch.float64)
    check = torch.autograd.gradcheck
    for kind in ("l2norm", "mse"):
        assert check(lambda e, kind=kind: losses.reconstruction(e, kind), error)
        assert check(lambda e, kind=kind: losses.difference(e, kind), error)
        assert check(lambda e, kind=kind: losses.prefixes([e, 2 * e], kind), error)
    target = error.detach()
    assert check(lambda f, W: losses.auxk(target, f, W, norm.detach().abs(), 3), (pre, W_dec))
    assert check(lambda v, s: losses.l1(v, latents, s, 4), (values, norm))
    assert check(lambda v, s: losses.tanh_penalty(v, latents, s, weight, 4, 4.0), (values, norm))
    assert check(losses.pre_activation, (pre, norm.detach().abs().requires_grad_(), norm))
    assert check(lambda l0: losses.l0_target(l0, 3.0), random())


class TestPublishedDefects:
    """What published trainers do wrong (names in the docstrings), and this one must not."""

    @pytest.mark.parametrize("options", [{"auxk_coef": 1.0, "dead_tokens": 1}, {"multi_topk_coef": 1.0}], ids=str)
    def test_auxiliary_losses_reach_the_encoder(self, options):
        """sparsify 1.3: AuxK and Multi-TopK give the encoder no gradient. crosscode: AuxK is left out of the loss."""
        plain, more = make(activation="topk"), make(activation="topk", **options)
        # latents that BatchTopK cannot choose for a while, but AuxK can
        for trainer in (plain, more):
            trainer.step(batch(2))
        assert more.window().loss > plain.window().loss
        difference = more.crosscoder.W_enc.grad - plain.crosscoder.W_enc.grad
        assert difference.abs().max() > 1e-6

    def test_no_gradient_flows_where_nothing_fires(self):
        """sparsify 1.3: the encoder's backward pass has no ReLU mask."""
        trainer = make(activation="topk")
        trainer.crosscoder.b_enc.data.fill_(-100.0)
        trainer.step(batch(2))
        assert not trainer.crosscoder.W_enc.grad.any() and trainer.window().n_active == 0

    def test_silent_latents_feel_the_pre_activation_loss(self):
        """crosscode: it is given activations after JumpReLU, so dead latents get nothing."""
        trainer = make(activation="jumprelu", sparsity="l0", l0_coef=0.0, preact_coef=0.1)
        trainer.crosscoder.b_enc.data[0] = -50.0
        trainer.step(batch(2))
        assert float(trainer.crosscoder.b_enc.grad[0]) < 0

    def test_the_l0_window_is_taken_on_pre_activations(self):
        """dictionary_learning: on activations, so half the window is lost and the gradient exactly half."""
        trainer = make(activation="jumprelu", sparsity="l0", l0_coef=1.0, loss="mse")
        c = trainer.crosscoder
        c.W_dec.data.zero_()  # only the penalty moves thresholds
        pre = c.pre_activations(c.normalize(batch(2)))
        count = ((pre - c.threshold).abs() < trainer.config.bandwidth / 2).sum(dim=0)
        trainer.step(batch(2))
        torch.testing.assert_close(c.threshold.grad, -count / (trainer.config.bandwidth * B), rtol=1e-5, atol=1e-6)

    def test_a_short_run_has_a_threshold(self):
        """dictionary_learning: unset before step 1000, so inference is plain ReLU."""
        trainer = make()
        for step in range(5):
            trainer.step(batch(2, step))
        values, _ = trainer.crosscoder.encode(batch(2, 9))
        assert float(trainer.crosscoder.threshold[0]) > 0 and len(values) / B < 2 * K

    def test_selected_activations_are_positive(self):
        """crosscode: TopK takes negative values too."""
        trainer = make(activation="topk")
        trainer.crosscoder.b_enc.data.fill_(-2.0)
        values, _ = trainer.crosscoder.encode(batch(2))
        assert (values > 0).all()

    def test_gradients_do_not_pile_up(self):
        """openai/sparse_autoencoder: no zero_grad in the loop."""
        trainer = make(lr=1e-30)
        trainer.step(batch(2))
        first = trainer.crosscoder.W_enc.grad.clone()
        trainer.step(batch(2))
        torch.testing.assert_close(trainer.crosscoder.W_enc.grad, first)

    def test_bias_gradients_belong_to_their_latents(self):
        """clt-training: indexed by row instead of latent."""
        trainer = make(activation="topk")
        trainer.step(batch(2))
        fired = trainer.tokens_since_fired == 0
        assert torch.equal(trainer.crosscoder.b_enc.grad != 0, fired)

    def test_a_low_precision_store_has_exact_statistics(self):
        """dictionary_learning: mean and deviation accumulate in the storage type."""
        from fastdiff.store.statistics import RunningStats

        x = (5 + torch.randn(4000, 1, 3, generator=torch.Generator().manual_seed(0))).bfloat16()
        stats = RunningStats(1, 3)
        stats.add(x)
        found = stats.result()
        want = x.double()
        torch.testing.assert_close(torch.tensor(found.mean, dtype=torch.float64), want.mean(dim=0), rtol=1e-12, atol=0)
        assert math.isclose(found.variance[0], float(want.var(dim=0, correction=0).sum()), rel_tol=1e-12)
