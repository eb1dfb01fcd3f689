"""Transforms, modes and derivatives of second order in a sparse phase: as in plain PyTorch.

Each is tried as the first call in a mode of the network, when no graph exists yet, and after calls
that the kernels computed.
"""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian, vjp
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import acdc
from acdc.engine import memory, segment
from support.engine_nets import block, conv, cut, support_of


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        block(2, 4), conv(4, 4, bias=True), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip


def batch(samples: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 2, 4, 4, generator=generator, dtype=torch.float64)


class Both:
    """A network in a sparse phase, and its copy in plain PyTorch."""

    def __init__(self, training: bool, known: bool = False) -> None:
        self.model = images().double()
        self.masks = support_of(self.model, 0.4)
        cut(self.model, self.masks)
        self.plain = copy.deepcopy(self.model)
        self.engine = acdc.Engine(self.model, batch(), choose=False)
        self.model.train(not training)
        self.engine.compress(self.masks)
        self.model.train(training)
        self.plain.train(training)
        if known:
            for each in (self.model, self.plain):
                each(batch())

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.model.buffers(), self.plain.buffers(), strict=True))


def leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


# --- what is done with a network ------------------------------------------------------------------


def parameters(m: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in m.named_parameters()}


def loss_of(m: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(m, params, (x,)).square().sum()


def grad_of_parameters(m: nn.Module, x: Tensor) -> Any:
    return grad(lambda params: loss_of(m, params, x))(parameters(m))


def grad_of_input(m: nn.Module, x: Tensor) -> Any:
    return grad(lambda x: m(x).square().sum())(x)


def pulled_back(m: nn.Module, x: Tensor) -> Any:
    out, pull = torch.func.vjp(m, x)
    return out, pull(torch.ones_like(out))


def pushed_forward(m: nn.Module, x: Tensor) -> Any:
    return jvp(m, (x,), (torch.ones_like(x),))


def mapped(m: nn.Module, x: Tensor) -> Any:
    m.eval()  # a BatchNorm cannot be mapped over its batch
    return vmap(m)(x[:, None])


def per_sample(m: nn.Module, x: Tensor) -> Any:
    m.eval()
    return vmap(grad(lambda x: m(x[None]).square().sum()))(x)


def hessian_by_func(m: nn.Module, x: Tensor) -> Any:
    return torch.func.hessian(lambda x: m(x).square().sum())(x)


def jacobian_by_rows(m: nn.Module, x: Tensor) -> Any:
    return torch.func.jacrev(m)(x), torch.func.jacfwd(m)(x)


def called_with_others(m: nn.Module, x: Tensor) -> Any:
    others = {name: p + 0.1 for name, p in parameters(m).items()}  # outside of the support, too
    return functional_call(m, others, (x,)), m(x)


def called_with_other_buffers(m: nn.Module, x: Tensor) -> Any:
    others = {n: b + 1 for n, b in m.named_buffers()}
    return functional_call(m, others, (x,)), m(x), others


def in_inference_mode(m: nn.Module, x: Tensor) -> Any:
    with torch.inference_mode():
        return m(x)


def without_grad(m: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return m(x)


def under_autocast(m: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m(x)


def backward_under_autocast(m: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = m(x).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.autograd.grad(out, x)


def compiled(m: nn.Module, x: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(m, backend="eager")(x)


def exported(m: nn.Module, x: Tensor) -> Any:
    return torch.export.export(m, (x,)).module()(x)


def traced(m: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(m.eval(), x)(x)


def traced_by_fx(m: nn.Module, x: Tensor) -> Any:
    return torch.fx.symbolic_trace(nn.Sequential(m))(x)


def made_by_fx(m: nn.Module, x: Tensor) -> Any:
    return make_fx(m)(x)(x)


def faked(m: nn.Module, x: Tensor) -> Any:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = m(mode.from_tensor(x)).shape
    return torch.zeros(shape)


def counted(m: nn.Module, x: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        out = m(x)
    return out, torch.tensor(counter.get_total_flops())


def dual(m: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level(), torch.no_grad():
        out = m(forward_ad.make_dual(x, torch.ones_like(x)))
        return tuple(forward_ad.unpack_dual(out))


def dual_of_backward(m: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = m(x)
    with forward_ad.dual_level():
        direction = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 2.0))
        (found,) = torch.autograd.grad(out, x, direction)
        return tuple(forward_ad.unpack_dual(found))


def second_order_of_input(m: nn.Module, x: Tensor) -> Any:
    return hessian(lambda x: m(x).square().sum(), x)


def second_order_of_parameters(m: nn.Module, x: Tensor) -> Any:
    params = list(m.parameters())
    grads = torch.autograd.grad(m(x).square().sum(), params, create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    second = torch.autograd.grad(penalty, params, allow_unused=True)
    # The kernels compute the gradients of kept weights only.
    kept = [p != 0 if p.dim() > 1 else torch.ones_like(p) for p in params]
    return grads, [None if g is None else g * mask for g, mask in zip(second, kept, strict=True)]


def third_order(m: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return torch.autograd.grad(second.square().sum(), x)


def jacobian_of_input(m: nn.Module, x: Tensor) -> Any:
    return jacobian(m, x), vjp(m, x, torch.ones(len(x), 3, dtype=x.dtype))[1]


def jacobian_at_once(m: nn.Module, x: Tensor) -> Any:
    return jacobian(m, x, vectorize=True)


def jacobian_forward(m: nn.Module, x: Tensor) -> Any:
    return jacobian(m, x, vectorize=True, strategy="forward-mode")


def several_gradients(m: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = m(x)
    several = torch.arange(2 * out.numel(), dtype=x.dtype).reshape(2, *out.shape)
    return torch.autograd.grad(out, x, several, is_grads_batched=True)


def saved_elsewhere(m: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        out = m(x)
    return out, torch.autograd.grad(out.square().sum(), x)


def on_another_default_device(m: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    with torch.device("meta"):
        out = m(x)
        return out, torch.autograd.grad(out.square().sum(), x)


def with_lazy_signs(m: nn.Module, x: Tensor) -> Any:
    x = torch.complex(x, x).conj().imag.requires_grad_()
    assert x.is_neg()
    out = m(x)
    return out, torch.autograd.grad(out, x, torch.complex(out, out).detach().conj().imag)


class Marked(torch.Tensor):
    """A tensor that tells its kind."""


def of_a_subclass(m: nn.Module, x: Tensor) -> Any:
    out = m(x.as_subclass(Marked))
    assert isinstance(out, Marked)
    return out.as_subclass(Tensor)


USES = (
    grad_of_parameters, grad_of_input, pulled_back, pushed_forward, mapped, per_sample,
    hessian_by_func, jacobian_by_rows, called_with_others, called_with_other_buffers,
    in_inference_mode, without_grad, under_autocast, backward_under_autocast, compiled, exported,
    traced, traced_by_fx, made_by_fx, faked, counted, dual, dual_of_backward,
    second_order_of_input, second_order_of_parameters, third_order, jacobian_of_input,
    jacobian_at_once, jacobian_forward, several_gradients, saved_elsewhere,
    on_another_default_device, with_lazy_signs, of_a_subclass,
)  # fmt: skip


# Training or evaluation, and whether the network was called in this mode before.
MOMENTS = [
    pytest.param(False, False, id="eval, first call"),
    pytest.param(True, True, id="train, later call"),
]
if os.environ.get("ACDC_FULL"):
    MOMENTS += [
        pytest.param(True, False, id="train, first call"),
        pytest.param(False, True, id="eval, later call"),
    ]


# In training mode every input counts as large, so that autograd reads it from the frame.
@pytest.mark.parametrize(("training", "known"), MOMENTS)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_as_in_plain_pytorch(
    use: Callable[[nn.Module, Tensor], Any],
    training: bool,
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if training:
        monkeypatch.setattr(memory, "LARGE", 0)
    both = Both(training, known)
    found = []
    for model in (both.model, both.plain):
        try:
            found.append(leaves(use(model, batch())))
        except RuntimeError as error:
            found.append([type(error).__name__])
    got, want = found
    limits = {"rtol": 1e-8, "atol": 1e-10}
    if use is under_autocast:
        limits = {"rtol": 1e-2, "atol": 1e-2}
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            torch.testing.assert_close(a.detach(), b.detach(), **limits)
        else:
            assert a == b
    for a, b in both.buffers():
        torch.testing.assert_close(a, b, **limits)


def test_a_script_is_refused_in_a_sentence_and_made_of_a_copy() -> None:
    both = Both(training=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AttributeError, match="Give it a copy"):
            torch.jit.script(both.model)
        copied = torch.jit.script(copy.deepcopy(both.model))
    torch.testing.assert_close(copied(batch()), both.plain(batch()))


@pytest.mark.parametrize("use", [under_autocast, grad_of_input, called_with_others, counted])
def test_a_mode_that_is_over_leaves_later_calls_on_the_kernels(
    use: Callable[[nn.Module, Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    compute = segment.compute
    monkeypatch.setattr(segment, "compute", lambda *a: ran.append(1) or compute(*a))
    both = Both(training=False)
    use(both.model, batch())
    ran.clear()
    torch.testing.assert_close(both.model(batch()), both.plain(batch()))
    assert ran


def test_a_step_keeps_no_input_that_the_frame_holds_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, x = Both(training=True, known=True), batch(64)
    monkeypatch.setattr(memory, "LARGE", 0)
    kept: list[Tensor] = []
    forward = segment.SegmentFunction.forward
    monkeypatch.setattr(
        segment.SegmentFunction,
        "forward",
        staticmethod(lambda ctx, *a: kept.append(weakref.ref(a[2])) or forward(ctx, *a)),
    )
    out = both.model(x * 1.0)
    assert len(kept) == 3
    assert [ref() for ref in kept] == [None, None, None]
    del out


def test_statistics_that_were_replaced_are_read_from_then_on() -> None:
    both = Both(training=False, known=True)
    for model in (both.model, both.plain):
        norm = model[0][1]
        norm.running_mean = norm.running_mean + 1
        norm.running_var = norm.running_var * 2
    torch.testing.assert_close(both.model(batch()), both.plain(batch()))
