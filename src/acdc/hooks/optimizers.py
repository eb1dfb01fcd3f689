"""One or several optimizers as one, seen through the wrappers of trainers.

The clock hangs on the hooks that ``torch.optim.Optimizer`` calls after ``step``. The wrappers of
Accelerate and Lightning Fabric call no hook: they call ``step`` of the optimizer inside, and not
every time. So the hooks go to the optimizer whose ``step`` really runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from acdc.errors import InputError

INNER = ("optimizer", "base_optimizer", "_base_optimizer", "_optimizer", "optim")

OneOrSeveral = Optimizer | Iterable[Optimizer]


class Part:
    """One optimizer whose steps are counted.

    Args:
        given: The user's object: an optimizer, or a wrapper around one.
        at: Its position, for messages: ``"The optimizer"``, ``"Optimizer 2 of 3"``.

    Attributes:
        optimizer: The optimizer whose step runs and calls hooks.
        outer: The wrappers around it that are optimizers themselves and may keep state: Lookahead.
    """

    def __init__(self, given: object, at: str) -> None:
        chain = list(_chain(given, at))
        # The innermost that holds all that is trained: SAM is often stepped by other methods than
        # step(), while the optimizer of one rank (ZeroRedundancyOptimizer) holds only a share.
        everything = _held(chain[0])
        running = [each for each in chain if _calls_hooks(each) and _held(each) >= everything]
        if not running:
            raise InputError(
                f"{at} is a {_name(given)}, which does not call the hooks of "
                f"torch.optim.Optimizer when it steps, and no optimizer that does was found inside "
                f"it. Give the torch.optim.Optimizer whose step() changes the weights."
            )
        self.optimizer = running[-1]
        if inside := _several_inside(self.optimizer):
            raise InputError(
                f"{at} is a {_name(given)}, which holds {len(inside)} optimizers "
                f"({', '.join(type(each).__name__ for each in inside)}) and their state. Give "
                f"these as a list: Sparsifier(method, model, [first, second])."
            )
        self.outer = tuple(chain[: chain.index(self.optimizer)])

    def states(self, param: Tensor) -> Iterator[dict[str, Any]]:
        """Yield the states of a parameter: the optimizer's, and those of the wrappers."""
        seen: list[Any] = []
        for each in (self.optimizer, *self.outer):
            state = getattr(each, "state", None)
            if isinstance(state, Mapping) and not any(state is other for other in seen):
                seen.append(state)
                if param in state and isinstance(state[param], dict):
                    yield state[param]


