"""The competitors for one layer: the engine, dense PyTorch, PyTorch's CSR, other libraries.

Every contender gets the same tensors, masked the same way. The result of a contender is compared
with that of dense PyTorch, and only contenders with a correct result are timed. Other libraries are
optional.
"""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acdc.engine.backends import kernels
from acdc.engine.geometry import ConvGeometry
from acdc.engine.layout import Buffer, Shape
from acdc.errors import AcdcError

Answer = dict[str, Tensor]
"""What a layer computed: ``y``, ``dx``, and ``dw`` if it has the shape of the weight."""

# Largest difference to dense PyTorch, as a share of the largest value. Two float32 sums of 10^5
# terms, added in different orders, agree to about 1e-5.
TOLERANCE = 1e-3


class Unable(AcdcError):
    """A contender cannot compute this layer. The message says why."""


class Contender(Protocol):
    """One way to compute a layer; ``backward`` follows ``forward``.

    Attributes:
        own_threads: Whether the contender computes on other threads than torch's.
    """

    own_threads: bool

    def forward(self) -> None:
        """Compute the output."""

    def backward(self) -> None:
        """Compute the gradients of input and weight from the gradient of the output."""

    def answer(self) -> Answer:
        """Return the results of the last two passes."""


@dataclass(frozen=True)
class Problem:
    """One layer with its tensors; the weight is masked.

    Args:
        x: Images ``[N, C, H, W]``, or tokens ``[tokens, features]``.
        weight: As in ``torch.nn.Conv2d`` or ``torch.nn.Linear``.
        grad: Gradient of the output.
        stride: Stride of a convolution. Its padding is half of its kernel.
    """

    x: Tensor
    weight: Tensor
    grad: Tensor
    stride: int = 1

    @property
    def linear(self) -> bool:
        """Whether this is a linear layer."""
        return self.x.dim() == 2

    @property
    def kernel(self) -> int:
        """Height and width of the kernel."""
        return 1 if self.linear else self.weight.shape[2]

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the layer by dense PyTorch."""
        if self.linear:
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, self.stride, self.kernel // 2)


def answer(contender: Contender) -> Answer:
    """Run a contender once and return what it computed."""
    contender.forward()
    contender.backward()
    return contender.answer()


def check(found: Answer, expected: Answer) -> None:
    """Raise ``Unable`` unless a contender's results are those of dense PyTorch."""
    for name, value in found.items():
        largest = float(expected[name].abs().max()) or 1.0
        error = float((value - expected[name]).abs().max()) / largest
        if not error < TOLERANCE:  # true for NaN, too
            raise Unable(f"its {name} is wrong: it differs from dense PyTorch's by {error:.0e}")


class Autograd(ABC):
    """A layer that torch differentiates."""

    own_threads = False

    def __init__(self, problem: Problem, x: Tensor, weight: Tensor | None) -> None:
        self.problem, self.grad = problem, problem.grad
        self.x = x.detach().requires_grad_()
        self.leaves = [self.x] if weight is None else [self.x, weight.detach().requires_grad_()]
        self.y = x.new_empty(0)
        self.grads: tuple[Tensor, ...] = ()

    @abstractmethod
    def call(self) -> Tensor:
        """Compute the output, with its graph."""

    def forward(self) -> None:
        """Compute the output."""
        self.y = self.call()

    def backward(self) -> None:
        """Compute the gradients."""
        self.grads = torch.autograd.grad(self.y, self.leaves, self.grad)

    def answer(self) -> Answer:
        """Return output and gradients; the weight's gradient only if its shape is the weight's."""
        found = {"y": self.y.detach(), "dx": self.grads[0]}
        if len(self.grads) > 1 and self.grads[1].shape == self.problem.weight.shape:
            found["dw"] = self.grads[1] * (self.problem.weight != 0)
        return found


class Dense(Autograd):
    """PyTorch, which multiplies by the zeros."""

    def __init__(self, problem: Problem, memory_format: torch.memory_format) -> None:
        super().__init__(
            problem,
            problem.x.contiguous(memory_format=memory_format),
            problem.weight.contiguous(memory_format=memory_format),
        )
        self.grad = problem.grad.contiguous(memory_format=memory_format)

    def call(self) -> Tensor:
        """Compute the output, with its graph."""
        return self.problem.apply(*self.leaves)


