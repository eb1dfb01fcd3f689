"""Recipes: functions that return a whole run as a value, in the order of ``acdc list``.

>>> names()[:3]
['digits', 'fashion_mnist', 'cifar10_resnet20']
>>> get("imagenet_resnet50").method.sparsity
0.9
>>> get("digits_rigl_erk").method.name
'rigl'
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from acdc.errors import InputError
from acdc.recipes import methods, paper, small
from acdc.runs.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function for function in (small.digits, small.fashion_mnist, *paper.RECIPES)
} | methods.RECIPES


def names() -> list[str]:
    """Return the names of all recipes: the demo first, those of single methods last."""
    return list(RECIPES)


def get(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        InputError: There is no such recipe. The message has similar names.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? 'acdc list' shows all of them."
        if not near:
            hint = f"There are: {', '.join(RECIPES)}."
        raise InputError(f"There is no recipe {name!r}. {hint}")
    return RECIPES[name]()


__all__ = ["RECIPES", "get", "names"]