class Optimizers:
    """One or several optimizers that step together.

    Args:
        given: An optimizer, or several: then one step is one call of each.

    Raises:
        InputError: Something is no optimizer, or an optimizer cannot be followed.
    """

    def __init__(self, given: OneOrSeveral) -> None:
        several = list(given) if isinstance(given, list | tuple) else [given]
        if not several:
            raise InputError(
                "The list of optimizers is empty. Give an optimizer, or a list of those that step "
                "the model together."
            )
        self.parts = tuple(
            Part(each, "The optimizer" if len(several) == 1 else f"Optimizer {i} of {len(several)}")
            for i, each in enumerate(several, 1)
        )
        if len({id(each) for each in self}) < len(self.parts):
            raise InputError(
                f"The same optimizer is given twice among {len(several)}. One step is one call of "
                f"each, so give each of them once."
            )

    def __iter__(self) -> Iterator[Optimizer]:
        return (part.optimizer for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def name(self) -> str:
        """The names of the classes, for messages."""
        return " and ".join(type(each).__name__ for each in self)

    def check_held(self, params: Mapping[str, Tensor]) -> None:
        """Raise InputError unless each of these weights is held by exactly one optimizer."""
        holders = [_held(each) for each in self]
        counts = {n: sum(id(p) in held for held in holders) for n, p in params.items()}
        if strangers := [name for name, count in counts.items() if not count]:
            subject = "The optimizer does" if len(self) == 1 else f"The {len(self)} optimizers do"
            raise InputError(
                f"{subject} not hold {len(strangers)} of the {len(params)} weights to prune, "
                f"{strangers[0]!r} first. If another optimizer steps them, give all of them: "
                f"Sparsifier(method, model, [first, second]). If nothing trains them, leave them "
                f"out: acdc.Layers(exclude=...). Otherwise build the optimizer from the parameters "
                f"of this very model, after moving the model to its device, and before the "
                f"sparsifier."
            )
        if twice := [name for name, count in counts.items() if count > 1]:
            raise InputError(
                f"{len(twice)} weights are held by more than one of the {len(self)} optimizers, "
                f"{twice[0]!r} first. Let each weight belong to one optimizer."
            )

    def part_of(self, param: Tensor) -> tuple[Part, int]:
        """Return the part that holds a parameter, and the index of its group."""
        for part in self.parts:
            for index, group in enumerate(part.optimizer.param_groups):
                if any(p is param for p in group["params"]):
                    return part, index
        raise KeyError("no optimizer holds this parameter")

    def state_dict(self) -> Any:
        """Return the optimizer's state dict, or the list of those of several."""
        states = [each.state_dict() for each in self]
        return states[0] if len(states) == 1 else states

    def load_state_dict(self, state: Any) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            InputError: It is the state of another number of optimizers.
        """
        states = state if isinstance(state, list | tuple) else [state]
        if len(states) != len(self):
            raise InputError(
                f"The state is that of {len(states)} optimizers, and {len(self)} are given. Give "
                f"as many as the sparsifier was made with, in the same order."
            )
        for each, one in zip(self, states, strict=True):
            each.load_state_dict(one)


def _chain(given: object, at: str) -> Iterator[Optimizer]:
    """Yield an optimizer and those inside it, from the outside in."""
    current, seen = given, set[int]()
    while id(current) not in seen:
        seen.add(id(current))
        if any(
            cls.__module__.partition(".")[0] == "deepspeed" for cls in type(current).__mro__
        ) or (type(current).__name__ == "DeepSpeedOptimizerWrapper"):
            raise InputError(
                f"{at} is DeepSpeed's ({_name(current)}). DeepSpeed steps copies of the weights in "
                f"its own engine, where zeros cannot be kept. Train without DeepSpeed, for example "
                f"with DistributedDataParallel."
            )
        if isinstance(current, Optimizer):
            yield current
        elif current is given and _inner(current) is None:
            _check_no_stepping_wrapper(given, at)
            raise InputError(
                f"{at} is a {_name(given)}, and not an optimizer. Give a torch.optim.Optimizer, or "
                f"a list of those that step the model together."
            )
        current = _inner(current) or current


def _check_no_stepping_wrapper(given: object, at: str) -> None:
    """Raise InputError if an object that is no optimizer steps the weights of one inside it."""
    inside = [v for v in getattr(given, "__dict__", {}).values() if isinstance(v, Optimizer)]
    if inside and callable(getattr(given, "step", None)):
        raise InputError(
            f"{at} is a {_name(given)}, which is no torch.optim.Optimizer and calls no hooks, and "
            f"its step() may move the weights after that of the {type(inside[0]).__name__} inside. "
            f"Pruned weights would come back. Use an optimizer that does the same by itself, such "
            f"as schedulefree.AdamWScheduleFree instead of ScheduleFreeWrapper."
        )


def _inner(wrapper: object) -> Optimizer | None:
    """Return the optimizer that another one, or a wrapper, holds and passes its steps on to."""
    for name in INNER:
        inner = getattr(wrapper, name, None)
        if isinstance(inner, Optimizer) and inner is not wrapper:
            return inner
    return None


def _several_inside(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers in a list or a dictionary that an optimizer holds."""
    for value in vars(optimizer).values():
        members = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(members, list | tuple):
            continue
        if inside := [each for each in members if isinstance(each, Optimizer)]:
            return inside
    return []


def _calls_hooks(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's ``step`` calls the hooks that are registered with it.

    ``Optimizer.__init__`` makes the tables of hooks, and wraps ``step`` in its class.
    """
    hooked = getattr(type(optimizer).step, "hooked", False)
    return bool(hooked) and "_optimizer_step_post_hooks" in vars(optimizer)


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def as_optimizers(given: OneOrSeveral | Optimizers) -> Optimizers:
    """Return one or several optimizers as one."""
    return given if isinstance(given, Optimizers) else Optimizers(given)


def clear_grads(params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Take the gradients away from parameters, and return both."""
    hidden = [(p, p.grad) for p in params if p.grad is not None]
    for param, _ in hidden:
        param.grad = None
    return hidden


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]