class Engine:
    """The engine's kernels. Images are in the engine's layout, as inside a segment; tokens are not.

    Both passes copy the values of the kept weights into the lists, as after an optimizer step.
    """

    own_threads = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        out, in_ = problem.weight.shape[:2]
        kernel, half = (problem.kernel,) * 2, (problem.kernel // 2,) * 2
        geometry = ConvGeometry(in_, out, kernel, (problem.stride,) * 2, half)
        self.kernels = kernels()
        x_shape, y_shape = _shapes(geometry, problem.x, self.kernels.lanes)
        support = problem.weight.flatten().nonzero()[:, 0]
        self.plan = self.kernels.plan(geometry, support, x_shape, y_shape)
        self.x, self.dx = Buffer.zeros(x_shape), Buffer.zeros(x_shape)
        self.y, self.dy = Buffer.zeros(y_shape), Buffer.zeros(y_shape)
        self.plain_y, self.plain_dx = torch.empty_like(problem.grad), torch.empty_like(problem.x)
        self.dw = torch.zeros_like(problem.weight)
        self.convert()

    def convert(self) -> None:
        """Convert two activations to the engine's layout, and two from it."""
        self._enter()
        self._leave()

    def _enter(self) -> None:
        self.kernels.to_layout(self.problem.x, self.x)
        self.kernels.to_layout(self.problem.grad, self.dy)

    def _leave(self) -> None:
        self.kernels.from_layout(self.y, self.plain_y)
        self.kernels.from_layout(self.dx, self.plain_dx)

    def forward(self) -> None:
        """Compute the output."""
        if self.problem.linear:
            self.kernels.to_layout(self.problem.x, self.x)
        self.plan.refresh(self.problem.weight)
        self.kernels.conv(self.plan, self.x, self.y)
        if self.problem.linear:
            self.kernels.from_layout(self.y, self.plain_y)

    def backward(self) -> None:
        """Compute the gradients."""
        if self.problem.linear:
            self.kernels.to_layout(self.problem.grad, self.dy)
        self.plan.refresh(self.problem.weight, True)
        self.kernels.conv_input_grad(self.plan, self.dy, self.dx)
        self.kernels.conv_weight_grad(self.plan, self.x, self.dy, self.dw)
        if self.problem.linear:
            self.kernels.from_layout(self.dx, self.plain_dx)

    def answer(self) -> Answer:
        """Return output and gradients."""
        self._leave()
        return {"y": self.plain_y, "dx": self.plain_dx, "dw": self.dw}


def _shapes(geometry: ConvGeometry, x: Tensor, lanes: int) -> tuple[Shape, Shape]:
    """Return the shapes of the buffers of a layer's input and its output."""
    if x.dim() == 2:
        shape = Shape.of_tokens(x.shape[0], x.shape[1], lanes)
        return shape, shape.with_channels(geometry.out_channels)
    samples, _, height, width = x.shape
    rows, columns = geometry.out_size(height, width)
    grad_halo = geometry.grad_halo(height, width)
    return (
        Shape.of_images(x.shape, lanes, geometry.halo),
        Shape(samples, geometry.out_channels, rows, columns, lanes, grad_halo),
    )


class TorchCsr:
    """``torch.sparse`` in CSR: a product with the tokens, or with the unfolded images.

    The passes are written by hand, which is faster than the autograd of ``torch.sparse.mm``:
    ``W @ x``; ``W.t() @ dy``, folded back; and ``sampled_addmm`` for the kept weights' gradients.
    """

    own_threads = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.weight = problem.weight.flatten(1).to_sparse_csr()
        self.columns = self.y = self.dx = problem.x.new_empty(0)
        self.dw = self.weight

    def forward(self) -> None:
        """Compute the output."""
        p = self.problem
        if p.linear:
            self.columns = p.x.t()
            self.y = (self.weight @ self.columns).t()
            return
        unfolded = F.unfold(p.x, p.kernel, padding=p.kernel // 2, stride=p.stride)
        self.columns = unfolded.transpose(0, 1).flatten(1)
        self.y = (self.weight @ self.columns).unflatten(1, (len(p.x), -1)).transpose(0, 1)

    def backward(self) -> None:
        """Compute the gradients."""
        p = self.problem
        dy = p.grad.t() if p.linear else p.grad.transpose(0, 1).flatten(1)
        self.dw = torch.sparse.sampled_addmm(self.weight, dy, self.columns.t(), beta=0.0)
        dx = self.weight.t() @ dy
        if p.linear:
            self.dx = dx.t()
            return
        unfolded = dx.unflatten(1, (len(p.x), -1)).transpose(0, 1)
        self.dx = F.fold(unfolded, p.x.shape[2:], p.kernel, padding=p.kernel // 2, stride=p.stride)

    def answer(self) -> Answer:
        """Return output and gradients."""
        p = self.problem
        return {
            "y": self.y.reshape(p.grad.shape),
            "dx": self.dx,
            "dw": self.dw.to_dense().reshape(p.weight.shape),
        }


class SparseProp(Autograd):
    """SparseProp's modules (Nikdan et al., ICML 2023). A convolution has two modes."""

    def __init__(self, problem: Problem, over_columns: bool = False) -> None:
        from sparseprop.modules import SparseConv2d, SparseLinear

        if problem.linear:
            self.module = SparseLinear(problem.weight)
        else:
            self.module = SparseConv2d(
                problem.weight,
                padding=problem.kernel // 2,
                stride=problem.stride,
                vectorizing_over_on=over_columns,
            )
        super().__init__(problem, problem.x, None)
        self.leaves.append(self.module.weight)

    def call(self) -> Tensor:
        """Compute the output, with its graph."""
        out: Tensor = self.module(self.x)
        return out


def use_sparseprop(net: nn.Module, name: str, shape: torch.Size) -> None:
    """Replace a masked layer of a network by SparseProp's module.

    Args:
        net: The network.
        name: Name of a convolution or a linear layer.
        shape: Shape of the layer's input.
    """
    from sparseprop.modules import SparseConv2d, SparseLinear, sparsify_conv2d_auto
    from sparseprop.utils import swap_module

    layer = net.get_submodule(name)
    if isinstance(layer, nn.Linear):
        module = SparseLinear.from_dense(layer)
    elif layer.stride == (1, 1):
        module = sparsify_conv2d_auto(layer, shape)  # the faster one of its two modes
    else:
        module = SparseConv2d.from_dense(layer)  # the mode whose gradients are right
    swap_module(net, name, module)


class SparseLab(Autograd):
    """SparseLab's product of a padded CSR matrix, as its linear layer calls it."""

    own_threads = True  # its wheel brings an OpenMP

    def __init__(self, problem: Problem) -> None:
        import sparselab

        if not problem.linear:
            raise Unable("it has no convolution")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.weight = sparselab.PaddedCSR.from_dense(problem.weight)
        self.spmm: Callable[..., Tensor] = sparselab.spmm
        # SparseLab computes the weight's gradient in every backward pass, and does not return it.
        super().__init__(problem, problem.x, None)

    def call(self) -> Tensor:
        """Compute the output, with its graph."""
        return self.spmm(self.weight, self.x.t()).t()


@dataclass(frozen=True)
class Entrant:
    """A library with sparse layers.

    Args:
        package: The package that must be installed.
        ways: Contenders for a problem. The fastest correct one represents the library.
    """

    package: str
    ways: Callable[[Problem], list[Callable[[], Contender]]]

    def installed(self) -> bool:
        """Return whether the package can be found."""
        return importlib.util.find_spec(self.package) is not None


def _sparseprop(problem: Problem) -> list[Callable[[], Contender]]:
    modes = [False] if problem.linear else [False, True]
    return [lambda mode=mode: SparseProp(problem, mode) for mode in modes]  # type: ignore[misc]


ENTRANTS = {
    "engine": Entrant("acdc", lambda problem: [lambda: Engine(problem)]),
    "torch_csr": Entrant("torch", lambda problem: [lambda: TorchCsr(problem)]),
    "sparseprop": Entrant("sparseprop", _sparseprop),
    "sparselab": Entrant("sparselab", lambda problem: [lambda: SparseLab(problem)]),
}
PEERS = tuple(name for name in ENTRANTS if name != "engine")


def enter(
    entrant: Entrant, problem: Problem, expected: Answer, clock: Callable[[Contender], float]
) -> Contender:
    """Return the fastest contender of a library that computes the layer correctly.

    Args:
        entrant: The library.
        problem: What to compute.
        expected: What dense PyTorch computed.
        clock: Times a contender.

    Raises:
        Unable: The library has no such contender.
    """
    if not entrant.installed():
        raise Unable("not installed")
    able: list[Contender] = []
    reasons: list[str] = []
    for way in entrant.ways(problem):
        try:
            contender = way()
            check(answer(contender), expected)
            able.append(contender)
        except Exception as error:  # another library may raise any exception
            reasons.append(reason(error))
    if not able:
        raise Unable("; ".join(reasons))
    return able[0] if len(able) == 1 else min(able, key=clock)


def reason(error: Exception) -> str:
    """Return in one line why a contender failed."""
    if isinstance(error, Unable):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
