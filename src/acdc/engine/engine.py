"""The engine finds what of a network can run sparse, and runs it so while the network is sparse.

The model stays the object it was. In a sparse phase its ``forward`` (or that of the parts that
could be traced) is replaced, on the instance, by the traced graph with runs of layers in the
layout; in a dense phase nothing is replaced.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.backends import kernels
from acdc.engine.choice import Choice, Timings, table
from acdc.engine.geometry import ConvGeometry
from acdc.engine.graph import Untraceable
from acdc.engine.host import UNREACHED, Host
from acdc.engine.layout import Shape
from acdc.engine.native import Native
from acdc.engine.profile import Profile, profiled
from acdc.engine.reference import Reference
from acdc.engine.segment import Workspace
from acdc.engine.written import Written
from acdc.errors import InputError
from acdc.layers import unwrapped
from acdc.processes import has_peers

log = logging.getLogger(__name__)

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


class Engine:
    """Runs the layers of a sparse phase on kernels whose work follows the kept weights.

    Give it to ``Sparsifier(..., engine=engine)``, which tells it every change of the support. The
    model, its parameters, hooks and state dict stay what they are.

    Args:
        model: The network; wrappers for data parallelism and ``torch.compile`` are seen through.
        example: A batch as the model is called with: a tensor, a tuple of arguments, or a mapping
            of keywords. Layers are timed at its batch size; any other batch size runs too.
        backend: The kernels; default the best there are. ``Reference()`` computes the same in plain
            PyTorch, slowly.
        choose: Time each layer dense and sparse, and take what is faster. Otherwise all that can
            run sparse does.

    Attributes:
        off: Why the engine does nothing at all, or None.
        refused: Name of a layer → why it stays with PyTorch.
        choices: Name of a layer → what was measured of it, after the first compression.
        written: The weight gradients that the kernels wrote since the last compression.
        workspace: The memory that all runs of layers share.

    Raises:
        InputError: the example cannot be an argument of the model.

    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        backend: Native | Reference | None = None,
        choose: bool = True,
    ) -> None:
        self.model = unwrapped(model)
        self.choose = choose
        self.refused: dict[str, str] = {}
        self.choices: dict[str, Choice] = {}
        self.timed: Timings = {}
        self.written = Written()
        self._masks: dict[str, Tensor] = {}
        self.workspace = Workspace()
        self._plans: dict[Any, Any] = {}
        self._hosts: list[Host] = []
        self._compressing = False
        self.off = _why_off(self.model)
        if self.off is not None:
            log.info("The engine stays off: %s.", self.off)
            return
        self.backend = kernels() if backend is None else backend
        args, kwargs = self._example = _arguments(self.model, example)
        self._host("", self.model, args, kwargs)
        for name, reason in self.refused.items():
            log.info("%s stays with PyTorch: %s.", name, reason)

    def __repr__(self) -> str:
        if self.off is not None:
            return f"Engine(off: {self.off})"
        sparse = [name for name, c in self.choices.items() if c.sparse]
        state = f"{len(sparse)} layers run sparse" if self.active else "dense now"
        return f"Engine({state}, {len(self.refused)} layers refused, {self.backend.isa})"

    @property
    def active(self) -> bool:
        """Whether some layer runs sparse now."""
        return any(host.active for host in self._hosts)

    def table(self) -> str:
        """Return what was measured of each layer, or why it stays with PyTorch, as text."""
        return table(self.choices, self.refused)

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Count what the kernels take of the steps inside, which compute what they always do.

        The runs of layers, and what their layers keep, are those there are at the start: compress,
        and call the model once in its mode, before. The first step inside gets its buffers anew;
        ``clear()`` forgets it.

        Raises:
            InputError: the kernels are the reference.

        """
        profile = Profile(self.model)
        if self.off is None and not isinstance(self.backend, Native):
            raise InputError("A profile is of the compiled kernels, and this is the reference.")
        with profiled([s for host in self._hosts for s in host.segments()], profile):
            yield profile

    # --- the two calls of the sparsifier ----------------------------------------------------------

    def compress(self, support: Mapping[str, Tensor]) -> None:
        """Run sparse from here on.

        Of several processes the first one times the layers, and all compute as it chose: all have
        to call this.

        Args:
            support: Name of a weight → bool mask, True where it is kept. Other layers are full.

        """
        if self.off is not None:
            return
        for host in self._hosts:
            host.pause()
        self._plans.clear()
        self._masks = dict(support)
        self.written = Written()  # a graph of before still knows its own
        known = dict(self.choices)
        self._forget_outdated()
        self._compressing = True
        try:
            self._start()
        finally:
            self._compressing = False
        if self.choices != known:
            log.info("Layers, dense and sparse:\n%s", self.table())

    def _forget_outdated(self) -> None:
        """Have the layers measured anew where one has become much sparser, or denser.

        All of them: what a layer gains depends on whether its neighbours are in the layout. Methods
        that cut little by little would else stay dense for good, as they were at their first cut.
        """
        fits = (c.fits(self.density(name)) for name, c in self.choices.items())
        if self.choose and not all(fits):
            self.choices = {}

    def _start(self) -> None:
        follows = has_peers() and torch.distributed.get_rank() > 0
        if follows:
            self._agree()
        for host in self._hosts:
            host.start()
        if not follows:
            self._agree()

    def _agree(self) -> None:
        """Give every process the choices of the first one: each by itself would time otherwise."""
        if has_peers():
            choices = [self.choices]
            torch.distributed.broadcast_object_list(choices, src=0)
            self.choices = choices[0]

    def decompress(self) -> None:
        """Run everything on plain PyTorch from here on, and free all buffers."""
        for host in self._hosts:
            host.stop()
        self._plans.clear()
        self.workspace.clear()
        self._masks = {}

    # --- stop and resume --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the choices, so that a resumed run computes bitwise the same."""
        return {"choices": {name: asdict(c) for name, c in self.choices.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the choices of another run; they count from the next compression on."""
        self.choices = {name: Choice(**c) for name, c in state["choices"].items()}

    # --- for the hosts ----------------------------------------------------------------------------

    @property
    def measures(self) -> bool:
        """Whether a layer may be timed now: only at a compression can several processes agree."""
        return self.choose and (self._compressing or not has_peers())

    def plan(self, name: str, weight: Tensor, geometry: ConvGeometry, x: Shape, dy: Shape) -> Any:
        """Return the index lists of a layer, made once per support and image size."""
        if (key := (name, x, dy)) not in self._plans:
            mask = self._mask(name)
            if mask is None:
                support = torch.arange(weight.numel())
            else:
                support = mask.reshape(-1).nonzero()[:, 0]
            # As its gradient will lie: in its own order, or contiguous if that has gaps.
            out, per_group, *rest = torch.empty_like(weight, device="meta").stride()
            rows, columns = rest or (1, 1)
            strides = (out, per_group, rows, columns)
            self._plans[key] = self.backend.plan(geometry, support, x, dy, strides=strides)
        return self._plans[key]

    def density(self, name: str) -> float:
        """Return the share of kept weights of a layer."""
        mask = self._mask(name)
        return 1.0 if mask is None else mask.sum().item() / mask.numel()

    def _mask(self, name: str) -> Tensor | None:
        return self._masks.get(f"{name}.weight" if name else "weight")

    # --- finding what can be traced ---------------------------------------------------------------

    def _host(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Note the largest parts of a module that can be traced."""
        try:
            self._hosts.append(Host(self, name, module, args, kwargs))
        except Untraceable as error:
            log.info("%s is taken in parts: %s.", name or type(module).__name__, error)
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.refused[name] = str(error)
            self._host_parts(name, module)

    def _host_parts(self, name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if child in self._calls:
                self._host(full, child, *self._calls[child])
            elif isinstance(child, nn.Conv2d | nn.Linear):
                self.refused[full] = UNREACHED
            else:
                self._host_parts(full, child)

    @cached_property
    def _calls(self) -> dict[nn.Module, tuple[tuple[Any, ...], Mapping[str, Any]]]:
        """What each module of the network is called with, seen once in evaluation mode."""
        calls: dict[nn.Module, tuple[tuple[Any, ...], Mapping[str, Any]]] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            calls.setdefault(module, (args, kwargs))

        hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in self.model.modules()]
        modes = {m: m.training for m in self.model.modules()}
        args, kwargs = self._example
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.model.eval()(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes.items():
                module.training = mode
        return calls


def _why_off(model: nn.Module) -> str | None:
    devices = {str(p.device) for p in model.parameters() if p.device.type != "cpu"}
    if devices:
        return f"the model is on {', '.join(sorted(devices))}, and the kernels are for CPUs"
    return None


def _arguments(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = example if isinstance(example, tuple) else (example,)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"The example does not fit {type(model).__name__}.forward: {error}. Give a tensor, a "
            f"tuple of arguments, or a mapping of keywords, as the model is called with."
        ) from error
    return args, kwargs
