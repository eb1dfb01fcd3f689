"""CUDA graphs: a captured model trains through the phases, and a captured step is refused.

The last section, because a capture that was broken off may leave PyTorch's generator unusable.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from correctness import ALTERNATING, SPARSE, Training
from measuring import Bench, Row


def rows(bench: Bench) -> Iterator[Row]:
    """Yield a row for each promise."""
    if not bench.cuda:
        yield Row("CUDA graphs", note="they need a GPU")
        return
    why = _graphed(bench)
    yield Row("make_graphed_callables works", not why, note=why)
    for what, schedule, name in (
        ("step", ALTERNATING, "a step captured in a dense phase is refused"),
        ("step", SPARSE, "a step captured in a sparse phase is refused"),
        ("backward", SPARSE, "a backward pass captured in a sparse phase is refused"),
    ):
        why = _refused(Training(bench, "AdamW, capturable", schedule), what)
        yield Row(name, not why, note=why)


def _graphed(bench: Bench) -> str:
    """Train with a captured model through the phases."""
    training = Training(bench, "AdamW, foreach", ALTERNATING)
    x, _ = training.batch(0)
    training.model = torch.cuda.make_graphed_callables(training.net, (x,))
    for index in range(8):
        training.backward(index)
        if why := training.wrong():
            return f"before step {index}: {why}"
        training.step()
        if training.sparsifier.step != index + 1:
            return f"{index + 1} steps were taken, {training.sparsifier.step} were counted"
        if why := training.wrong():
            return f"after step {index + 1}: {why}"
    return ""


def _refused(training: Training, what: str) -> str:
    """Capture a step, or a backward pass."""
    training.train(range(1))
    x, y = training.batch(1)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as captures are prepared
        nn.functional.cross_entropy(training.net(x), y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            if what == "backward":
                nn.functional.cross_entropy(training.net(x), y).backward()
            else:
                training.optimizer.step()
    except Exception as error:
        if "while a CUDA graph is captured" not in _texts(error):
            return f"another error: {_texts(error)}"[:500]
    else:
        return f"a captured {what} was not refused"
    steps = training.sparsifier.step
    return "" if steps == 1 else f"{steps} steps were counted, and one was executed"


def _texts(error: BaseException | None) -> str:
    """Return the sentences of an error and of those that it hides: PyTorch ends the capture then,
    which may fail as well.
    """
    return f"{error} {_texts(error.__context__)}" if error is not None else ""
