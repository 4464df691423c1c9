"""Latents that are not free: some belong to one model only, some have the same decoder in all.

    [0, shared)                            designated shared: W_dec[j, m] is the same for all m
    [shared, F - M·n)                      free
    [F - M·n, F), n per model, in order    exclusive: model m alone reads and writes its n; zero elsewhere

Both are kept by treating gradients, so that any optimizer that works on each weight alone keeps them too: where a
weight is absent its gradient is 0; tied rows all get the sum of theirs, which is the gradient of the one row they are.
The norm that clips counts every copy. `tie` undoes the last bits in which an optimizer's vector code and its scalar
code for the end of a tensor differ.

Source: designated shared latents, Anthropic, February 2025, "Insights on Crosscoder Model Diffing"; exclusive ones,
Dedicated Feature Crosscoders, arXiv:2602.11729.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.config import TrainConfig
from fastdiff.errors import OptionError


@dataclass(frozen=True)
class Structure:
    """How many latents are tied, and how many belong to each model."""

    shared: int
    exclusive: int  # per model

    def owned(self, dict_size: int, n_models: int) -> list[slice]:
        """The exclusive latents of each model."""
        start, n = dict_size - n_models * self.exclusive, self.exclusive
        return [slice(start + m * n, start + (m + 1) * n) for m in range(n_models)]

    @torch.no_grad()
    def impose(self, W_enc: Tensor, W_dec: Tensor) -> None:
        """Make free weights [F, M, D], as initialisation draws them, obey."""
        self._clear_absent(W_enc, W_dec)
        # a tied row that reads the models along other directions than it writes would begin as noise
        self.tie(W_enc)
        self.tie(W_dec)

    @torch.no_grad()
    def tie(self, weight: Tensor) -> None:
        """Give all models the designated shared rows of the first, in weights [F, M, D]."""
        if self.shared:
            weight[: self.shared] = weight[: self.shared, :1].clone()

    @torch.no_grad()
    def project(self, g_enc: Tensor, g_dec: Tensor) -> None:
        """Make the gradients [F, M, D] of both weights obey, in place."""
        self._clear_absent(g_enc, g_dec)
        if self.shared:
            g_dec[: self.shared] = g_dec[: self.shared].sum(dim=1, keepdim=True)

    def _clear_absent(self, *tensors: Tensor) -> None:
        """Zero what an exclusive latent does not have, in [F, M, D]."""
        for tensor in tensors:
            for m, own in enumerate(self.owned(*tensor.shape[:2])):
                tensor[own, :m] = 0
                tensor[own, m + 1 :] = 0


def structure_of(config: TrainConfig, n_models: int) -> Structure:
    """The structure that a configuration asks for.

    Raises:
        OptionError: It does not fit the number of models or of latents.
    """
    exclusive = round(config.exclusive * config.dict_size)
    for option, wanted in (("--exclusive", config.exclusive), ("--shared-latents", config.shared_latents)):
        if wanted and n_models < 2:
            raise OptionError(f"{option} {wanted} needs two models; this crosscoder has {n_models}")
    if config.shared_latents + n_models * exclusive > config.dict_size:
        raise OptionError(
            f"--shared-latents {config.shared_latents} and --exclusive {config.exclusive} of {n_models} models are "
            f"more than --dict-size {config.dict_size}; lower one"
        )
    if config.exclusive and not exclusive:
        raise OptionError(
            f"--exclusive {config.exclusive} of --dict-size {config.dict_size} is less than one latent; raise it"
        )
    return Structure(config.shared_latents, exclusive)
