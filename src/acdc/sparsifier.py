"""The only stateful object: it binds a method, a model and an optimizer.

Nothing is wrapped. The sparsifier registers hooks, and the user's loop stays as it is:

* a post-hook on ``optimizer.step`` is the clock. A step that a GradScaler skips is none, so the
  clock counts executed steps. It sets every weight outside the support to zero, and asks the method
  for the next support.
* in a sparse phase, a hook on every pruned weight clears the gradient outside the support as soon
  as it is accumulated, so that clipping norms and moments never see it.
* where the method wants the dense gradient of a step, that hook lets it through. If the method
  wants it *instead* of the step, a pre-hook on ``optimizer.step`` hides all gradients meanwhile: an
  optimizer passes over what has none. So its step runs, and moves nothing.

A method that keeps dense weights beside the sparse ones (Top-KAST, DPF, SR-STE) gets them without
any wrapper: between steps a parameter holds what the forward pass sees, zeros and all, and the
dense values wait here. The pre-hook puts them in for the optimizer's step, the post-hook takes them
out again. So the model is sparse whenever the user looks at it, evaluates it or saves it. With
thresholds that are learned (STR) it is the same, but that what is kept is seen shrunk by them; they
take a step of their own with each of the optimizer's.

A method that remembers gradients (WoodFisher) has them read in the pre-hook, after unscaling and
clipping, before an optimizer may change them in place. It may then move the weights that stay, at
the very change of the support.

In a dense phase the second hook is absent and the first one only counts: training is bitwise what
it would be without.

An engine, if there is one, is told each change of the support, and runs the model accordingly. Then
also the steps of large weights touch only kept elements, with the same numbers (``KeptSteps``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from acdc.errors import InputError
from acdc.hooks.kept_steps import KeptSteps
from acdc.layers import has_peers, unwrapped
from acdc.methods.base import Method, Past, Weights
from acdc.pair import Pair
from acdc.schedule import Kind, Phase, Schedule
from acdc.support import Support

if TYPE_CHECKING:  # an engine is brought by who wants one: it takes a second to load
    from acdc.engine.engine import Engine

FORMAT = 1  # of the state dict


@dataclass(frozen=True)
class Change:
    """One change of the support.

    Args:
        step: Executed steps when it happened.
        to: The kind of phase it began.
        nnz: Prunable weights kept from here on.
        churn: Share of mask bits that differ from the previous sparse support; ``None`` where
            there was none, and on the way to dense.
        regrown: Weights kept now that the previous sparse support did not keep; ``None`` likewise.
        counts: Kept weights by name; ``None`` on the way to dense.
    """

    step: int
    to: Kind
    nnz: int
    churn: float | None
    regrown: int | None
    counts: dict[str, int] | None


@dataclass(frozen=True)
class DenseTwin:
    """The network at the end of the last dense phase, with what is needed to train it on.

    Args:
        step: Executed steps at its end.
        model: Its state dict on the CPU, running statistics included.
        optimizer: The optimizer's state dict at the same moment, on the CPU.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load the twin into ``model`` and ``optimizer``, to fine-tune it on the rest of the run.

        The learning rate is that of ``step``: set the scheduler to it. Remove the sparsifier first.
        """
        unwrapped(model).load_state_dict(self.model)
        if optimizer is not None:
            optimizer.load_state_dict(deepcopy(self.optimizer))


class _Dropped:
    """The masks of what a support drops, made when they are first asked for: where the engine
    leaves zeros by itself, they never are.

    Args:
        support: Name of a weight → bool mask, True where it is kept.
        params: The weights. The masks lie in memory as they do (channels_last, say), so that a fill
            is one sweep.
    """

    def __init__(self, support: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        self._support, self._params = support, params
        self._masks: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._support)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._masks:
            mask = torch.empty_like(self._params[name], dtype=torch.bool)
            self._masks[name] = torch.logical_not(self._support[name], out=mask)
        return self._masks[name]

    def forget(self) -> None:
        """Free the masks until they are asked for again."""
        self._masks.clear()


class Sparsifier:
    """Makes ``optimizer`` train ``model`` by ``method``.

    Attach it after the model is on its device and the optimizer is built, before the first step.

    Args:
        method: What to do, with its schedule resolved in steps.
        model: The network; wrappers for data parallelism and ``torch.compile`` are seen through.
        optimizer: Any optimizer that steps the pruned weights and keeps state per parameter.
        engine: An ``acdc.Engine`` of this model, which then computes sparse phases sparsely.

    Attributes:
        step: Executed optimizer steps.
        support: The support now.
        refused: Name → why a layer that was chosen stays dense.
        changes: Every change of the support so far.
        dense_twin: The network at the end of the last dense phase, once that has passed.

    Raises:
        InputError: The method holds a plan, nothing can be pruned, or the optimizer does not hold
            the weights that are pruned.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        engine: Engine | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise InputError(
                f"Sparsifier(method, model, optimizer) takes a method first, such as "
                f"acdc.ACDC(...), and what was given is a {type(method).__name__}."
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InputError(
                "LBFGS keeps one flat history for all parameters, so the state of single weights "
                "cannot be reset. Use SGD, Adam, AdamW or another optimizer with state per weight."
            )
        self.method = method
        self.model = unwrapped(model)
        self.optimizer = optimizer
        self.engine = engine
        if engine is not None and engine.model is not self.model:
            raise InputError(
                "The engine was made for another model. Build it from this very one: "
                "acdc.Engine(model, example)."
            )
        self.schedule: Schedule = method.resolved
        self.params, self.refused = method.select(self.model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if strangers := [name for name, p in self.params.items() if id(p) not in held]:
            raise InputError(
                f"The optimizer does not hold {len(strangers)} of the {len(self.params)} weights "
                f"to prune, {strangers[0]!r} first. Build it from the parameters of this very "
                f"model, after moving the model to its device, and before the sparsifier."
            )
        self.step = 0
        self.changes: tuple[Change, ...] = ()
        self.dense_twin: DenseTwin | None = None
        self.support = Support.full(self.params)
        self._dropped = _Dropped({}, self.params)  # the complement of the support
        self._last_sparse: Support | None = None
        self._gradient_hooks: list[RemovableHandle] = []
        self._collects = False  # whether the next step shall have its dense gradient
        self._hidden: list[tuple[Tensor, Tensor]] = []  # gradients of a step that is passed over
        self._told: Support | None = None  # what the engine runs now
        self._state_is_known = False
        self._dense: dict[str, Tensor] = {}  # behind the view, of a method that keeps them
        self._reach: Support | None = None  # what of them is trained; None: all
        self._past: dict[str, Past] = {}  # what a method remembers
        self._threshold = method.threshold  # how thresholds are learned, if any are
        self._learned: dict[str, Tensor] = {}  # thresholds that shrink the view
        self._learning: dict[str, Tensor] = {}  # what the step that is under way makes of them
        self._weights = Weights(self.params, lambda weight: optimizer.state.get(weight), self._past)
        # Before KeptSteps, which would else step what is to be passed over.
        needed = (
            method.skips_steps
            or method.keeps_dense
            or method.has_memory
            or self._threshold is not None
        )
        self._pre_hook = optimizer.register_step_pre_hook(self._before_step) if needed else None
        self._kept_steps = None if engine is None or engine.off else KeptSteps(optimizer)
        self._advance()
        self._step_hook: RemovableHandle | None = optimizer.register_step_post_hook(
            lambda *_: self._after_step()
        )

    def __repr__(self) -> str:
        return (
            f"Sparsifier({self.method.name}, step {self.step} of {self.schedule.total}, "
            f"{self.phase.kind}, {self.support})"
        )

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to."""
        return self.schedule.phase_at(self.step)

    @property
    def dense_weights(self) -> dict[str, Tensor]:
        """The dense weights behind the sparse ones by name, of a method that keeps them (Top-KAST,
        DPF, SR-STE), in a sparse phase; otherwise none. Load them over the model's state dict for
        the dense network. (Those of STR, while it learns thresholds, are no network of their own.)
        """
        return _clones(self._dense)

    # --- a step ---------------------------------------------------------------------------------

    def _before_step(
        self, _: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Let the optimizer step dense weights, or pass over the step, or remember its gradients,
        as the method wants.
        """
        skips = self.method.skips_steps and self._collects
        remembers = self.method.has_memory and self.method.remembers(self.step)
        if not (skips or remembers or self._dense):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:  # it makes the gradients, and once is enough
            with torch.enable_grad():
                loss = closure()
            args, kwargs = (self.optimizer, lambda: loss), {}
        if remembers:
            self._remember()
        self._uncover()
        if skips:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._hidden = [(p, p.grad) for p in params if p.grad is not None]
            for param in params:
                param.grad = None
        return args, kwargs

    @torch.no_grad()
    def _remember(self) -> None:
        """Add the gradients of the step, unless a GradScaler lets a fused optimizer skip it."""
        scale, found_inf = (
            getattr(self.optimizer, key, None) for key in ("grad_scale", "found_inf")
        )
        if found_inf is not None and bool(found_inf):
            return
        for name, param in self.params.items():
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            past = self._past.setdefault(name, Past(self.support[name], []))
            row = grad[past.kept]
            past.gradients.append(row if scale is None else row / scale)

    @torch.no_grad()
    def _uncover(self) -> None:
        """Put the dense weights in, with the gradients they shall have."""
        scale = getattr(self.optimizer, "grad_scale", None)  # of a fused step, which undoes it
        self._learn(scale)
        for name, dense in self._dense.items():
            param = self.params[name]
            param.copy_(dense)
            trained = None if self._reach is None else self._reach[name]
            if param.grad is None:
                continue
            if trained is not None:
                param.grad.masked_fill_(~trained, 0.0)
            pull = self.method.pull(dense, self.support[name], trained)
            if pull is not None:
                param.grad.add_(pull if scale is None else pull * scale)

    def _learn(self, scale: Tensor | None) -> None:
        """Take a step with the thresholds, and clear the gradients of what they make zero."""
        rule, self._learning = self._threshold, dict(self._learned)
        if rule is None or not self._learned:
            return
        groups = self.optimizer.param_groups
        rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        for name, learned in self._learned.items():
            param = self.params[name]
            if param.grad is None:
                continue
            param.grad.masked_fill_(param == 0, 0.0)
            grad = param.grad if scale is None else param.grad / scale
            self._learning[name] = rule.learn(learned, param, grad, rates[id(param)])
        if has_peers():  # a sum may differ in the last bit between ranks
            for learned in self._learning.values():
                torch.distributed.broadcast(learned, src=0)

    def _cover(self) -> None:
        """Take over what the step made of the dense weights that are trained; the others stay."""
        for name, dense in self._dense.items():
            param = self.params[name]
            if self._reach is not None:
                param.copy_(torch.where(self._reach[name], param, dense))
            dense.copy_(param)
        self._set_thresholds(self._learning)

    @torch.no_grad()
    def _after_step(self) -> None:
        for param, grad in self._hidden:
            param.grad = grad
        self._hidden = []
        # A fused optimizer is called by a GradScaler even for a step that it then skips inside.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._project()  # the dense weights, if there are any, are still in
            return
        self.step += 1
        self._check_optimizer_state()
        if self._dense:
            self._cover()
        else:
            self._project()  # before the support may change: what comes back comes back from zero
        self._advance()

    def _project(self) -> None:
        # Not a product with the mask: that leaves -0.0 for -1 and NaN for infinity.
        for name in self._dropped:
            param = self.params[name]
            if self._kept_steps is None or not self._kept_steps.left_zeros(param):
                param.masked_fill_(self._dropped[name], 0.0)
            if self._threshold is not None and name in self._learned:
                param.copy_(self._threshold.shrink(param, self._learned[name]))

    def _set_thresholds(self, learned: dict[str, Tensor]) -> None:
        self._learned = self._weights.thresholds = learned

    @contextmanager
    def view(self) -> Iterator[None]:
        """Hold the model as it is used, for a hook on the optimizer's step that comes first.

        A hook that was registered before this sparsifier finds the weights as the step left them:
        not zero outside of the support, or dense. They are made the model's for as long, and dense
        ones put back.
        """
        dense = {name: self.params[name].detach().clone() for name in self._dense}
        before, self._learned = self._learned, self._learning
        with torch.no_grad():
            self._project()
        self._learned = before
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in dense.items():
                    self.params[name].copy_(value)

    @torch.no_grad()
    def _advance(self) -> None:
        """Ask the method for the support from here on."""
        collected, self._collects = self._collects, self.method.wants_gradient(self.step)
        support = self.method.update(self.step, self._weights, self.support)
        if support is not self.support:
            self._change(support)
        elif self._dense:
            self._project()
        elif collected and not self._collects:
            self._clear_gradients()
        self._tell_engine()

    def _change(self, support: Support) -> None:
        support = _agree(support)
        last_dense = self.schedule.last("dense")
        if last_dense is not None and self.step == last_dense.stop:
            # Before anything is cut: this is the dense network at its best.
            self.dense_twin = DenseTwin(
                self.step, _on_cpu(self.model.state_dict()), _on_cpu(self.optimizer.state_dict())
            )
        entered = support.entered(self.support)
        if entered.nnz:
            self._reset_optimizer(entered)
        self._note(support)
        self._adjust(support)
        rule = self._threshold
        if self.method.keeps_dense or rule is not None:
            self._reach = self.method.reach(self._weights, support)
            self._dense = {} if support.is_full else _clones(self.params)
        if rule is not None:
            learned = {} if support.is_full else rule.settle(self._weights, self._learned, support)
            self._set_thresholds(learned)
        self._apply(support)

    def _adjust(self, support: Support) -> None:
        """Move the weights that stay as the method wants, on every rank alike; forget the past."""
        for name, param in self.params.items():
            move = self.method.adjust(self._weights, name, support[name])
            if move is not None:
                param.add_(move)
                if has_peers():
                    torch.distributed.broadcast(param, src=0)
        self._past.clear()

    def _note(self, support: Support) -> None:
        """Add the change to the record."""
        dense, before = self.phase.kind == "dense", self._last_sparse
        compare = None if dense or before is None else before
        self.changes += (
            Change(
                step=self.step,
                to=self.phase.kind,
                nnz=support.nnz,
                churn=None if compare is None else support.churn(compare),
                regrown=None if compare is None else support.regrown(compare),
                counts=None if dense else support.counts(),
            ),
        )
        if not dense:
            self._last_sparse = support

    def _apply(self, support: Support) -> None:
        """Hold ``support`` from here on: gradients and weights outside it are zero."""
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks.clear()
        self.support = support
        self._dropped = _Dropped({} if support.is_full else support, self.params)
        for name in self._dropped:
            param = self.params[name]
            trained = param.requires_grad
            param.requires_grad_(True)  # a frozen weight takes no hook, and may thaw in this phase
            self._gradient_hooks.append(
                param.register_post_accumulate_grad_hook(self._clear_gradient(name))
            )
            param.requires_grad_(trained)
        if not self._collects:
            self._clear_gradients()
        self._project()
        self._dropped.forget()
        if self._kept_steps is not None:
            # Without a reset, moments of pruned weights may move them when they come back; and
            # dense weights behind the sparse ones are stepped as a whole.
            whole = support.is_full or self.method.reset == "none" or self._dense
            kept = {} if whole else support
            self._kept_steps.start((self.params[name], mask) for name, mask in kept.items())

    def _tell_engine(self) -> None:
        """Let the engine run the support; a step whose dense gradient is wanted runs dense."""
        support = None if self.support.is_full or self._collects else self.support
        if self.engine is None or support is self._told:
            return
        self._told = support
        if support is None:
            self.engine.decompress()
        else:
            self.engine.compress(support)

    def _clear_gradients(self) -> None:
        """Clear what was accumulated before now, and is used after it."""
        for name in self._dropped:
            grad = self.params[name].grad
            if grad is not None:
                grad.masked_fill_(self._dropped[name], 0.0)

    def _clear_gradient(self, name: str) -> Callable[[Tensor], None]:
        dropped, kept, engine = self._dropped, int(self.support[name].sum()), self.engine

        def clear(param: Tensor) -> None:
            if self._collects:
                return
            if engine is not None and engine.written.all_of(param, kept):
                return  # zero there already
            if param.grad is not None:
                param.grad.masked_fill_(dropped[name], 0.0)

        return clear

    # --- optimizer state ------------------------------------------------------------------------

    def _reset_optimizer(self, entered: Support) -> None:
        """Clear the state that would move the weights that come back, before they move."""
        rule, state = self.method.reset, self.optimizer.state
        if rule == "none":
            return
        if rule == "all" and type(self.optimizer) in _STATE_ON_FIRST_STEP:
            # Without state these build it anew: exactly a fresh optimizer, step counts too.
            state.clear()
            return
        where = {id(self.params[name]): mask for name, mask in entered.items()}
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if rule == "all":
                    _zero_state(state.get(param, {}), group, param, None)
                elif id(param) in where:
                    _zero_state(state.get(param, {}), group, param, where[id(param)])

    def _check_optimizer_state(self) -> None:
        """Refuse, once there is state and not at the first reset, what cannot be cleared of it."""
        rule, optimizer = self.method.reset, self.optimizer
        if self._state_is_known or rule == "none":
            return
        if rule == "all" and type(optimizer) in _STATE_ON_FIRST_STEP:
            return
        self._state_is_known = any(optimizer.state.get(p) for p in self.params.values())
        for name, param in self.params.items():
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    if value.numel() == 1 or value.shape == param.shape:
                        continue
                    form = f"of shape {tuple(value.shape)}"
                elif value is None or isinstance(value, int | float | str):
                    continue
                else:
                    form = f"({type(value).__name__})"
                raise InputError(
                    f"{type(optimizer).__name__} keeps the state {key!r} {form} for the weight "
                    f"{name!r} of shape {tuple(param.shape)}, and how to reset it is not known. "
                    f'Use an optimizer with state per weight, or reset="none".'
                )

    # --- what comes out -------------------------------------------------------------------------

    def pair(self, **facts: Any) -> Pair:
        """Return the sparse network as it is now, its dense twin, and the support that ties them.

        Args:
            **facts: Anything JSON can hold, kept with the pair.

        Raises:
            InputError: The network is dense now, or the last dense phase has not ended yet.
        """
        if self.phase.kind == "dense" or self.dense_twin is None:
            last = self.schedule.last("dense")
            raise InputError(
                f"There is no pair yet: after {self.step} of {self.schedule.total} steps the "
                f"network is {self.phase.kind}. The dense twin is the end of the last dense phase"
                + (f", at step {last.stop}" if last else ", and this schedule has none")
                + "; the sparse one is the end of the run."
            )
        return Pair(
            sparse=_on_cpu(self.model.state_dict()),
            dense=dict(self.dense_twin.model),
            support=self.support.to("cpu"),
            facts={
                "method": self.method.name,
                "step": self.step,
                "dense_step": self.dense_twin.step,
                "schedule": self.schedule.to_dict(),
                **facts,
            },
        )

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Set the pruned weights of another copy of the model to zero.

        For averages such as EMA, which mix weights from before the last compression: call it after
        each update of the average.

        Args:
            model: A module with the parameter names of the bound model. Wrappers for data
                parallelism, ``torch.compile`` and ``AveragedModel`` are seen through.
        """
        if isinstance(model, torch.optim.swa_utils.AveragedModel):
            model = model.module
        params = dict(unwrapped(model).named_parameters())
        if strangers := [name for name in self._dropped if name not in params]:
            raise InputError(
                f"The model to project has no parameter {strangers[0]!r}. Give a copy of the model "
                f"that the sparsifier is bound to."
            )
        for name in self._dropped:
            params[name].masked_fill_(self._dropped[name].to(params[name].device), 0.0)

    def remove(self) -> None:
        """Take the hooks off, and the engine. The model stays as it is, with exact zeros where it
        is pruned.
        """
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None
        if self._pre_hook is not None:
            self._pre_hook.remove()
            self._pre_hook = None
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks.clear()
        if self._kept_steps is not None:
            self._kept_steps.remove()
        if self.engine is not None:
            self.engine.decompress()

    # --- stop and resume ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs beside the model's and the optimizer's state."""
        twin = self.dense_twin
        return {
            "format": FORMAT,
            "method": _settings(self.method),
            "schedule": self.schedule.to_dict(),
            "step": self.step,
            "shapes": {name: tuple(param.shape) for name, param in self.params.items()},
            "support": self.support.pack(),
            "dense_weights": dict(self._dense),
            "reach": None if self._reach is None else self._reach.pack(),
            "past": {name: torch.stack(past.gradients) for name, past in self._past.items()},
            "thresholds": dict(self._learned),
            "last_sparse": None if self._last_sparse is None else self._last_sparse.pack(),
            "changes": [asdict(change) for change in self.changes],
            "dense_twin": None
            if twin is None
            else {"step": twin.step, "model": twin.model, "optimizer": twin.optimizer},
            "engine": None if self.engine is None else self.engine.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Build model, optimizer and sparsifier as the run was started, then load the state of all
        three, in any order. A schedule that starts sparse cuts the model when the sparsifier is
        built, so a model loaded before that would lose weights.

        Raises:
            InputError: The state is of another model, method or schedule; nothing is changed then.
        """
        if state.get("format") != FORMAT:
            raise InputError(
                f"The sparsifier's state has format {state.get('format')!r}, and this version of "
                f"acdc reads format {FORMAT}."
            )
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        mine = {name: tuple(param.shape) for name, param in self.params.items()}
        if shapes != mine:
            differ = sorted(
                name for name in shapes.keys() | mine.keys() if shapes.get(name) != mine.get(name)
            )
            raise InputError(
                f"The state is of another model, or other layers were pruned: {len(differ)} "
                f"weights differ, {differ[0]!r} first ({shapes.get(differ[0], 'absent')} there, "
                f"{mine.get(differ[0], 'absent')} here)."
            )
        self._check_same_run(state["method"], Schedule.from_dict(state["schedule"]))

        def unpack(packed: Mapping[str, Tensor]) -> Support:
            masks = Support.unpack(packed, shapes)
            return Support({n: mask.to(self.params[n].device) for n, mask in masks.items()})

        twin, last, reach = state["dense_twin"], state["last_sparse"], state.get("reach")
        support = unpack(state["support"])
        last_sparse = None if last is None else unpack(last)
        changes = tuple(Change(**change) for change in state["changes"])
        dense_twin = None if twin is None else DenseTwin(**twin)
        self.step, self.changes = state["step"], changes
        self._last_sparse, self.dense_twin = last_sparse, dense_twin
        if self.engine is not None and state.get("engine") is not None:
            self.engine.load_state_dict(state["engine"])
        self._collects = self.method.wants_gradient(self.step)
        self._reach = None if reach is None else unpack(reach)
        dense = state.get("dense_weights", {})
        self._dense = {name: dense[name].to(self.params[name], copy=True) for name in dense}
        learned = state.get("thresholds", {})
        self._set_thresholds({})  # the model may hold its shrunk weights already
        self._apply(support)
        self._set_thresholds(
            {name: learned[name].to(self.params[name].device, copy=True) for name in learned}
        )
        self._past.clear()
        for name, rows in state.get("past", {}).items():
            rows = rows.to(self.params[name], copy=True)
            self._past[name] = Past(support[name], list(rows.unbind()))
        self._tell_engine()

    def _check_same_run(self, method: str, schedule: Schedule) -> None:
        mine = _settings(self.method)
        if method != mine:
            differ = f"its method is {method}, and here it is {mine}"
        elif schedule.phases != self.schedule.phases:
            pairs = zip_longest(schedule.phases, self.schedule.phases)
            there, here = next((a, b) for a, b in pairs if a != b)
            differ = f"its schedule has {there or 'no phase'} where this one has {here or 'none'}"
        elif schedule != self.schedule:
            differ = "its epochs have other numbers of steps"
        else:
            return
        raise InputError(
            f"The state is of another run: {differ}. Resume with the method and the schedule the "
            f"run was started with."
        )


# --- helpers ------------------------------------------------------------------------------------

# These build the state of a parameter at its first step, so clearing it makes them fresh.
_STATE_ON_FIRST_STEP: frozenset[type[torch.optim.Optimizer]] = frozenset(
    getattr(torch.optim, name)
    for name in (
        "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta", "ASGD", "Rprop",
        "Adafactor", "Muon",
    )
    if hasattr(torch.optim, name)
)  # fmt: skip


def _settings(method: Method) -> str:
    """Return the method and its arguments as text, but for what the state holds in full."""
    names: list[str] = [field.name for field in fields(method)] if is_dataclass(method) else []
    given = (f"{n}={getattr(method, n)!r}" for n in names if n not in ("schedule", "layers"))
    return f"{method.name}({', '.join(given)})"


def _zero_state(
    state: MutableMapping[str, Any], group: Mapping[str, Any], param: Tensor, where: Tensor | None
) -> None:
    """Set one parameter's state to what a fresh optimizer has: all of it, or only ``where``."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == param.shape and key != "step":
            fresh = _fresh(key, group)
            if where is None:
                value.fill_(fresh)
            else:
                value.masked_fill_(where, fresh)
        elif where is None and key == "step":
            if isinstance(value, Tensor):
                value.zero_()
            else:
                state[key] = 0


def _fresh(key: str, group: Mapping[str, Any]) -> float:
    """Return where an optimizer starts a state: at zero, but for these two."""
    if key == "sum":  # Adagrad
        return float(group.get("initial_accumulator_value", 0.0))
    if key == "step_size" and "step_sizes" in group:  # Rprop
        return float(group["lr"])
    return 0.0


def _clones(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


def _on_cpu(value: Any) -> Any:
    """Return a deep copy of a nested state with every tensor cloned to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return deepcopy(value)


def _agree(support: Support) -> Support:
    """Give every rank the support of rank 0: scores may differ in the last bit between ranks."""
    if not has_peers():
        return support
    masks = {name: mask.to(torch.uint8) for name, mask in support.items()}
    for mask in masks.values():
        torch.distributed.broadcast(mask, src=0)
    return Support({name: mask.to(torch.bool) for name, mask in masks.items()})
