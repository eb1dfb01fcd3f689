"""Layers of other libraries that compute what a layer of PyTorch computes.

To ``torch.fx`` their forward is a chain of small operations. They are called as a whole instead,
so that the engine can recognise them.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRANSPOSED = ("transformers.pytorch_utils", "Conv1D")
"""A linear layer with the weight ``[inputs, outputs]``: that of GPT-2."""

ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "silu"]] = {
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "SiLUActivation": "silu",
}
"""Class in ``transformers.activations`` -> the kernel of the same function."""

_EPS = ("eps", "variance_epsilon")


def is_known(module: nn.Module) -> bool:
    """Return whether a module computes an operation of the engine."""
    return (
        is_transposed(module)
        or activation_of(module) is not None
        or rms_norm_eps(module) is not None
    )


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is a linear layer with the weight ``[inputs, outputs]``."""
    return (type(module).__module__, type(module).__name__) == TRANSPOSED


def activation_of(module: nn.Module) -> Literal["gelu", "gelu_tanh", "silu"] | None:
    """Return the name of the kernel that computes an activation, or None."""
    if type(module).__module__ != "transformers.activations":
        return None
    return ACTIVATIONS.get(type(module).__name__)


def rms_norm_eps(module: nn.Module) -> str | None:
    """Return the name of what an RMSNorm of another library adds to the mean square, or None.

    Every model of ``transformers`` has a class of its own, and some multiply by ``1 + weight``. So
    the module is tried: output and gradients must be those of ``torch.nn.functional.rms_norm``.
    """
    names = [name for name in _EPS if isinstance(getattr(module, name, None), float)]
    params = dict(module.named_parameters())
    if isinstance(module, nn.RMSNorm) or len(names) != 1 or params.keys() != {"weight"}:
        return None
    weight = params["weight"]
    if (
        any(True for _ in (*module.children(), *module.buffers()))
        or weight.dim() != 1
        or weight.dtype != torch.float32
        or weight.device.type != "cpu"
    ):
        return None
    return names[0] if _computes_rms_norm(module, names[0]) else None


def _computes_rms_norm(module: nn.Module, eps_name: str) -> bool:
    size = module.get_parameter("weight").numel()
    generator = torch.Generator("cpu").manual_seed(0)
    # The rows differ in size, so that what is added to the mean square matters in some of them.
    scale = torch.tensor([[1e-3], [1.0], [1e2]])
    x = torch.randn(3, size, generator=generator) * scale
    weight = torch.randn(size, generator=generator)
    grad = torch.randn(3, size, generator=generator)
    try:
        with torch.enable_grad():
            tried = copy.deepcopy(module)
            param = tried.get_parameter("weight")
            param.requires_grad_(True).data.copy_(weight)
            found = _with_gradients(tried(y := x.clone().requires_grad_()), (y, param), grad)
            plain = F.rms_norm(y, (size,), weight.requires_grad_(), getattr(module, eps_name))
            wanted = _with_gradients(plain, (y, weight), grad)
    except Exception:  # the module is somebody else's, and may refuse such an input
        return False
    return all(torch.allclose(f, w, 1e-4, 1e-5) for f, w in zip(found, wanted, strict=True))


def _with_gradients(out: Tensor, of: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return (out.detach(), *torch.autograd.grad(out, of, grad))
