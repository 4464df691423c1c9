"""AuxK: the gradient by which dead latents learn what the living ones leave over. See `step` for the formulas.

The dead latents of a step are compacted to the front of lists of fixed length, and the rest is four dense products on
these rows: with D/2 latents per token, gathering them would read 60 GB per product at D = 3584. Nothing is read back;
the host decides every few steps how long the lists must be (`triton_step`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.matmul import matmul_into
from fastdiff.kernels.row_gradients import AuxRows
from fastdiff.kernels.topk import mask_topk

# float32 activations of the dead latents held at a time
_CHUNK = 2**26


class DeadLatents(NamedTuple):
    """Dead latents of a step, compacted, and their gradient rows."""

    latents: Tensor  # [n + 1] int64, ascending; F where unused. The last place takes what is not dead
    decoder: Tensor  # [n, C], their decoder rows; arbitrary where unused
    f: Tensor  # [B, n], their activations, then the gradient of their pre-activations
    rows: AuxRows

    @staticmethod
    def allocate(
        n: int, n_tokens: int, dict_size: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> "DeadLatents":
        """Room for n dead latents and micro-batches of B tokens, in the type the products use."""

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return DeadLatents(
            latents=empty(n + 1, dtype=torch.int64),
            decoder=empty(n, width),
            f=empty(n_tokens, n),
            rows=AuxRows(
                place=empty(dict_size, dtype=torch.int32),
                dec=empty(n, width),
                enc=empty(n, width),
                bias=empty(n, dtype=torch.float32),
            ),
        )

    def collect(self, dead: Tensor, W_dec: Tensor) -> None:
        """Compact the dead latents, a mask [F] of at most n, and their rows of W_dec [F, C]; zero the gradients."""
        n, F = len(self.latents) - 1, len(dead)
        rank = dead.cumsum(0) - 1
        place = torch.where(dead, rank, n)
        self.latents.fill_(F)
        self.latents.scatter_(0, place, torch.arange(F, device=dead.device))
        self.latents[n].fill_(F)
        self.rows.place.copy_(torch.where(dead, rank, -1))
        torch.index_select(W_dec, 0, self._clamped(F), out=self.decoder)
        for rows in (self.rows.dec, self.rows.enc, self.rows.bias):
            rows.zero_()

    def add_gradients(
        self,
        x: Tensor,
        residual: Tensor,
        pre: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        code_norm: Tensor,
        *,
        spread: Tensor,
        n_valid: Tensor,
        n_total: Tensor,
        coef: float,
        k: int,
    ) -> Tensor:
        """Add one micro-batch's gradients to the rows.

        Args:
            x: [B, C], zero in rows from n_valid on.
            residual: r, [B, C], likewise.
            pre: Scores without bias of all latents, [B, F], or None to compute those of the dead.
            W_enc: Encoder rows in the type of x, [F, C].
            b_enc: [F].
            code_norm: s, [F].
            spread: V, [] float64.
            n_valid: Tokens in the micro-batch, [] integer.
            n_total: Tokens in the update, [] integer.
            coef: α.
            k: At most this many dead latents per token.

        Returns:
            α·L_aux, [] float64, weighted with the micro-batch's share of the update.
        """
        F, n = len(b_enc), len(self.decoder)
        latents = self._clamped(F)
        bias = torch.where(self.latents[:n] < F, b_enc[latents], -torch.inf)  # unused places never fire
        scale = code_norm[latents]
        W_enc_dead = W_enc[latents] if pre is None else W_enc
        size = max(1, _CHUNK // n)
        chunks = [slice(at, min(len(x), at + size)) for at in range(0, len(x), size)]
        for chunk in chunks:
            if pre is not None:
                f = torch.index_select(pre[chunk], 1, latents)
            else:
                f = torch.empty(chunk.stop - chunk.start, n, device=x.device)
                matmul_into(f, x[chunk], W_enc_dead.T)
            valid = torch.arange(chunk.start, chunk.stop, device=x.device) < n_valid
            f = f.add_(bias).relu_().mul_(valid[:, None])
            if n > k:
                mask_topk(f, scale, k)
            self.f[chunk].copy_(f)
        miss = torch.empty(residual.shape, device=x.device)
        matmul_into(miss, self.f, self.decoder)
        miss += residual
        share = torch.where(spread > 0, coef / (n_total * spread), 0.0)
        u = (miss * (2 * share)).to(x.dtype)
        self.rows.dec.addmm_(self.f.T, u)
        for chunk in chunks:
            self.f[chunk] = torch.where(self.f[chunk] > 0, u[chunk] @ self.decoder.T, 0.0)
        self.rows.enc.addmm_(self.f.T, x)
        self.rows.bias.add_(self.f.sum(dim=0, dtype=torch.float32))
        loss = share * torch.linalg.vector_norm(miss, dtype=torch.float64).square()
        return torch.where(self.latents[0] < F, loss, 0.0)  # no loss without dead latents

    def _clamped(self, F: int) -> Tensor:
        return self.latents[:-1].clamp(max=F - 1)
