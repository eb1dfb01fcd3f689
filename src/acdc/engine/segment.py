"""A segment: connected layers as one module, with plain tensors at its ends and the layout inside.

A segment stands in the traced graph in place of the nodes that it computes. It keeps those nodes,
and runs them in PyTorch for every call that the kernels cannot take.

Several threads may call one network. A thread holds the lock of the workspace from the lease of a
frame to the end of the pass, since frames, index lists and the workspace serve one pass at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from acdc.engine.contract import KernelPlan, Kernels
from acdc.engine.gradients import KernelGradients
from acdc.engine.judge import Judge
from acdc.engine.memory import Arena, Frame, Lease, Workspace
from acdc.engine.modes import why_plain
from acdc.engine.operations import Program
from acdc.engine.tape import GradientRequest, Op, Slot, Tape, Value
from acdc.engine.tracing import first_line

log = logging.getLogger(__name__)


class Segment(nn.Module):
    """Connected layers in the layout.

    Args:
        plain: The same layers in PyTorch.
        program: The same layers as a program.
        backend: The kernels.
        workspace: The memory that all segments share.
        layers: The names of the layers in the network.
        judge: Says whether the segment is switched off.

    """

    def __init__(
        self,
        plain: fx.GraphModule,
        program: Program,
        backend: Kernels,
        workspace: Workspace,
        layers: tuple[str, ...],
        judge: Judge,
    ) -> None:
        super().__init__()
        # In a tuple, so that they are not submodules: the network has these modules already.
        self._held = (plain, program)
        self._params = dict(plain.named_parameters(remove_duplicate=False))
        self.backend, self.workspace = backend, workspace
        self._layers, self._judge = layers, judge
        self.plans: Mapping[Op, KernelPlan] = {}
        self.written = KernelGradients()
        self.nnz: dict[int, int] = {}  # id of a weight -> written elements of its gradient
        self._tapes: dict[Hashable, Tape] = {}
        self._free: dict[Hashable, list[Arena]] = {}
        again = [p for op in program.ops for p in op.read_again() if p is not None]
        self.weights = list({id(p): p for p in again}.values())
        self._pointers: tuple[int, ...] = ()
        self._warned: set[str] = set()

    @property
    def program(self) -> Program:
        """The layers as a program."""
        return self._held[1]

    def plain(self, lease: Lease, inputs: Sequence[Tensor], params: Mapping[int, Tensor]) -> Any:
        """Compute a forward pass once more on PyTorch.

        Buffers stay as they are: a BatchNorm has counted this batch already. Dropout has the masks
        of that forward pass.

        Args:
            lease: Of that forward pass.
            inputs: Its inputs.
            params: By the id of a parameter of the program: what is computed with in its place.

        """
        # The lock: meanwhile these tensors are in the network's own modules.
        with (
            self.workspace.lock,
            torch.autocast("cpu", enabled=False),
            _in_place_of_parameters(_holders(self._held[0]), params),
        ):
            held: dict[str, Tensor] = {
                f"plain.{name}": params.get(id(p), p) for name, p in self._params.items()
            }
            held |= {f"plain.{name}": b.clone() for name, b in self._held[0].named_buffers()}
            masks = self._masks(lease, inputs[0])
            return torch.func.functional_call(_Again(self._held[0], masks), held, tuple(inputs))

    def _masks(self, lease: Lease, first: Tensor) -> dict[fx.Node, Tensor]:
        """Return the masks of a forward pass by the node of their dropout."""
        masks = {}
        for node, op in self.program.dropouts.items():
            slot = lease.tape.value(op.mask)
            masks[node] = _plain(lease.frame, slot, _out_shape(first, op.mask), _format(first))
        return masks

    def start(self, plans: Mapping[Op, KernelPlan], written: KernelGradients) -> None:
        """Compute with these index lists from now on, in the buffers that exist.

        Args:
            plans: The index lists of its layers.
            written: Where weight gradients are noted.

        """
        self._restart(plans)
        self.written, self.nnz = written, {}
        for conv in self.program.convs:
            if conv in plans:
                key = id(conv.spec.weight)  # may be used twice: the larger number counts
                self.nnz[key] = max(self.nnz.get(key, 0), plans[conv].nnz)

    def pause(self) -> None:
        """Free the index lists, and keep the buffers for the next ones."""
        self._restart({})

    def stop(self) -> None:
        """Free the index lists and all buffers."""
        self.plans = {}
        self.free()

    def free(self) -> None:
        """Free all buffers. The next pass allocates new ones."""
        self._free = {key: [] for key in self._free}

    def _restart(self, plans: Mapping[Op, KernelPlan]) -> None:
        self.plans = plans
        # The lists are new: an arena that is in use returns to its old list, and is freed with it.
        self._free = {key: list(free) for key, free in self._free.items()}
        for arena in (arena for free in self._free.values() for arena in free):
            arena.restart(plans)

    def forward(self, *inputs: Tensor) -> Any:
        """Compute on the kernels, or on PyTorch where the kernels cannot."""
        if self._judge.skips(self._layers):
            return self._held[0](*inputs)
        reason = self._refusal(inputs)
        if reason is None:
            try:
                return self._run(inputs)
            except _NoFrame as error:
                reason = str(error)
        if reason and reason not in self._warned:
            self._warned.add(reason)
            log.warning("A segment of sparse layers runs on plain PyTorch: %s.", reason)
        return self._held[0](*inputs)

    def _refusal(self, inputs: tuple[Tensor, ...]) -> str | None:
        samples = set()
        for x, value in zip(inputs, self.program.inputs, strict=True):
            if not _fits(x, value):
                return f"its input has become {x.dtype} {tuple(x.shape)} on {x.device}"
            samples.add(_samples(x, value))
        if len(samples) != 1 or samples == {0}:
            return f"its batch has {sorted(samples)} samples"
        if not self.program.is_current:
            return "a parameter was replaced by another"
        if not self.program.has_layouts:
            return "a weight lies in memory in another order than when the phase began"
        if any(
            norm.of_batch and min(samples) * norm.y.height * norm.y.width == 1
            for norm in self.program.norms
        ):
            return "a BatchNorm has a single value to average"
        return None

    def _run(self, inputs: tuple[Tensor, ...]) -> Any:
        if torch.is_grad_enabled():
            outputs = SegmentFunction.apply(  # type: ignore[no-untyped-call]
                self, len(inputs), *inputs, *self.program.params
            )
            if (node := outputs[0].grad_fn) is not None:
                node.lease.hold(inputs, node._raw_saved_tensors)
        else:
            with self.workspace.lock:
                lease = self.lease(inputs, None)
                outputs = compute(lease, inputs)
                lease.end()
        return outputs[0] if self.program.returns_one else outputs

    # --- frames -----------------------------------------------------------------------------------

    def _key(self, request: GradientRequest | None) -> Hashable:
        settings = tuple(op.settings() for op in self.program.ops)
        return request, settings, torch.get_num_threads()

    def lease(self, inputs: tuple[Tensor, ...], request: GradientRequest | None) -> Lease:
        """Return an unused frame for these inputs. The caller holds the lock of the workspace."""
        if not self.plans:
            raise _NoFrame  # another thread has ended the sparse phase
        pointers = tuple(t.data_ptr() for t in self._read_by_address())
        if pointers != self._pointers:  # tapes hold the old tensors, bound calls their addresses
            self._pointers = pointers
            self._tapes, self._free = {}, {}
        key = self._key(request)
        if key not in self._tapes:
            self._tapes[key] = self.program.tape(request)
            self._free[key] = []
        samples = _samples(inputs[0], self.program.inputs[0])
        free = self._free[key]
        arena = free.pop() if free else None
        if arena is None or arena.samples < samples:
            del arena  # frees its memory before more is allocated
            try:
                with torch.inference_mode(False), torch.no_grad():
                    arena = Arena(
                        self._tapes[key], samples, self.backend, self.plans, self.workspace
                    )
            except (RuntimeError, MemoryError) as error:
                raise _NoFrame(f"no memory for its buffers ({first_line(error)})") from error
        with torch.inference_mode(False), torch.no_grad():
            frame = arena.frame(samples)
        return Lease(arena, frame, free)

    def _read_by_address(self) -> list[Tensor]:
        """Return the tensors that bound calls point into."""
        found = (tensor for op in self.program.ops for tensor in op.read_by_address())
        return [tensor for tensor in found if tensor is not None]


class _Again(nn.Module):
    """A part of a graph, computed with masks that were drawn before.

    Args:
        plain: The part.
        masks: By the node of their dropout.

    """

    def __init__(self, plain: fx.GraphModule, masks: Mapping[fx.Node, Tensor]) -> None:
        super().__init__()
        self.plain = plain
        self._masks = masks

    def forward(self, *inputs: Tensor) -> Any:
        return _WithMasks(self.plain, self._masks).run(*inputs)


class _WithMasks(fx.Interpreter):
    def __init__(self, plain: fx.GraphModule, masks: Mapping[fx.Node, Tensor]) -> None:
        super().__init__(plain)
        self._masks = masks

    def run_node(self, n: fx.Node) -> Any:
        if n in self._masks:
            return self.env[n.all_input_nodes[0]] * self._masks[n]
        return super().run_node(n)


def _holders(plain: nn.Module) -> list[nn.Module]:
    """Return the modules of the network whose parameters modules of a graph read from there."""
    held = (vars(module).get("held", ()) for module in plain.modules())
    return [module for modules in held for module in modules]


@contextmanager
def _in_place_of_parameters(
    modules: Sequence[nn.Module], params: Mapping[int, Tensor]
) -> Iterator[None]:
    """Let modules hold other tensors inside this context, given by the id of the parameter."""
    own: list[dict[str, Any]] = [module._parameters for module in dict.fromkeys(modules)]
    found = [(held, name, p) for held in own for name, p in held.items() if id(p) in params]
    for held, name, p in found:
        held[name] = params[id(p)]
    try:
        yield
    finally:
        for held, name, p in found:
            held[name] = p


class _NoFrame(Exception):
    """There is no frame. The message says why, if that is worth a warning."""


class SegmentFunction(torch.autograd.Function):
    """A segment in autograd: one node from its inputs and parameters to its outputs."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the forward pass; the tensors are inputs, then parameters."""
        inputs, flags = tensors[:count], ctx.needs_input_grad[2:]
        takes = [p for p, f in zip(segment.program.params, flags[count:], strict=True) if f]
        request = GradientRequest(frozenset(map(id, takes)), tuple(flags[:count]))
        # The weights are saved so that autograd raises if one was modified in place, and raises on
        # a second backward pass: the first one frees the frame. The inputs: see `Lease.hold`.
        ctx.save_for_backward(*inputs, *segment.weights)
        ctx.segment, ctx.params, ctx.takes = segment, segment.program.params, takes
        ctx.like = [(x.shape, _format(x)) for x in inputs]
        with segment.workspace.lock:
            ctx.lease = segment.lease(inputs, request)
            ctx.written, ctx.nnz = segment.written, segment.nnz
            return compute(ctx.lease, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run the backward pass."""
        lease: Lease = ctx.lease
        lease.reads_inputs = torch.is_grad_enabled() or _needs_pytorch(lease, grads)
        saved = ctx.saved_tensors
        if lease.reads_inputs:
            return (None, None, *plain_backward(ctx, saved[: len(ctx.like)], grads))
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        with lease.workspace.lock:
            kept = [memory.clone() for memory in lease.kept] if keep else []
            inputs, results = compute_backward(lease, grads, ctx.takes, ctx.like)
            for memory, copy in zip(lease.kept, kept, strict=keep):
                memory.copy_(copy)
        for key in ctx.nnz.keys() & results.keys():
            ctx.written.note(key, results[key], ctx.nnz[key])
        if not keep:
            lease.end()
        return (None, None, *inputs, *(results.get(id(p)) for p in ctx.params))


def _needs_pytorch(lease: Lease, grads: Sequence[Tensor]) -> bool:
    """Return whether the kernels cannot run the backward pass of a frame.

    Another thread may call the backward pass, with another number of threads than the forward pass
    had: the memory for partial sums and for transient buffers would be too small.
    """
    return why_plain(grads) is not None or torch.get_num_threads() != lease.threads


def plain_backward(
    ctx: Any, inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Run the backward pass on PyTorch, where its result is differentiated or mapped over.

    The kernels have no derivatives of second order, so the forward pass is computed again.
    """
    with torch.enable_grad():
        # Views: an input may depend on another input or on a weight, and so may a weight. These are
        # the derivatives of the segment alone.
        inputs = [x.view_as(x) for x in inputs]
        params = [p.view_as(p) for p in ctx.params]
        stand_ins = {id(p): view for p, view in zip(ctx.params, params, strict=True)}
        outs = ctx.segment.plain(ctx.lease, inputs, stand_ins)
    needed = ctx.needs_input_grad[2:]
    wanted = [t for t, need in zip((*inputs, *params), needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            outs, wanted, grads, create_graph=torch.is_grad_enabled(), allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]


def compute(lease: Lease, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run the forward pass of a frame, from plain tensors to plain tensors.

    Here and in ``compute_backward``, the caller holds the lock of the workspace.
    """
    assert lease.workspace.lock.is_mine
    frame, tape, first = lease.frame, lease.tape, inputs[0]
    frame.memory_format = _format(first)
    for x, slot in zip(inputs, tape.inputs, strict=True):
        frame.backend.to_layout(_flat(x.detach(), slot.value), frame.buffer(slot))
    for prepare in frame.before:
        prepare(frame)
    for call in frame.forward:
        call()
    return tuple(
        _plain(
            frame,
            slot,
            _out_shape(first, slot.value),
            torch.channels_last if last else _format(first),
        )
        for slot, last in zip(tape.outputs, tape.last, strict=True)
    )


def compute_backward(
    lease: Lease,
    grads: Sequence[Tensor],
    takes: Sequence[Tensor],
    like: Sequence[tuple[torch.Size, torch.memory_format]],
) -> tuple[list[Tensor | None], dict[int, Tensor]]:
    """Run the backward pass of a frame.

    Args:
        lease: Of the frame.
        grads: The gradients of the outputs.
        takes: The parameters that take a gradient.
        like: Shape and memory format of each input.

    Returns:
        The gradients of the inputs that need one, and those of the parameters by id.

    """
    assert lease.workspace.lock.is_mine
    frame, tape = lease.frame, lease.tape
    frame.make_results(takes, lease.workspace)
    totals: dict[Slot, Tensor] = {}
    for grad, slot in zip(grads, tape.output_grads, strict=True):
        totals[slot] = totals[slot] + grad if slot in totals else grad
    for slot, grad in totals.items():
        frame.backend.to_layout(_flat(grad, slot.value), frame.buffer(slot))
    for call in frame.backward:
        call()
    for finish in frame.after:
        finish(frame)
    inputs = [
        None if slot is None else _plain(frame, slot, *shape_and_format)
        for slot, shape_and_format in zip(tape.input_grads, like, strict=True)
    ]
    results, frame.results = frame.results, {}
    return inputs, results


# --- between plain tensors and buffers ------------------------------------------------------------


def _fits(x: Tensor, value: Value) -> bool:
    if x.dtype != value.dtype or x.device.type != "cpu" or x.layout != torch.strided:
        return False
    if value.tokens:
        return x.shape[-1] == value.channels
    return tuple(x.shape[1:]) == (value.channels, value.height, value.width)


def _samples(x: Tensor, value: Value) -> int:
    return x.numel() // value.channels if value.tokens else x.shape[0]


def _flat(x: Tensor, value: Value) -> Tensor:
    x = x.resolve_neg()  # the kernels read memory, and a lazy sign is not in memory
    return x.reshape(-1, value.channels) if value.tokens else x


def _out_shape(x: Tensor, value: Value) -> tuple[int, ...]:
    if value.tokens:
        return (*x.shape[:-1], value.channels)
    return (x.shape[0], value.channels, value.height, value.width)


def _format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not x.is_contiguous() else torch.contiguous_format


def _plain(frame: Frame, slot: Slot, shape: tuple[int, ...], memory: torch.memory_format) -> Tensor:
    """Return the contents of a slot as a tensor of this shape and memory format."""
    out = torch.empty(shape, dtype=slot.value.dtype, device="cpu", memory_format=memory)
    frame.backend.from_layout(frame.buffer(slot), _flat(out, slot.value))
    return out
