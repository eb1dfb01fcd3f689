"""Weights and gradients outside the support are zero.

In a sparse phase, a hook on every pruned weight clears the gradient outside the support as soon as
it is accumulated, so that clipping norms and moments never see it. An engine, if there is one, runs
the model with the support, and ``KeptSteps`` lets the optimizer step only the kept elements of
large weights. In a dense phase there is no hook, and training is bitwise what it would be without.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from acdc import shards
from acdc.engine.kept import clear, is_one_sweep
from acdc.errors import InputError
from acdc.hooks.flat import Flat
from acdc.hooks.kept_steps import KeptSteps
from acdc.hooks.steps import refuse_capture
from acdc.hooks.twin import averaged
from acdc.processes import ALONE, Peers
from acdc.support import Support

if TYPE_CHECKING:  # an engine takes a second to load, and only its users need one
    from acdc.engine.engine import Engine


class Masking:
    """Holds a support on a model.

    Args:
        params: The prunable weights by name.
        optimizers: The optimizers that step them.
        engine: What runs sparse phases sparsely, if anything does.
        copies: Name of a weight → state of its optimizer that must be zero where the weight is.
        peers: The processes whose engines run the same layers sparse.

    Attributes:
        support: The support that is held.
        average: The average of the weights that the user has registered.
        dense_gradient: Whether the gradient of the next step is that of every weight: it is not
            cleared, and the engine runs the step dense.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        optimizers: Iterable[torch.optim.Optimizer],
        engine: Engine | None,
        copies: Callable[[str], Iterable[Tensor]] = lambda name: (),
        peers: Peers = ALONE,
    ) -> None:
        self._params, self.engine = params, engine
        if engine is not None:
            engine.peers = peers
        self._copies = copies
        self.support = Support.full(params)
        self.dense_gradient = False
        self._dropped, self._flat = _Dropped({}, params), Flat()
        self._hooks: list[RemovableHandle] = []
        self._kept_steps = []
        if engine is not None and not engine.off:
            self._kept_steps = [KeptSteps(each, may=engine.keeps_steps) for each in optimizers]
        self._run_by_engine: Support | None = None
        self._seen_gradients = self._warned = False
        self.average: nn.Module | None = None

    @property
    def gradient_support(self) -> Support | None:
        """The weights that have a gradient in the next step; ``None``: all have."""
        return None if self.dense_gradient or not self._hooks else self.support

    def hold(self, support: Support, whole_steps: bool) -> None:
        """Hold ``support`` from here on: gradients and weights outside it are zero.

        Args:
            support: True where a weight is kept.
            whole_steps: Whether the optimizer must step every element of a weight. (Without a
                reset, moments of pruned weights may move them when they come back.)
        """
        self._remove_hooks()
        self.support = support = self.laid_out(support)
        self._dropped = _Dropped({} if support.is_full else support, self._params)
        self._flat = Flat()  # without the pointers to the masks before
        for name in self._dropped:
            param = self._params[name]
            trained = param.requires_grad
            param.requires_grad_(True)  # a frozen weight takes no hook, and may thaw in this phase
            hook = self._clear_gradient(name)
            self._hooks.append(param.register_post_accumulate_grad_hook(hook))
            param.requires_grad_(trained)
        if not self.dense_gradient:
            self.clear_gradients()
        for steps in self._kept_steps:
            steps.stop()  # the zeros that it left are those of the support before
        self.project()
        self._dropped.forget()
        kept = {} if whole_steps or support.is_full else support
        for steps in self._kept_steps:
            steps.start((self._params[name], mask) for name, mask in kept.items())

    def laid_out(self, support: Support) -> Support:
        """Return a support whose masks lie in memory as the weights do (channels_last, say).

        One sweep over a mask and its weight then clears the weight. If all masks lie so, it is the
        same object.
        """
        masks = {}
        for name, mask in support.items():
            masks[name] = mask
            if shards.is_sharded(mask):  # FSDP holds parts without gaps, as masks are
                continue
            like = torch.empty_like(self._params[name], dtype=torch.bool, device="meta")
            if mask.stride() != like.stride():
                masks[name] = torch.empty_strided(
                    mask.size(), like.stride(), dtype=torch.bool, device=mask.device
                ).copy_(mask)
        return (
            Support(masks) if any(masks[name] is not support[name] for name in masks) else support
        )

    def project(self, only: Container[int] | None = None) -> None:
        """Set the weights outside the support to zero, and what their optimizer copies of them.

        Args:
            only: The ids of the parameters that may have changed; ``None``: of all.
        """
        self._clear(
            (name, tensor)
            for name in self._dropped
            if only is None or id(self._params[name]) in only
            for tensor in self._may_have_moved(name)
        )

    def project_copy(self, model: nn.Module) -> None:
        """Set the weights outside the support to zero in another copy of the model.

        Raises:
            InputError: The model lacks one of the weights.
        """
        params = dict(model.named_parameters())
        if any(name not in params for name in self._dropped):
            params = dict(averaged(model).named_parameters())
        if strangers := [name for name in self._dropped if name not in params]:
            raise InputError(
                f"The model to project has no parameter {strangers[0]!r}. Give a copy of the model "
                f"that the sparsifier is bound to."
            )
        parts = {name: shards.local(params[name]).shape for name in self._dropped}
        mine = {name: shards.local(self._params[name]).shape for name in self._dropped}
        if strangers := [name for name, shape in parts.items() if shape != mine[name]]:
            name = strangers[0]
            raise InputError(
                f"Of the parameter {name!r}, this process holds the shape {tuple(parts[name])} in "
                f"the model to project, and {tuple(mine[name])} in the bound model. Give a copy of "
                f"the model that the sparsifier is bound to, sharded in the same way."
            )
        for name in self._dropped:
            part = shards.local(params[name])
            clear(part, self._dropped[name].to(part.device))

    def clear_gradients(self) -> None:
        """Clear the gradients outside the support that were accumulated before now."""
        grads = ((name, self._params[name].grad) for name in self._dropped)
        self._clear((name, grad) for name, grad in grads if grad is not None)

    def tell_engine(self) -> None:
        """Let the engine run the support. A step with a dense gradient runs dense."""
        support = None if self.support.is_full or self.dense_gradient else self.support
        if self.engine is None or support is self._run_by_engine:
            return
        self._run_by_engine = support
        if support is None:
            self.engine.decompress()
        else:
            self.engine.compress(support)

    def end_step(self) -> None:
        """Let the engine know that a step is done, and everything that belongs to it."""
        self._warn_of_replays()
        if self.engine is not None:
            self.engine.end_step()

    def remove(self) -> None:
        """Take all hooks off, and the engine."""
        self._remove_hooks()
        for steps in self._kept_steps:
            steps.remove()
        if self.engine is not None:
            self.engine.decompress()

    def _warn_of_replays(self) -> None:
        """Warn, once, where a step had gradients on a GPU that came past the hooks."""
        seen, self._seen_gradients = self._seen_gradients, False
        if seen or self._warned or not torch.cuda.is_initialized():
            return
        if any(self._params[name].grad is not None for name in self._dropped):
            self._warned = True
            warnings.warn(
                "The optimizer took a step of a sparse phase with gradients that no backward pass "
                "accumulated, so those of pruned weights were not cleared, and moments of the "
                "optimizer may hold them. A CUDA graph that was captured in a dense phase does "
                "this: capture the model alone, by torch.cuda.make_graphed_callables, and call "
                "backward() outside of the capture. If you assign gradients yourself, set them "
                "to zero outside of sparsifier.support.",
                stacklevel=2,
            )

    def _may_have_moved(self, name: str) -> Iterator[Tensor]:
        """Yield a weight, unless a step here left its zeros, and what an optimizer copies of it."""
        param = self._params[name]
        if not any(steps.left_zeros(param) for steps in self._kept_steps):
            yield param
        yield from self._copies(name)

    def _clear(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Set tensors of the shapes of weights to zero outside the support."""
        flat = []
        for name, tensor in tensors:
            if self._flat.takes(tensor, self.support[name]):
                flat.append((tensor, self.support[name]))
            else:
                self._dropped.clear(name, tensor)
        self._flat.clear(flat)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _clear_gradient(self, name: str) -> Callable[[Tensor], None]:
        # PyTorch never frees a parameter whose hook holds it, so this one holds nothing. Hooks of
        # the optimizer keep the masking alive.
        masking, kept = weakref.ref(self), self.support.counts()[name]

        def clear_gradient(param: Tensor) -> None:
            now = masking()
            if now is None:
                return
            now._seen_gradients = True
            if now.dense_gradient:
                return
            refuse_capture("A gradient is masked", "other weights may be pruned then")
            if now.engine is not None and now.engine.kernel_gradients.all_of(param, kept):
                return  # zero there already
            if param.grad is not None:
                now._dropped.clear(name, param.grad)

        return clear_gradient


class _Dropped(Iterable[str]):
    """The masks of the weights outside a support, made when they are first asked for: where an
    engine leaves zeros by itself, or the masks of the support serve as well, they never are.

    Args:
        support: Name of a weight → bool mask, True where it is kept.
        params: The weights. A mask has the memory layout of its weight (channels_last, say), so
            that a fill is one sweep. Of sharded weights, masks are of what this rank holds.
    """

    def __init__(self, support: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        self._support, self._params = support, params
        self._masks: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._support)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._masks:
            mask = torch.empty_like(shards.local(self._params[name]), dtype=torch.bool)
            torch.logical_not(shards.local(self._support[name]), out=mask)
            self._masks[name] = mask
        return self._masks[name]

    def clear(self, name: str, tensor: Tensor) -> None:
        """Set a tensor of a weight's shape to zero outside the support.

        Of a sharded one every rank sets its part. The part of a weight may get other memory (FSDP
        does that in its first forward pass), so that it is asked for every time.
        """
        tensor, kept = shards.local(tensor), shards.local(self._support[name])
        if is_one_sweep(tensor, kept):
            clear(tensor, kept, where=False)
        else:
            clear(tensor, self[name])

    def forget(self) -> None:
        """Free the masks until they are asked for again."""
        self._masks.clear()
