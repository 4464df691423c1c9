"""Language models in halves: up to a hook, from there to the last hidden states, and on to the logits.

    ids ──lower half──▶ h [B, T, D] at the hook ──upper half──▶ last hidden states [B, T, D] ──head──▶ logits

The upper half goes on from any h, with a gradient to h and to nothing else. It is the model's own forward pass in which
the blocks below the hook are skipped: they hand on what they are given, the block at the hook gives h instead. Masks,
positions and the final norm are therefore whatever the architecture makes them. Where that does not give what the whole
model gives (`UpperHalf.check`), because later blocks look at earlier ones, nothing is skipped.

The head is run on few tokens at a time, for all logits of a batch may be too many.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdiff.errors import OptionError
from fastdiff.extraction.models import Hook, branches, capture, find_layers
from fastdiff.patching.refusal import CannotRun

# float32 logits of the tokens looked at together; four such arrays exist at a time
LOGIT_BYTES = 2**28
# what skipping the lower blocks may change, relative to the largest value, in units of the precision
_ULPS = 16


class Halves:
    """A model in two parts: ids to last hidden states, and those to logits.

    Args:
        model: A whole model.
        caller: The option or command that needs it, for messages.

    Attributes:
        model: That model.
        vocab_size: V.
    """

    def __init__(self, model: PreTrainedModel, caller: str):
        self.model = model
        self.vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
        self._caller = caller
        self._output: Any = None

    @property
    def n_together(self) -> int:
        """Tokens whose logits are looked at together."""
        return max(1, LOGIT_BYTES // (4 * self.vocab_size))

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [B, T, D]."""
        output = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        # only its kind is needed later, and what it holds would keep a graph alive
        self._output = replace(output, last_hidden_state=hidden.new_empty(0))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model makes of last hidden states [n, D], with its caps and scales: [n, V].

        Raises:
            OptionError: It takes its logits from elsewhere.
        """
        given = replace(self._output, last_hidden_state=hidden[None])
        asked = 0

        def answer(*_args: Any, **_kwargs: Any) -> Any:
            nonlocal asked
            asked += 1
            return given

        # OPT calls the decoder inside its base model
        inner = {id(module): module for module in (self.model.base_model, self.model.get_decoder())}
        with ExitStack() as stack:
            for module in inner.values():
                stack.enter_context(_forward_instead(module, answer))
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        if asked != 1 or len(logits) != len(hidden):
            name = type(self.model).__name__
            raise OptionError(f"{self._caller}: {name} does not compute its logits from its last hidden states")
        return logits

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """[n, V] in float32, from last hidden states [n, D]."""
        return torch.log_softmax(self.logits(hidden).float(), dim=-1)

    @torch.no_grad()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p of each token, in nats.

        Args:
            hidden: Last hidden states [n, D].
            targets: The tokens that follow, [n].

        Returns:
            [n] float64.
        """
        parts = []
        for state, target in zip(hidden.split(self.n_together), targets.split(self.n_together), strict=True):
            parts.append(-self.log_probabilities(state).gather(1, target[:, None])[:, 0].double())
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float64)

    def loss_gradient(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Gradient of Σ_n weights_n · (-log p of token n) to the last hidden states.

        Args:
            hidden: [n, D]; no graph behind it is used.
            targets: [n].
            weights: [n] float32.

        Returns:
            [n, D] in the type of `hidden`.
        """
        gradient = torch.zeros_like(hidden)
        for start in range(0, len(hidden), self.n_together):
            part = slice(start, start + self.n_together)
            state = hidden[part].detach().requires_grad_(True)
            loss = -self.log_probabilities(state).gather(1, targets[part, None])[:, 0]
            (gradient[part],) = torch.autograd.grad((loss * weights[part]).sum(), state)
        return gradient


class UpperHalf:
    """What a model does from a hook on.

    Args:
        halves: The model.
        layer: 0-based index of the block.
        hook: Where in it.
    """

    def __init__(self, halves: Halves, layer: int, hook: Hook):
        self.halves = halves
        self._layer, self._hook = layer, hook
        self._module = hooked(halves.model, layer, hook)
        blocks = find_layers(halves.model)[1]
        # the block of a branch runs itself: its other branch is its own
        self._skipped = list(blocks)[: layer + 1 if hook == "resid_post" else layer]
        self._entered = None if hook == "resid_post" else blocks[layer]
        self._skips = True
        # of the last `read`: ids, mask, what enters the block of a branch, what each skipped block gives beside h
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._entering: Tensor | None = None
        self._beside: list[tuple[Any, ...] | None] = []

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model on a batch, and remember the batch for `go_on`.

        Args:
            ids: [B, T], padded on the right.
            mask: [B, T] attention mask.

        Returns:
            The activation at the hook and the last hidden states, [B, T, D] each.

        Raises:
            OptionError: The block has no such branch, or its branches do not add up.
        """
        self._inputs, self._beside, self._entering = (ids, mask), [], None
        with ExitStack() as stack:
            captured = stack.enter_context(capture(self.halves.model, self._layer, self._hook))
            for block in self._skipped:
                stack.callback(block.register_forward_hook(self._remember_beside).remove)
            if self._entered is not None:
                handle = self._entered.register_forward_pre_hook(self._remember_entering, with_kwargs=True)
                stack.callback(handle.remove)
            hidden = self.halves.hidden(ids, mask)
            return captured.take(), hidden

    def go_on(self, activation: Tensor) -> Tensor:
        """Last hidden states [B, T, D] of the batch that was read, from another activation [B, T, D] at the hook."""
        assert self._inputs is not None, "no batch has been read"
        with ExitStack() as stack:
            if self._skips:
                for i, (block, beside) in enumerate(zip(self._skipped, self._beside, strict=True)):
                    last = i == len(self._skipped) - 1
                    given = (self._entering if self._entered is not None else activation) if last else None
                    stack.enter_context(_forward_instead(block, _hand_on(given, beside)))
            if not self._skips or self._entered is not None:
                stack.enter_context(replaced(self._module, activation))
            return self.halves.hidden(*self._inputs)

    @torch.no_grad()
    def check(self, ids: Tensor, mask: Tensor) -> None:
        """See on a batch whether the lower blocks can be skipped; where not, `go_on` runs them.

        Raises:
            CannotRun: It gives NaN or infinity, or not even the whole model gives what it gives when it goes on from
                its own activation.
            OptionError: What `read` raises.
        """
        activation, hidden = self.read(ids, mask)
        if not bool(torch.isfinite(hidden[mask.bool()]).all()):
            raise CannotRun("gives NaN or infinity", "try --dtype float32, or see whether its weights are whole")
        allowed = _ULPS * torch.finfo(hidden.dtype).eps * float(hidden.abs().max())
        for self._skips in (True, False):
            difference = (self.go_on(activation) - hidden)[mask.bool()].abs().max()
            if float(difference) <= allowed:
                return
        raise CannotRun(
            "does not repeat itself when it goes on from its own activation", "such a model cannot be patched"
        )

    def _remember_beside(self, _module: nn.Module, _args: Any, out: Any) -> None:
        self._beside.append(out[1:] if isinstance(out, tuple) else None)

    def _remember_entering(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entering = args[0] if args else kwargs["hidden_states"]


def hooked(model: PreTrainedModel, layer: int, hook: Hook) -> nn.Module:
    """The module whose output is the activation."""
    block = find_layers(model)[1][layer]
    if hook == "resid_post":
        return block
    attention, mlp = branches(block)
    return block.get_submodule(attention if hook == "attn_out" else mlp)


@contextmanager
def replaced(module: nn.Module, activation: Tensor, where: Tensor | None = None) -> Iterator[None]:
    """Put activations in place of what a module gives, for as long as the block lasts.

    Args:
        module: Gives [B, T, D], alone or first in a tuple.
        activation: [n, D] or [D] for n positions, or [B, T, D] for all.
        where: [B, T], which positions; None is all of them.
    """

    def put(_module: nn.Module, _args: Any, out: Any) -> Any:
        given = out[0] if isinstance(out, tuple) else out
        if where is None:
            changed = activation.to(given.dtype).reshape(given.shape)
        else:
            changed = given.clone()
            changed[where] = activation.to(given.dtype)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    handle = module.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _hand_on(given: Tensor | None, beside: tuple[Any, ...] | None) -> Callable[..., Any]:
    """A block that gives something else, or what it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        entering: Tensor = args[0] if args else kwargs["hidden_states"]
        out = entering if given is None else given.to(entering.dtype)
        return out if beside is None else (out, *beside)

    return forward


@contextmanager
def _forward_instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module do something else, for as long as the block lasts."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
