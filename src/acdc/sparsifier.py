"""The only stateful object: it binds a method, a model and an optimizer, and is their clock.

Nothing is wrapped. The sparsifier registers hooks, and the user's loop stays as it is:

* A hook after ``optimizer.step`` is the clock: it counts executed steps, sets every weight outside
  the support to zero, and asks the method for the next support and the next state.
* A hook before ``optimizer.step`` lets the method look at the gradients, hides them from the
  optimizer where the method uses the step for something else (RigL, SNIP), and puts dense weights
  in where the method trains them behind a sparse view (Top-KAST, DPF, SR-STE, STR).
* In a sparse phase, a hook on every pruned weight clears the gradient outside the support. In a
  dense phase there is none, and training is bitwise what it would be without a sparsifier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from acdc.hooks.attach import check_can_attach, checked, peers_of, refuse_copy, to_train
from acdc.hooks.binding import Binding
from acdc.hooks.changes import Change, Changes
from acdc.hooks.masking import Masking
from acdc.hooks.mean import NetworkMean
from acdc.hooks.optimizers import OneOrSeveral, Optimizers, params_of
from acdc.hooks.pairing import paired, paired_averages
from acdc.hooks.rescale import Rescaling
from acdc.hooks.reset import StateReset
from acdc.hooks.rows import RowScale
from acdc.hooks.saved import check_same_run, identity, is_due, on_devices, unpacked
from acdc.hooks.sharded import mesh_peers, refuse_pair, reshard
from acdc.hooks.steps import Before, StepHooks
from acdc.hooks.store import DenseStore
from acdc.hooks.twin import DenseTwin
from acdc.methods.base import Method
from acdc.methods.training import Masked
from acdc.methods.weights import Weights
from acdc.pair import Pair
from acdc.schedule import Phase, Schedule
from acdc.shards import fsdp_modules
from acdc.summary import headline, summary
from acdc.support import Support

if TYPE_CHECKING:  # an engine takes a second to load, and only its users need one
    from acdc.engine.engine import Engine


class Sparsifier:
    """Makes ``optimizer`` train ``model`` by ``method``.

    Attach it after the model is on its device and the optimizer is built, before the first step.

    Args:
        method: What to do, with its schedule resolved in steps.
        model: The network. Wrappers for data parallelism and ``torch.compile`` are seen through.
        optimizer: Any optimizer that steps the pruned weights, inside any wrapper, or a list of
            several: one step is then one call of each.
        engine: An ``acdc.Engine`` of this model, which then computes sparse phases sparsely.
        automatic: Whether the support changes within ``optimizer.step()``. ``False``: call
            :meth:`advance` after every step, for example to evaluate the network before it changes.
        scale_rows: Whether the optimizer finds the gradients of each output of a sparse layer times
            the root of its density over the mean density of the layer's outputs, as in SparseOpt
            (Adnan et al., ICML 2026), for networks with normalisation layers. A method that grows
            weights by gradient sees gradients that are not scaled; SNFS grows by the optimizer's
            momentum, which is that of scaled ones. What a method adds to a gradient (the penalty of
            Top-KAST, the decay of SR-STE) is scaled with it. It costs one pass over the gradient of
            each sparse layer.
        state: What :meth:`state_dict` returned: resume there. Nothing is cut at first.
        process_group: The processes that share masks. The default is the group of the model's
            DistributedDataParallel; without it this process chooses its masks alone. The ranks of a
            model with sharded weights (``fully_shard``, DTensor) are those of its device mesh.

    Attributes:
        step: Executed optimizer steps.
        refused: Name → why a parameter of two dimensions or more is not pruned.
        dense_twin: The network at the end of the last dense phase, once that has passed.

    Raises:
        InputError: Method, model and optimizer do not fit, or one has a sparsifier already.
    """

    def __init__(
        self,
        method: Method[Any],
        model: nn.Module,
        optimizer: OneOrSeveral,
        *,
        engine: Engine | None = None,
        automatic: bool = True,
        scale_rows: bool = False,
        state: Mapping[str, Any] | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.method, self.model = checked(method), to_train(model, engine)
        params, self.refused = method.select(self.model)
        optimizers = Optimizers(optimizer)
        check_can_attach(method, params, optimizers)
        whole = {"engine": engine, "process_group": process_group, "scale_rows": scale_rows or None}
        peers = mesh_peers(method, params, model, whole) or peers_of(model, process_group)
        self._fsdp_modules = fsdp_modules(self.model)
        self._hooks = StepHooks(optimizers, Binding(self.model, params, optimizers))
        self._reset = StateReset(optimizers, method, params)
        self.step = 0
        self.dense_twin: DenseTwin | None = None
        self._weights = Weights.of(params, optimizers, peers)
        self._state = method.init(self._weights)
        self._changes = Changes()
        self._store = DenseStore(params, method.training)
        self._mean = NetworkMean(self.model, method.training.mean)
        self._rescaling = Rescaling(self.model, params, method.training.rescale is not None)
        if method.observes or not isinstance(method.training, Masked) or method.training.instead:
            # Before Masking, whose KeptSteps must be the last hook before a step.
            self._hooks.call_before(self._has_work_before_step, self._before_step)
        self._rows = RowScale(params, optimizers) if scale_rows else None
        self._masking = Masking(params, optimizers, engine, self._reset.copies, peers)
        try:
            self.advance() if state is None else self.load_state_dict(state)
        except BaseException:
            self.remove()
            raise
        after = self._after_step if automatic else self._end_step
        self._hooks.call_after(after, self._between, self._reset.made_state)

    __repr__, __str__, __reduce_ex__ = headline, summary, refuse_copy

    @property
    def schedule(self) -> Schedule:
        """The phases in steps."""
        return self.method.resolved

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to."""
        return self.schedule.phase_at(self.step)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose steps are counted; of several, the first."""
        return self.optimizers[0]

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers whose steps are counted, without wrappers."""
        return tuple(self._reset.optimizers)

    @property
    def support(self) -> Support:
        """The support now. The masks of sharded weights are DTensors: see :class:`Support`."""
        return self._masking.support

    @property
    def gradient_support(self) -> Support | None:
        """The weights that have a gradient in the next step; ``None``: all have."""
        return self._masking.gradient_support

    @property
    def process_group(self) -> Any:
        """The processes that share masks with this one; ``None``: this process is alone, or the
        weights are sharded over a device mesh.
        """
        return self._weights.peers.group

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the processes that train the model; one alone is."""
        return self._weights.peers.is_first

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The prunable weights by name."""
        return self._weights

    @property
    def engine(self) -> Engine | None:
        """The engine, if there is one."""
        return self._masking.engine

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every change of the support so far."""
        return self._changes.all

    @property
    def dense_weights(self) -> dict[str, Tensor]:
        """Copies of the dense weights behind a sparse view, by name; none for other methods."""
        return {name: dense.clone() for name, dense in self._store.dense.items()}

    # --- a step ---------------------------------------------------------------------------------

    @property
    def _replaces_step(self) -> bool:
        return self._masking.dense_gradient and self.method.training.instead

    def _has_work_before_step(self) -> bool:
        return self.method.observes or self._replaces_step or bool(self._store.dense)

    @torch.no_grad()
    def _before_step(self) -> Before:
        """Let the method look at the gradients, and put the dense weights in."""
        self._store.clear_gradients_of_zeros()
        state = self.method.observe(self.step, self._weights, self.support, self._state)
        self._store.put_in(self.support, getattr(self.optimizer, "grad_scale", None))
        return Before(hide=self._replaces_step, state=state)

    @torch.no_grad()
    def _between(self, index: int) -> None:
        """Set to zero what one of several optimizers has moved outside the support."""
        self._masking.project({id(p) for p in params_of(self.optimizers[index])})

    def _after_step(self, executed: bool, found: Before | None) -> None:
        self._end_step(executed, found)
        if executed:
            self.advance()

    @torch.no_grad()
    def _end_step(self, executed: bool, found: Before | None) -> None:
        """Count an executed step, and take over what it did."""
        if not executed:
            self._show()
            return
        self.step += 1
        self._reset.check()
        self._state = self._state if found is None else found.state
        self._store.take_over()
        if not self._store.dense_now:
            self._masking.project()  # a weight that comes back must come back from zero
        self._masking.end_step()
        self._rescaling.end_step()

    @torch.no_grad()
    def advance(self) -> None:
        """Ask the method for the support from here on, and change to it.

        Call it after every optimizer step if the sparsifier was made with ``automatic=False``.
        """
        reshard(self._fsdp_modules)
        had_dense_gradient = self._masking.dense_gradient
        wanted = self.method.training.wants_dense_gradient(self.step)
        self._masking.dense_gradient = wanted and self.phase.kind == "sparse"
        self._mean.note(self.step)
        if self._mean.is_due(self.step, "before"):
            self._reset.check_before_change()
            self._put_in_mean()
            self._mean.drop()
        with self._weights.peers.informed(self.support, self.step):
            support, state = self.method.update(self.step, self._weights, self.support, self._state)
        if support is not self.support:
            self._change(support, state)
        else:
            self._state = state
            if self._store.dense_now:
                self._show()
            elif had_dense_gradient and not self._masking.dense_gradient:
                self._masking.clear_gradients()
        self._masking.tell_engine()

    def _change(self, support: Support, state: Any) -> None:
        self._reset.check_before_change()
        support = self._masking.laid_out(self._weights.peers.agreed(support, self.step))
        last = self.schedule.last("dense")
        if last is not None and self.step == last.stop:  # before anything is cut
            average = self._masking.average
            self.dense_twin = DenseTwin.capture(
                self.step, self.model, self._reset.optimizers, average
            )
        self._reset.clear(entered=support.entered(self.support))
        if self._mean.is_due(self.step, "after"):
            self._put_in_mean()
        self._changes.note(self.step, self.phase.kind, support)
        move = self.method.training.move
        for name, delta in () if move is None else move(self._weights, support, self._state):
            self._weights.peers.from_first(self._weights[name].add_(delta))  # all move alike
        rescale = self.method.training.rescale
        if rescale is not None:
            self._rescaling.apply(rescale(self._weights, support, self._state))
        self._store.fill(self._weights, support)
        self._state = state
        self._hold(support)
        self._store.show(state)

    def _put_in_mean(self) -> None:
        """Go on from the mean of the network: what the optimizer knows is of other weights."""
        self._mean.put_in()
        self._reset.clear(entered=Support.full(self._weights))

    def _hold(self, support: Support) -> None:
        # Without a reset, moments may move weights that come back; dense weights move as a whole.
        whole = self._reset.rule == "none" or bool(self._store.dense)
        self._masking.hold(support, whole_steps=whole)
        if self._rows is not None:
            self._rows.hold(self.support)

    def _show(self) -> None:
        """Make the parameters the weights that the forward pass sees."""
        self._masking.project()
        self._store.show(self._state)

    @contextmanager
    def view(self) -> Iterator[None]:
        """Between a step and :meth:`advance`, make the parameters the weights of the forward pass.

        A method that trains dense weights behind a view has these in the parameters until
        :meth:`advance`. They are put back on leaving the context.
        """
        with self._store.put_back():
            with torch.no_grad():
                self._show()
            yield

    # --- what comes out -------------------------------------------------------------------------

    def pair(self, *, average: nn.Module | None = None, **facts: Any) -> Pair:
        """Return the sparse network as it is now, its dense twin, and the support that ties them.

        The dense twin is the network at the end of the last dense phase. A method that trains dense
        weights behind a sparse view (Top-KAST, DPF, SR-STE, STR) has its twin at every moment of a
        sparse phase. (That of STR was trained with soft thresholds: evaluate it before use.)

        Args:
            average: What :meth:`register_average` was given: return the pair of the averages.
            **facts: Anything JSON can hold, kept with the pair.

        Raises:
            InputError: The network is dense now, or there is no dense network.
        """
        refuse_pair(self.params)
        self._hooks.check()
        twin, behind = self.dense_twin, self._store.dense
        pair = paired(self.method, self.step, self.support, self.model, twin, behind, facts)
        return pair if average is None else paired_averages(pair, average, twin)

    def register_average(self, average: nn.Module) -> None:
        """Let the dense twin have its average of the weights, for ``pair(average=...)``.

        It is captured with the dense twin, before the update that follows that step.

        Args:
            average: Such as ``torch.optim.swa_utils.AveragedModel``, or an EMA of timm.
        """
        self._masking.average = average

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Set the pruned weights of another copy of the model to zero.

        For averages such as EMA, which mix weights from before the last compression: call it after
        each update of the average.

        Args:
            model: A module with the parameter names of the bound model. Wrappers for data
                parallelism, ``torch.compile`` and ``AveragedModel`` are seen through.
        """
        self._masking.project_copy(model)

    def remove(self) -> None:
        """Take the hooks off, and the engine. The model stays as it is, with exact zeros where it
        is pruned.
        """
        self._hooks.remove()
        self._rescaling.remove()
        self._masking.remove()
        if self._rows is not None:
            self._rows.remove()

    # --- stop and resume ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs beside the model's and the optimizer's state."""
        twin, trained, last = self.dense_twin, self._store.trained, self._changes.last_sparse
        return {
            **identity(self.method, self.params),
            "step": self.step,
            "support": self.support.pack(),
            "method_state": self._state,
            "dense_weights": dict(self._store.dense),
            "trained": None if trained is None else trained.pack(),
            "last_sparse": None if last is None else last.pack(),
            "changes": self._changes.state(),
            "dense_twin": None if twin is None else vars(twin),
            "engine": None if self.engine is None else self.engine.state_dict(),
            **self._mean.state(),
            **self._rescaling.state(),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise InputError unless :meth:`load_state_dict` can load a state."""
        check_same_run(self.method, self.params, state)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Build model, optimizer and sparsifier as the run was started, then load the state of all
        three, in any order. A schedule that starts sparse cuts the model when the sparsifier is
        built: load the model after that, or attach by ``Sparsifier(..., state=...)``. The schedule
        may be another one from this step on, such as a longer one.

        Raises:
            InputError: The state is of another model, method or schedule. Nothing is changed then.
        """
        self.check_state_dict(state)
        reshard(self._fsdp_modules)
        keys = ("support", "last_sparse", "trained")
        support, last_sparse, trained = (unpacked(state[key], self.params) for key in keys)
        assert support is not None
        self._changes.load(state["changes"], last_sparse)
        twin = state["dense_twin"]
        self.step, self.dense_twin = state["step"], None if twin is None else DenseTwin(**twin)
        if self.engine is not None and state["engine"] is not None:
            self.engine.load_state_dict(state["engine"])
        wanted = self.method.training.wants_dense_gradient(self.step)
        self._masking.dense_gradient = wanted and self.phase.kind == "sparse"
        self._store.load(state["dense_weights"], trained)
        self._state = on_devices(state["method_state"], self.params)
        self._mean.load(state)
        self._rescaling.load(state)
        self._hold(support)  # the model holds the view already, and is not shrunk again
        if is_due(state, self.method):
            self.advance()
        self._masking.tell_engine()
