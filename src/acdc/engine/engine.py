"""The engine finds the layers of a network that can run sparse, and runs them on sparse kernels.

The model stays the same object. In a sparse phase its ``forward``, or the ``forward`` of each part
that could be traced, is replaced on the instance by the traced graph with sparse segments. In a
dense phase nothing is replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from acdc.engine.backends import kernels
from acdc.engine.choice import Choice, Policy, table
from acdc.engine.contract import Kernels
from acdc.engine.example import Call, Example, arguments_of, calls_of
from acdc.engine.gradients import KernelGradients
from acdc.engine.graph import is_layer
from acdc.engine.host import UNREACHED, Host, with_own_forward
from acdc.engine.judge import Judge
from acdc.engine.memory import Workspace
from acdc.engine.native import Native, give_memory_back
from acdc.engine.plans import Plans
from acdc.engine.profile import Profile, profiled
from acdc.engine.reference import Reference
from acdc.engine.tracing import Untraceable, first_line
from acdc.engine.verdict import IGNORED, Verdict
from acdc.errors import InputError
from acdc.layers import unwrapped
from acdc.processes import Peers
from acdc.shards import check_whole

log = logging.getLogger(__name__)


class Engine:
    """Runs the layers of a sparse phase on kernels that compute with the kept weights only.

    Give it to ``Sparsifier(..., engine=engine)``, which passes on every change of the support. The
    model, its parameters, hooks and state dict stay as they are.

    Args:
        model: The network. Wrappers for data parallelism and ``torch.compile`` are unwrapped.
        example: A batch as the model is called with: a tensor, a tuple of arguments, or a mapping
            of keywords. Layers are timed at its batch size. Every other batch size runs too.
        backend: The kernels. The default is the compiled kernels, if there are any.
            ``Reference()`` computes the same in plain PyTorch, slowly.
        choose: Time each layer dense and sparse, and use the faster one. Then time whole steps, and
            switch off what does not gain. Otherwise every layer that can run sparse does.

    Attributes:
        off: Why the engine does nothing at all, or None.
        refused: Name of a layer -> why it stays with PyTorch.
        kernel_gradients: The weight gradients that the kernels wrote since the last compression.
        workspace: The memory that all segments share.

    Raises:
        InputError: the example cannot be an argument of the model.

    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        backend: Kernels | None = None,
        choose: bool = True,
    ) -> None:
        self.model = unwrapped(model)
        check_whole(self.model, "an Engine", "Train a sharded model without an engine.")
        self.refused: dict[str, str] = {}
        self.kernel_gradients = KernelGradients()
        self.workspace = Workspace()
        self.off = _why_off(self.model)
        if backend is None:
            backend = kernels() if self.off is None else Reference()
        self.backend = backend
        self._plans = Plans(self.backend)
        self._policy = Policy(self._plans, choose)
        self._judge = Judge(choose)
        self._sparse_now = False
        self._first_steps = 0  # that are still to come, of those that give memory back
        self._hosts: list[Host] = []
        if self.off is not None:
            log.info("The engine stays off: %s.", self.off)
            return
        args, kwargs = self._example = arguments_of(self.model, example)
        self._host("", self.model, args, kwargs, self._hosts, self.refused)
        for name, reason in self.refused.items():
            log.info("%s stays with PyTorch: %s.", name, reason)

    def __repr__(self) -> str:
        if self.off is not None:
            return f"Engine(off: {self.off})"
        sparse = [name for name, c in self.choices.items() if c.sparse]
        state = f"{len(sparse)} layers run sparse" if self.active else "dense now"
        return f"Engine({state}, {len(self.refused)} layers refused, {self.backend.isa})"

    @property
    def choices(self) -> Mapping[str, Choice]:
        """Name of a layer -> how it runs, and its times, after the first compression."""
        return self._policy.choices

    @property
    def peers(self) -> Peers:
        """The processes that train the model together; the sparsifier sets them."""
        return self._policy.peers

    @peers.setter
    def peers(self, peers: Peers) -> None:
        self._policy.peers = self._judge.peers = peers

    @property
    def active(self) -> bool:
        """Whether some layer runs sparse now."""
        return any(host.active for host in self._hosts)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What whole steps of each kind have decided."""
        return self._judge.verdicts

    @property
    def judges(self) -> bool:
        """Whether steps are still timed, to decide what is switched off."""
        trials = self._judge.trials
        waits = self.active and self._judge.judges and not trials
        return waits or any(not trial.settled for trial in trials.values())

    def table(self) -> str:
        """Return the times of each layer, or why it stays with PyTorch, as text.

        The verdicts on whole steps follow.
        """
        with self.workspace.lock:
            return table(self.choices, self.refused, self.verdicts)

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Time the kernels of the steps inside this context. The results stay the same.

        Only the segments that exist at the start are timed, with the weights that they keep then.
        So compress, and call the model once in its mode, before. The first step inside allocates
        its buffers; ``Profile.clear`` forgets it.

        Raises:
            InputError: the kernels are the reference.

        """
        profile = Profile(self.model)
        if self.off is None and not isinstance(self.backend, Native):
            raise InputError(
                "Only the compiled kernels can be profiled, and this is the reference."
            )
        with profiled([s for host in self._hosts for s in host.segments()], profile):
            yield profile

    # --- the calls of the sparsifier --------------------------------------------------------------

    def compress(self, support: Mapping[str, Tensor]) -> None:
        """Run sparse from now on.

        With several ``peers``, the first one times the layers, and all compute as it chose. All of
        them must call this.

        Args:
            support: Name of a weight -> bool mask, True where it is kept. Other layers are full.

        """
        if self.off is not None:
            return
        before, was_dense = dict(self.choices), not self._sparse_now
        self._sparse_now = True
        self._judge.drop()
        with self.workspace.lock:  # another thread may evaluate the network meanwhile
            for host in self._hosts:
                host.pause()
            self._plans.start(support)
            # An older autograd graph still holds the gradients before.
            self.kernel_gradients = KernelGradients()
            if self._policy.forget_stale():
                self._judge.forget()
            self._policy.compressing = True
            try:
                self._start()
            finally:
                self._policy.compressing = False
        if was_dense:
            give_memory_back()  # of dense steps, and of the layers that were timed
            self._first_steps = 0 if self.judges else IGNORED
        if self.choices != before:
            log.info("Layers, dense and sparse:\n%s", self.table())

    def _start(self) -> None:
        follows = not self.peers.is_first
        if follows:
            self._agree()
        for host in self._hosts:
            host.start(self.kernel_gradients)
        if not follows:
            self._agree()

    def _agree(self) -> None:
        """Give every process the choices of the first one: their own timings would differ."""
        decided = self._policy.choices, self._judge.state()
        self._policy.choices, trials = self._of_first(decided)
        self._judge.load(trials)

    def _of_first(self, value: Any) -> Any:
        """Return what the first process has decided. All processes must call this."""
        return self.peers.object_from(value, 0, "receive what runs sparse")

    def keeps_steps(self) -> bool:
        """Return whether the optimizer may step the kept elements of large weights alone."""
        return not self._sparse_now or self._judge.keeps_steps()

    def end_step(self) -> None:
        """Note that an optimizer step was executed, and what the sparsifier does after it is done.

        With several processes, the first one judges the steps. All processes must call this.
        """
        if not self._sparse_now:
            return
        must = bool(self.peers) and self.active
        trial = self._judge.end_step(self._policy.doubt, self._of_first, must)
        if trial is not None:
            if trial.off:
                self._free()
            give_memory_back()  # of the steps before, which were computed in another way
            self._first_steps = IGNORED if trial.settled else 0
        elif self._first_steps:
            self._first_steps -= 1
            # Until now the gradients and the moments of the way before were alive.
            give_memory_back()
        if trial is not None and trial.settled:
            log.info("Whole steps: %s.", "; ".join(map(str, self.verdicts)))

    def _free(self) -> None:
        """Free all buffers. What still runs sparse allocates new ones."""
        with self.workspace.lock:
            for host in self._hosts:
                for segment in host.segments():
                    segment.free()
            self.workspace.clear()

    def decompress(self) -> None:
        """Run everything on plain PyTorch from now on, and free all buffers."""
        self._sparse_now, self._first_steps = False, 0
        self._judge.drop()
        with self.workspace.lock:
            for host in self._hosts:
                host.stop()
            self._plans.start({})
            self.workspace.clear()
        give_memory_back()

    # --- stop and resume --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the choices, and the trials of whole steps. A resumed run then computes the same.

        The trials include the times of those that are not settled: the run goes on with them.
        """
        with self.workspace.lock:
            choices = {name: asdict(c) for name, c in self.choices.items()}
        return {"choices": choices, "trials": self._judge.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the choices of another run. They apply from the next compression on."""
        self._policy.choices = {name: Choice.of(c) for name, c in state["choices"].items()}
        self._judge.load(state.get("trials", {}))  # states of older versions have none

    # --- finding what can be traced ---------------------------------------------------------------

    def _host(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        hosts: list[Host],
        refused: dict[str, str],
    ) -> None:
        """Make a host of each of the largest parts of a module that can be traced."""
        try:
            host = Host(
                name,
                module,
                args,
                kwargs,
                plans=self._plans,
                policy=self._policy,
                judge=self._judge,
                workspace=self.workspace,
                refused=refused,
                parts_of=self._parts_of,
            )
            hosts.append(host)
        except Untraceable as error:
            log.info("%s is traced in parts: %s.", name or type(module).__name__, error)
            if is_layer(module):
                refused[name] = str(error)
            self._host_parts(name, module, hosts, refused)

    def _parts_of(self, host: Host) -> list[Host]:
        """Return hosts of the parts of a module: for calls that no graph of the module holds."""
        try:
            _ = self._calls
        except Exception as error:  # the model has changed, and the example fits no longer
            log.warning(
                "Parts of the model stay with PyTorch: the example of the engine ends in an error "
                "now (%s).",
                first_line(error),
            )
            return []
        hosts: list[Host] = []
        self._host_parts(host.name, host.module, hosts, {})
        return hosts

    def _host_parts(
        self, name: str, module: nn.Module, hosts: list[Host], refused: dict[str, str]
    ) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if child in self._calls:
                self._host(full, child, *self._calls[child], hosts, refused)
            elif is_layer(child):
                refused[full] = UNREACHED
            else:
                self._host_parts(full, child, hosts, refused)

    @cached_property
    def _calls(self) -> dict[nn.Module, Call]:
        """What the modules are called with, found by a call on PyTorch alone.

        A call of the model that no graph holds may need them in a sparse phase. Models of
        ``transformers`` fill no cache of keys and values: training has no use for one, and a call
        with a cache, if there is one, is computed in parts.
        """
        with _no_cache(self.model), ExitStack() as stack:
            for host in self._hosts:
                stack.enter_context(with_own_forward(host.module))
            return calls_of(self.model, *self._example)


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Let a model of ``transformers`` make no cache of keys and values inside this context."""
    found: list[Any] = [vars(module).get("config") for module in model.modules()]
    configs = {id(c): c for c in found if getattr(c, "use_cache", None) is True}.values()
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _why_off(model: nn.Module) -> str | None:
    devices = {str(p.device) for p in model.parameters() if p.device.type != "cpu"}
    if devices:
        return f"the model is on {', '.join(sorted(devices))}, and the kernels are for CPUs"
    return None
