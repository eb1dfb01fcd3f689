"""What the state of a fresh optimizer is, found out by trial.

Optimizers differ in how the state of a parameter starts: absent until the first step (Adam), zeros
that are there from the start, a constant (Adagrad), a copy of the weight (MADGRAD, schedule-free,
Lookahead). A trial on a parameter of a few elements shows it: the same kind of optimizer, with the
options of the group, takes a few steps. The trial counts only if a restarted optimizer then moves
the weight bit for bit as a fresh one does.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from acdc.methods.base import FreshValue
from acdc.shards import is_sharded, local

Options = MutableMapping[str, Any]

_UNKNOWN = object()
_LARGEST = 4  # elements of a dimension of the trial's parameter


@dataclass(frozen=True)
class Fresh:
    """How the state of one group of parameters starts.

    Args:
        is_absent: Whether there is no state before the first step, so that dropping it is fresh.
        values: Entry of the state → its fresh value; ``None``: not known.
        late: Entries that only a step makes, where others are there from the start.
        options: Counters that the optimizer keeps among the options of the group, as they start;
            ``None``: absent until the first step.
        attributes: Counters that it keeps as its own attributes, as they start.
    """

    is_absent: bool
    values: Mapping[str, FreshValue | None] = field(default_factory=dict)
    late: frozenset[str] = frozenset()
    options: Mapping[str, float | None] = field(default_factory=dict)
    attributes: Mapping[str, float] = field(default_factory=dict)

    def restart(self, optimizer: Optimizer, group: Options, params: Iterable[Tensor]) -> None:
        """Make the state of these parameters of a group that of a fresh optimizer."""
        for param in params:
            if self.is_absent:
                optimizer.state.pop(param, None)
            elif param in optimizer.state:
                for key in self.late:
                    optimizer.state[param].pop(key, None)
                fill(optimizer.state[param], param, self.values)
        self.restart_counters(optimizer, group)

    def restart_counters(self, optimizer: Optimizer, group: Options) -> None:
        """Set the counters outside the state to where they start."""
        for values, starts in ((group, self.options), (vars(optimizer), self.attributes)):
            for key, start in starts.items():
                if start is None:
                    values.pop(key, None)
                elif isinstance(values.get(key), Tensor):
                    values[key].fill_(start)
                else:
                    values[key] = start


class NotKnown(Exception):
    """The trial failed, for the reason that the text gives."""


def fill(
    state: Options,
    param: Tensor,
    values: Mapping[str, FreshValue | None],
    mask: Tensor | None = None,
) -> None:
    """Set the state of a parameter to the fresh values.

    Args:
        state: Entry → value.
        param: The parameter.
        values: Entry → fresh value. Entries without one stay.
        mask: Where to set it; ``None``: everywhere, numbers and step counts included.
    """
    for key, value in state.items():
        fresh = values.get(key)
        if fresh is None:
            continue
        # A step count may have the shape of a parameter of one element.
        if isinstance(value, Tensor) and value.shape == param.shape and key != "step":
            here = local(value)
            source = local(param) if fresh == "weight" else torch.full_like(here, float(fresh))
            source = source.to(here.dtype)
            here.copy_(source if mask is None else torch.where(local(mask), source, here))
        elif mask is None and fresh != "weight":
            if isinstance(value, Tensor):
                value.fill_(float(fresh))
            else:
                state[key] = type(value)(fresh)


def looks_like(value: Any, param: Tensor) -> bool:
    """Return whether an entry of the state is a plain tensor with an element for every weight."""
    plain = type(value) in (Tensor, torch.nn.Parameter) or is_sharded(value)
    return plain and value.shape == param.shape


def trial(optimizer: Optimizer, group: Mapping[str, Any]) -> Fresh:
    """Return how the state of a group starts, from steps of a small optimizer of the same kind.

    Raises:
        NotKnown: The trial fails, or a restarted optimizer does not do as a fresh one.
    """
    reasons = []
    for build in (_constructed, _copied):
        try:
            with _undisturbed(group):
                return _trial(*build(optimizer, group))
        except NotKnown as reason:
            reasons.append(str(reason))
        except Exception as error:  # of a stranger's code
            reasons.append(f"{type(error).__name__}: {error}")
    raise NotKnown("; ".join(dict.fromkeys(reasons)))


def _trial(small: Optimizer, plain: Mapping[str, Any]) -> Fresh:
    """Take the steps of a trial with a small optimizer.

    Args:
        small: The optimizer, which holds one parameter and has taken no step.
        plain: The options of its group as they start.
    """
    group = small.param_groups[0]
    (param,) = group["params"]
    if callable(set_to_train := getattr(small, "train", None)):  # schedule-free
        set_to_train()
    start, attributes = param.detach().clone(), _numbers(vars(small))
    before = _numbers(group)
    values = {key: _value(v, start) for key, v in small.state.get(param, {}).items()}
    is_absent = not values
    _step(small, param, 0.0)
    found = {key: _value(v, start) for key, v in small.state.get(param, {}).items()}
    late = frozenset(found.keys() - values.keys())
    # A step has changed any other constant, and counts.
    values |= {key: found[key] if found[key] in (0.0, "weight") else None for key in late}
    _step(small, param, 0.25)
    numbers = _numbers(group)
    counted = {k: plain.get(k) for k in sorted(numbers) if numbers[k] != before.get(k)}
    counted.pop("lr", None)
    if unknown := [key for key, value in counted.items() if value is _UNKNOWN]:
        raise NotKnown(f"the option {unknown[0]!r} counts steps, and where it starts is not known")
    fresh = Fresh(
        is_absent,
        values,
        late,
        counted,
        {k: v for k, v in attributes.items() if _numbers(vars(small)).get(k, v) != v},
    )
    ends, random = [], torch.get_rng_state()
    for _ in range(2):
        torch.set_rng_state(random)
        with torch.no_grad():
            param.copy_(start)
        fresh.restart(small, group, [param])
        _step(small, param, 0.25)
        _step(small, param, -0.5)
        ends.append(param.detach().clone())
    if not torch.equal(*ends):
        raise NotKnown("it keeps something that is not in its state, such as a buffer of its own")
    return fresh


def seen(optimizer: Optimizer, group: Mapping[str, Any]) -> Fresh:
    """Return how the state of a group starts, from the state that an optimizer has before a step.

    Raises:
        NotKnown: There is no state, or it looks as if steps were taken.
    """
    possible: dict[str, set[FreshValue | None]] = {}
    for param in group["params"]:
        state = optimizer.state.get(param, {})
        if not state:
            raise NotKnown("it has no state yet")
        for key, value in state.items():
            # Of a bias of zeros, a copy looks like a constant.
            looks = {_value(value, param.detach()), _value(value, param.detach() + 1)} - {None}
            possible[key] = looks if key not in possible else possible[key] & looks
    return Fresh(False, {key: min(looks, key=str, default=None) for key, looks in possible.items()})


def _value(value: Any, weight: Tensor) -> FreshValue | None:
    """Return a fresh value by what it looks like: a copy of the weight, a constant or a number."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    if type(value) not in (Tensor, torch.nn.Parameter) or value.is_quantized:
        return None
    if value.shape == weight.shape and torch.equal(value.to(weight.dtype), weight):
        return "weight"
    if value.shape != weight.shape and value.numel() != 1:
        return None
    flat = value.detach().flatten()
    return float(flat[0]) if flat.numel() and bool((flat == flat[0]).all()) else None


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are numbers, also in a tensor: what may count steps."""
    plain = {k: v.item() if _is_scalar(v) else v for k, v in values.items()}
    return {k: v for k, v in plain.items() if type(v) in (int, float)}


def _is_scalar(value: Any) -> bool:
    return type(value) is Tensor and not value.dim()


def _step(optimizer: Optimizer, param: Tensor, gradient: float) -> None:
    """Take a step without the hooks of the process, with a gradient that differs by element."""
    slope = torch.linspace(1.0, 2.0, max(1, param.numel()), device=param.device)

    def set_gradient() -> Any:
        param.grad = (gradient * slope[: param.numel()]).reshape(param.shape).to(param.dtype)
        return param.detach().sum()

    set_gradient()
    step = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)
    closure = inspect.signature(step).parameters.get("closure")
    if closure is None or closure.default is not inspect.Parameter.empty:
        step(optimizer)
    else:  # it computes the gradient at other weights than the parameters hold: schedule-free
        step(optimizer, set_gradient)
    param.grad = None


# --- the small optimizer -------------------------------------------------------------------------


def _constructed(
    optimizer: Optimizer, group: Mapping[str, Any]
) -> tuple[Optimizer, Mapping[str, Any]]:
    """Build another optimizer of this class with the defaults of this one."""
    names = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in names}
    small = type(optimizer)([_parameter(group)], **copy.deepcopy(options))
    plain, here = _numbers(small.param_groups[0]), small.param_groups[0]
    here.update(_own(group, here["params"]))
    here.update({k: v for k, v in plain.items() if k not in names})  # what it may count
    return small, plain


def _copied(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[Optimizer, Mapping[str, Any]]:
    """Copy an optimizer without its hooks, its state and its parameters."""
    held = {id(p) for each in optimizer.param_groups for p in each["params"]}
    small: Optimizer = object.__new__(type(optimizer))
    for key, value in vars(optimizer).items():
        if key in ("state", "param_groups", "step") or key.endswith("_hooks"):
            continue
        inside = value.values() if isinstance(value, Mapping) else value
        if isinstance(inside, Iterable) and any(id(each) in held for each in inside):
            raise NotKnown(f"it keeps parameters in its attribute {key!r}")
        vars(small)[key] = copy.deepcopy(value)
    for key in vars(optimizer):
        if key.endswith("_hooks"):
            vars(small)[key] = OrderedDict()
    small.state = defaultdict(dict)
    small.param_groups = [_own(group, [_parameter(group)])]
    plain, defaults = _numbers(small.param_groups[0]), _numbers(optimizer.defaults)
    if optimizer.state:  # it may have counted already
        plain = {key: defaults.get(key, _UNKNOWN) for key in plain}
    return small, plain


def _own(group: Mapping[str, Any], params: list[Tensor]) -> dict[str, Any]:
    """Return copies of the options of a group, with a rate that moves something."""
    options = {k: copy.deepcopy(v) for k, v in group.items() if not _is_of_params(k)}
    if isinstance(lr := options.get("lr"), int | float | Tensor) and float(lr) == 0.0:
        options["lr"] = 0.1  # a warm-up begins at zero
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    return {**options, "params": params}


def _is_of_params(key: str) -> bool:
    return key in ("params", "param_names")


def _parameter(group: Mapping[str, Any]) -> torch.nn.Parameter:
    """Return a parameter of a few elements that all differ, like the first of a group."""
    like = group["params"][0]
    shape = [min(size, _LARGEST) for size in like.shape]
    values = torch.linspace(0.5, 1.5, max(1, torch.Size(shape).numel()), device=like.device)
    return torch.nn.Parameter(values[: torch.Size(shape).numel()].reshape(shape).to(like.dtype))


@contextmanager
def _undisturbed(group: Mapping[str, Any]) -> Iterator[None]:
    """Leave random numbers and warnings as they are, and compile nothing."""
    device = group["params"][0].device
    devices = [device] if device.type == "cuda" else []
    compiler = getattr(torch.compiler, "set_stance", None)
    compiles = "torch._dynamo" in sys.modules or "torchao" in sys.modules
    with torch.random.fork_rng(devices), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        if compiler is not None and compiles:
            with compiler("force_eager"):
                yield
        else:
            yield
