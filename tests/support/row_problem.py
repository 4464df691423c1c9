"""A batch with everything that can go wrong in it, for what works on the gradient rows of a latent."""

import torch
from poisoned_slots import by_slot, poisoned_slots

from fastdiff.kernels import reference
from fastdiff.kernels.fused_adam import RowState, adam_rates, update_rows
from fastdiff.kernels.latent_order import LatentOrder, order_by_latent
from fastdiff.kernels.row_gradients import AuxRows, row_slices, weight_gradients
from fastdiff.kernels.slots import ALL_FINITE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F = 6
SHAPES = [(1, 20), (2, 16), (3, 20), (2, 70)]
# 2 of the latents start first
SMALL = {"_entries": 2, "_hot": 2}
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8}


class Problem:
    """A batch whose latent 0 never fires and latent 1 always, in slots full of garbage."""

    def __init__(self, M, D, *, B=7, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        f = torch.rand(B, F, generator=generator).add(0.1) * (torch.rand(B, F, generator=generator) < 0.4)
        f[:, 0] = 0
        f[:, 1] = 1.5
        delta = torch.randn(B, F, generator=generator) * (f > 0)
        r, x = torch.randn(2, B, M * D, generator=generator)
        self.M, self.D = M, D
        self.f, self.delta_dense, self.c = (
            f.to(DEVICE),
            delta.to(DEVICE),
            torch.rand(B, M, generator=generator).to(DEVICE),
        )
        self.r, self.x = r.to(DEVICE, dtype), x.to(DEVICE, dtype)
        self.random = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
        self.aux = None
        # slices of at most 32 columns
        columns = 16 if M == 1 else 32
        self.small = {"n_models": M, "_columns": columns, **SMALL}
        self.T = row_slices(M, D, _columns=columns)

    def add_aux(self):
        index = torch.full((F,), -1, dtype=torch.int32, device=DEVICE)
        index[3], index[0] = 0, 1
        width = self.M * self.D
        self.aux = AuxRows(index, self.random(2, width), self.random(2, width), self.random(2))

    @property
    def batch(self):
        slots = poisoned_slots(self.f)
        order = LatentOrder.allocate(len(slots.col), F, torch.device(DEVICE))
        order_by_latent(slots.col, slots.row, slots.val, by_slot(slots, self.delta_dense), order)
        return order, self.c, self.r, self.x

    def gradients(self):
        """What the kernel writes, with AuxK's rows added."""
        G = torch.empty(2, F, self.M * self.D, device=DEVICE)
        b = torch.empty(F, device=DEVICE)
        weight_gradients(*self.batch, *G, b, **self.small)
        return self.with_aux(*G, b)

    def truth(self):
        """The gradients of the definition, with AuxK's rows added."""
        given = (self.f, self.delta_dense, self.c, self.r, self.x)
        return self.with_aux(*reference.row_gradients(*(tensor.double() for tensor in given)))

    def with_aux(self, *gradients):
        if self.aux is None:
            return gradients
        added = [gradient.clone() for gradient in gradients]
        for j, row in enumerate(self.aux.place.tolist()):
            if row >= 0:
                for gradient, rows in zip(added, self.aux[1:], strict=True):
                    gradient[j] += rows[row]
        return added

    def state(self, moments=torch.float32, shadows=True):
        width = self.M * self.D

        def matrix():
            moment = [self.random(F, width).to(moments) * 0.1, self.random(F, width).square().to(moments) * 0.1]
            return self.random(F, width), *moment, torch.zeros(F, width, dtype=torch.bfloat16, device=DEVICE)

        b_enc = self.random(F), self.random(F) * 0.1, self.random(F).square()
        state = RowState(*matrix(), *matrix(), *b_enc)
        return state if shadows else state._replace(W_dec_shadow=None, W_enc_shadow=None)

    def update(self, state, *, step=3, lr=1e-2, clip=1.0, bad=ALL_FINITE, seed=5, norms=None, squares=None):
        norms = torch.full((F, self.T, self.M), torch.nan, device=DEVICE) if norms is None else norms
        counter = torch.tensor([step], device=DEVICE)
        scalars = rates(step, lr), torch.tensor([clip], device=DEVICE), counter, flag(bad)
        update_rows(*self.batch, state, self.aux, *scalars, norms, squares, seed=seed, **SETTINGS, **self.small)
        return norms


def rates(step, lr):
    return torch.tensor(adam_rates(lr, (0.9, 0.999), step), device=DEVICE)


def flag(bad):
    return torch.tensor([bad], dtype=torch.int32, device=DEVICE)


def clone(state):
    return RowState(*(tensor if tensor is None else tensor.clone() for tensor in state))


def parameters(state):
    """(weight, m, v) of W_dec, W_enc and b_enc."""
    return state[0:3], state[4:7], state[8:11]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
