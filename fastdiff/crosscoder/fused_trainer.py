"""Training by a fused step: BatchTopK and TopK, on the Triton kernels or in plain torch. See `kernels.step`."""

import torch
from torch import Tensor

from fastdiff.config import TrainConfig
from fastdiff.crosscoder import schedule
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.trainer import Trainer, add_figures
from fastdiff.errors import FastdiffError, OptionError
from fastdiff.kernels.backend import resolve_backend
from fastdiff.kernels.step import Figures, NotFinite, StepRates, StepSettings, StepTensors
from fastdiff.kernels.torch_step import TorchStep
from fastdiff.kernels.triton_step import TritonStep

_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


class FusedTrainer:
    """Steps a crosscoder; `state` and `load_state` carry it across processes, `window` says how it goes.

    On CUDA `step` only enqueues, at most two steps ahead of the device, and from the third on replays a CUDA graph. A
    number that is not finite therefore comes to light two steps late, or in `window` and `state`, which wait; the
    weights are those of the last good step. The semantics are `Trainer`'s, whose docstring defines dead latents
    and the inference threshold.
    """

    def __init__(self, crosscoder: Crosscoder, config: TrainConfig):
        F = crosscoder.dict_size
        device = crosscoder.b_enc.device
        why_not = why_not_fused(config)
        if why_not is not None:
            raise ValueError(f"{why_not} has no fused step; use Trainer")
        self.crosscoder, self.config = crosscoder, config
        self._kept = list[Figures]()
        # of a step that was given up; there until the next one is made, which may fail for lack of memory too
        self._carried: dict[str, Tensor] | None = None
        self.step_number = 0
        weights = {name: getattr(crosscoder, name).detach() for name in _NAMES}
        # biases are few: their moments stay float32
        kinds = {name: getattr(torch, config.moments) if w.ndim == 3 else w.dtype for name, w in weights.items()}
        self._tensors = StepTensors(
            **weights,
            moments={
                name: (torch.zeros_like(w, dtype=kinds[name]), torch.zeros_like(w, dtype=kinds[name]))
                for name, w in weights.items()
            },
            gradient_norm=torch.zeros((), device=device),
            threshold=crosscoder.threshold,
            tokens_since_fired=torch.zeros(F, dtype=torch.int64, device=device),
            input_mean=crosscoder.input_mean,
            input_scale=crosscoder.input_scale,
        )
        self.back_off(config.micro_batch or config.batch_size)

    def back_off(self, micro_batch: int) -> None:
        """From now on hold this many tokens at a time.

        Raises:
            OptionError: An option does not go with the device.
        """
        config = self.config
        device = self.crosscoder.b_enc.device
        if hasattr(self, "_step"):
            self._kept.append(self._step.figures())
            # not of one that ran out of memory before it was given the state of the last
            if self._carried is None:
                self._carried = self._step.state()
            del self._step  # its buffers make room for the new ones
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        settings = StepSettings(
            n_tokens=micro_batch,
            n_micro=config.batch_size // micro_batch,
            k_max=max(config.k, config.k_start or 0),
            selection="batchtopk" if config.activation == "batchtopk" else "topk",
            loss=config.loss,
            auxk_coef=config.auxk_coef,
            dead_tokens=config.dead_tokens,
            clip=config.clip,
            clip_mode=config.clip_mode,
            precision=precision,
            moments=config.moments,
            seed=config.seed,
        )
        try:
            kind = TritonStep if resolve_backend(config.backend, device) == "triton" else TorchStep
            self._step: TritonStep | TorchStep = kind(settings, self._tensors)
        except ValueError as error:
            raise OptionError(str(error)) from error
        self.micro_batch = micro_batch
        if self._carried is not None:
            self._step.load_state(self._carried)
            self._carried = None

    @property
    def k(self) -> int:
        """Active latents per token that the next step aims at."""
        return schedule.k_at(self.step_number, self.config)

    @property
    def tokens_since_fired(self) -> Tensor:
        """Tokens since each latent last fired, [F] int64."""
        return self._tensors.tokens_since_fired

    def step(self, batch: Tensor) -> None:
        """One update on stored activations [N, M_stored, D], N at most `batch_size`.

        Raises:
            FastdiffError: A number was not finite, in this step or, on CUDA, in one not long ago.
        """
        t, config = self.step_number, self.config
        rates = StepRates(
            number=t,
            k=self.k,
            lr=schedule.rate_at(t, config),
            threshold_memory=schedule.threshold_memory(t, config),
        )
        self._step.step(self.crosscoder.take(batch), rates)
        self._stop_at(self._step.not_finite())
        self.step_number += 1

    def window(self) -> Figures:
        """What the steps since the last call measured.

        Raises:
            FastdiffError: A number was not finite.
        """
        parts, self._kept = [*self._kept, self._step.figures()], []
        self._stop_at(self._step.not_finite())
        return add_figures(parts)

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights and the step number.

        Raises:
            FastdiffError: A number was not finite.
        """
        self._step.wait()
        self._stop_at(self._step.not_finite())
        tensors = {
            "tokens_since_fired": self._tensors.tokens_since_fired,
            "gradient_norm": self._tensors.gradient_norm,
        }
        for name, (first, second) in self._tensors.moments.items():
            tensors[f"{name}.exp_avg"], tensors[f"{name}.exp_avg_sq"] = first, second
        return tensors | self._step.state()

    def load_state(self, tensors: dict[str, Tensor], step_number: int) -> None:
        """Continue from what `state` gave after `step_number` steps; the weights must be loaded already."""
        self.step_number = step_number
        self._tensors.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        self._tensors.gradient_norm.copy_(tensors["gradient_norm"])
        for name, (first, second) in self._tensors.moments.items():
            first.copy_(tensors[f"{name}.exp_avg"])
            second.copy_(tensors[f"{name}.exp_avg_sq"])
        self._step.load_state(tensors)

    def _stop_at(self, bad: NotFinite | None) -> None:
        if bad is None:
            return
        what = "the gradient is" if bad.token is None else f"the activations or scores of token {bad.token} are"
        raise FastdiffError(
            f"step {bad.step}: {what} NaN or infinite; lower --lr or look at the activations "
            "(the weights are still those of the last good step)"
        )


def why_not_fused(config: TrainConfig) -> str | None:
    """The option that has no fused step, as the command line writes it; None if all have."""
    if config.activation not in ("batchtopk", "topk"):
        return f"--activation {config.activation}"
    if config.backend == "dense":
        return "--backend dense"
    for name in ("multi_topk_coef", "matryoshka", "delta_coef", "shared_latents", "exclusive"):
        if getattr(config, name):
            return f"--{name.replace('_', '-')}"
    return None if config.code_norm == "crosscoder" else f"--code-norm {config.code_norm}"


def make_trainer(crosscoder: Crosscoder, config: TrainConfig) -> Trainer | FusedTrainer:
    """The trainer of a configuration: fused where there is a fused step, by autograd otherwise.

    Raises:
        OptionError: An option does not go with another, or with the device.
    """
    why = why_not_fused(config)
    _refuse_idle(config, crosscoder.b_dec.shape[0])
    if why is None:
        return FusedTrainer(crosscoder, config)
    for name, plain in (("moments", "float32"), ("clip_mode", "exact")):
        if getattr(config, name) != plain:
            raise OptionError(
                f"--{name.replace('_', '-')} {getattr(config, name)} does not go with {why}; leave it out"
            )
    if config.precision == "bfloat16":
        raise OptionError(f"--precision bfloat16 does not go with {why}; leave it out")
    return Trainer(crosscoder, config)


def _refuse_idle(config: TrainConfig, n_models: int) -> None:
    """An option that would do nothing is a misunderstanding."""
    topk, jumprelu = config.activation in ("batchtopk", "topk"), config.activation == "jumprelu"
    if config.multi_topk_coef and not topk:
        raise OptionError(f"--multi-topk-coef does not go with --activation {config.activation}; leave it out")
    if (config.preact_coef or config.sparsity != "target") and not jumprelu:
        raise OptionError("--preact-coef and --sparsity go with --activation jumprelu; leave them out")
    if config.delta_coef and n_models < 2:
        raise OptionError(f"--delta-coef {config.delta_coef} needs two models; this crosscoder has {n_models}")
    if config.clip_mode == "previous" and config.clip == 0:
        raise OptionError("--clip-mode previous does not go with --clip 0, which turns clipping off; leave one out")
