"""Scores: name → float tensor, larger is kept.

A score is lazy: a tensor is computed when a pattern asks for it and dropped after, so that ranking
the weights of a model never needs a second copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from acdc import shards
from acdc.errors import InputError
from acdc.random import stream
from acdc.shape import Shape, shapes_of


class Scores(Mapping[str, Tensor]):
    """Scores computed on demand, in the order of the parameters.

    Args:
        shapes: Shape of every score by name. A plain one is that of a linear layer or convolution.
        score: What returns the float tensor for a name.
        dtype: The widest type of any score.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        score: Callable[[str], Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shapes = {name: Shape.of(shape) for name, shape in shapes.items()}
        self.dtype = dtype
        self._score = score

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Scores:
        """Return plain tensors as scores; scores come back as they are."""
        return tensors if isinstance(tensors, Scores) else _lazy(tensors, lambda tensor: tensor)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        with torch.no_grad():
            return self._score(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def subset(self, names: Iterable[str]) -> Scores:
        """Return the scores with these names."""
        return Scores({name: self.shapes[name] for name in names}, self._score, self.dtype)


def magnitude(params: Mapping[str, Tensor]) -> Scores:
    """Return ``|w|``."""
    return _lazy(params, lambda w: w.abs())


def gradient(params: Mapping[str, Tensor]) -> Scores:
    """Return ``|∂loss/∂w|`` from ``.grad``, which must be there."""
    return _lazy(params, lambda w: _grad(w).abs())


def saliency(params: Mapping[str, Tensor]) -> Scores:
    """Return ``|w · ∂loss/∂w|``. Source: Lee et al., SNIP, ICLR 2019."""
    return _lazy(params, lambda w: (w * _grad(w)).abs())


def among(scores: Scores, masks: Mapping[str, Tensor]) -> Scores:
    """Return the same scores, none of which is negative, and -1 where a mask is False."""
    return Scores(
        scores.shapes,
        lambda name: _within(scores[name], masks[name]),
        scores.dtype,
    )


def random(params: Mapping[str, Tensor], *words: str | int) -> Scores:
    """Return uniform numbers in [0, 1): for the same words and the same order of the parameters the
    same on every device and every rank. A rank of a sharded weight draws the numbers of the whole
    weight, one weight at a time, and keeps its part.

    Args:
        params: The weights.
        *words: What names the draw, such as a seed and a step.
    """
    index = {name: i for i, name in enumerate(params)}

    def draw(name: str) -> Tensor:
        generator = stream("scores", *words, index[name])
        numbers = torch.rand(params[name].shape, generator=generator)
        return shards.placed(numbers, params[name]).to(params[name].device)

    return Scores(shapes_of(params), draw)


def _lazy(tensors: Mapping[str, Tensor], score: Callable[[Tensor], Tensor]) -> Scores:
    double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    return Scores(
        shapes_of(tensors),
        lambda name: score(tensors[name]),
        torch.float64 if double else torch.float32,
    )


def _within(score: Tensor, mask: Tensor) -> Tensor:
    part = shards.local(score).masked_fill(~shards.local(mask), -1.0)
    return shards.like(score, part)


def _grad(w: Tensor) -> Tensor:
    if w.grad is None:
        raise InputError(
            f"A weight of shape {tuple(w.shape)} has no gradient. Run a backward pass before "
            f"ranking by gradient."
        )
    return shards.placed(w.grad, w)
