"""Values that describe a comparison: a task, methods, sparsities, seeds, budgets.

A grid is a function that returns a :class:`Grid` (see ``acdc.recipes.grids``). Your own model is
compared through a function that returns a :class:`Task`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from acdc.errors import AcdcError, InputError
from acdc.methods.base import Method
from acdc.methods.dense import Dense
from acdc.runs.recipe import Recipe
from acdc.support import check_sparsity

Budget = Literal["epochs", "flops", "seconds"]


@dataclass(frozen=True)
class Task:
    """The model, the data and the training that all methods share.

    Args:
        name: Name on the page, such as ``"Fashion-MNIST, small ResNet"``.
        recipe: A dense run of the task: model, data, optimizer, learning rate. Its epochs are the
            budget. The grid sets the seed.

    Raises:
        InputError: The recipe's method is not dense.
    """

    name: str
    recipe: Recipe

    def __post_init__(self) -> None:
        if not isinstance(self.recipe.method, Dense):
            raise InputError(
                f"The task {self.name!r} was given a recipe with the method "
                f"{self.recipe.method.name!r}. Give the dense run of the task: "
                f"method=Dense(constant('dense', epochs=...)). The grid sets the other methods."
            )

    @property
    def epochs(self) -> int:
        """Epochs of the dense run."""
        return self.recipe.epochs


@dataclass(frozen=True)
class Candidate:
    """How one method trains one cell.

    Args:
        method: The method, holding a plan in epochs.
        dense_epochs: Epochs of dense training beforehand, with the same seed: the method starts
            from the trained network. 0: it starts from fresh weights.
        changes: Fields of the task's recipe that differ for this method, such as ``lr``.
    """

    method: Method[Any]
    dense_epochs: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)


Build = Callable[[Task, float, int, int], Candidate]
"""From task, sparsity, total epochs and seed. Dense training beforehand is part of the epochs."""


@dataclass(frozen=True)
class GridMethod:
    """One method of a grid: one line of its table.

    Args:
        name: Name in the results: ``"rigl_erk"``.
        label: Name on the page: ``"RigL, ERK"``.
        build: Returns how the method trains a cell. Raises ``InputError`` if it cannot: the cell
            fails, with that reason.
        sparsities: Sparsities of this method, instead of the grid's: ``(0.0,)`` for dense training,
            ``(0.5,)`` for 2:4.
    """

    name: str
    label: str
    build: Build
    sparsities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Grid:
    """Methods x sparsities x seeds on one task.

    Args:
        name: Name on the command line, and of its folder.
        about: One sentence for ``acdc list``.
        task: The task.
        methods: The methods. One named ``"dense"`` is the reference of the page.
        sparsities: Fractions of zeros.
        seeds: Of weights, data order, augmentation and dropout: the same for all methods.
        budgets: ``"epochs"``: all methods train as long as the task. ``"flops"``: all spend the
            training FLOPs of the task's dense run; a method that spends a share of them in an epoch
            trains longer by its inverse, rounded to whole epochs, as RigL's multipliers do. The
            share is measured: it is that of the first seed's cell of equal epochs. ``"seconds"``:
            the same with measured seconds, of the processors on a CPU; another machine gives other
            lengths. It needs a method named ``"dense"``.
        longest: Limit of the epochs of a cell, as a multiple of the epochs of the task.
        baseline: The method that the others are compared with, seed by seed; ``None``: none.

    Raises:
        InputError: Nothing to compare, the same thing twice, or a baseline that is no method.
    """

    name: str
    about: str
    task: Task
    methods: tuple[GridMethod, ...]
    sparsities: tuple[float, ...] = (0.9,)
    seeds: tuple[int, ...] = (0,)
    budgets: tuple[Budget, ...] = ("epochs",)
    longest: float = 5.0
    baseline: str | None = None

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        for what, values in (
            ("methods", names),
            ("sparsities", self.sparsities),
            ("seeds", self.seeds),
            ("budgets", self.budgets),
        ):
            if not values or len(set(values)) != len(values):
                raise InputError(
                    f"The grid {self.name!r} has {what}={list(values)}. Give at least one, and "
                    f"each of them once."
                )
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        if unknown := set(self.budgets) - set(get_args(Budget)):
            raise InputError(
                f"The grid {self.name!r} has the budget {min(unknown)!r}. It is one of: "
                f"{', '.join(get_args(Budget))}."
            )
        if self.budgets[0] != "epochs":
            raise InputError(
                f"The grid {self.name!r} has budgets={list(self.budgets)}. Put 'epochs' first: how "
                f"long a run of equal FLOPs is follows from the run of equal epochs."
            )
        if "seconds" in self.budgets and "dense" not in names:
            raise InputError(
                f"The grid {self.name!r} has the budget 'seconds', and no method named 'dense', "
                f"whose seconds all may take. Add it: acdc.recipes.grids.methods('dense')."
            )
        if not self.longest >= 1:
            raise InputError(f"longest is {self.longest!r}. It is a number from 1 up.")
        if self.baseline is not None and self.baseline not in names:
            raise InputError(
                f"The grid {self.name!r} has the baseline {self.baseline!r}, which is none of its "
                f"methods. There are: {', '.join(names)}."
            )

    def method(self, name: str) -> GridMethod:
        """Return the method of this name."""
        return next(method for method in self.methods if method.name == name)


# --- finding a grid -----------------------------------------------------------------------------


def address(function: Callable[[], Grid]) -> str:
    """Return the address of a grid's function, as :func:`locate` takes it."""
    return f"{function.__module__}:{function.__qualname__}"


def locate(address: str) -> Grid:
    """Return the grid at an address, ``"package.module:function"`` or ``"file.py:function"``.

    Raises:
        InputError: There is no such file or function, it raises an error, or it returns no grid.
    """
    source, _, name = address.rpartition(":")
    module = _module(source)
    function = getattr(module, name, None)
    if not callable(function):
        have = [n for n, value in vars(module).items() if callable(value) and n[:1] != "_"]
        raise InputError(
            f"{source} has no function {name!r}. It has: {', '.join(have) or 'none'}. Write "
            f"FILE.py:FUNCTION, where the function takes nothing and returns a Grid."
        )
    with _errors_of(address):
        grid = function()
    if not isinstance(grid, Grid):
        raise InputError(
            f"{address} returned a {type(grid).__name__}. It has to return an acdc.compare.Grid."
        )
    return grid


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Make a sentence of an error that somebody's own code raises in this context."""
    try:
        yield
    except AcdcError:
        raise
    except SyntaxError as error:  # its message names the place
        raise InputError(f"{what} is no Python that can be read: {error}.") from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{what} ended with {type(error).__name__}: {error} "
            f"({Path(place.filename).name}, line {place.lineno})."
        ) from error


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        with _errors_of(source):
            return importlib.import_module(source)
    path = Path(source).resolve()
    if not path.is_file():
        raise InputError(
            f"There is no file {source!r}. Write FILE.py:FUNCTION, or a name of 'acdc list'."
        )
    spec = importlib.util.spec_from_file_location(f"grid_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # the file may import files beside it
    with _errors_of(source):
        spec.loader.exec_module(module)
    return module
