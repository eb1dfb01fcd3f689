"""What the engine does in Python around the kernels of a sparse step.

    python benchmarks/guards.py [--rounds 15] [--seconds 0.3]

Networks of ``acdc bench zoo`` train in a sparse phase. Steps of three kinds take turns:
as they are, without the guards of the graphs (``engine/guards.py``), and with conversions whose
arguments are made each time (``Native._convert``). A ratio is the time of a step as it is, divided
by the time of one of another kind: the median over the rounds, with its quartiles. The guards are
also timed by themselves, all those of one step: ``guards_us``, the least of 50 timings.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from acdc.bench.step import OnEngine
from acdc.bench.zoo import find
from acdc.engine.guards import Guards
from acdc.engine.layout import Buffer
from acdc.engine.native import Native
from common import Contenders, measure, save

NETWORKS = ("hf_vit", "hf_bert", "hf_llama")
SPARSITY = 0.9


@contextmanager
def without_guards() -> Iterator[None]:
    """Let all graphs hold inside this context."""
    plain = Guards.hold
    Guards.hold = lambda self: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        Guards.hold = plain  # type: ignore[method-assign]


@contextmanager
def conversions_anew() -> Iterator[None]:
    """Make the arguments of each conversion anew inside this context."""
    plain = Native._convert

    def anew(self: Native, name: str, buffer: Buffer, tensor: Tensor) -> bool:
        buffer.ready.clear()
        return plain(self, name, buffer, tensor)

    Native._convert = anew  # type: ignore[method-assign]
    try:
        yield
    finally:
        Native._convert = plain  # type: ignore[method-assign]


def contenders(engine: OnEngine) -> Contenders:
    """Return who takes a training step."""

    def unguarded() -> None:
        with without_guards():
            engine.step()

    def anew() -> None:
        with conversions_anew():
            engine.step()

    return {"engine": engine.step, "without_guards": unguarded, "conversions_anew": anew}


def seconds_of_guards(engine: OnEngine) -> float:
    """Return the seconds that the guards of one step take."""
    variants = [v for host in engine.engine._hosts for v in host._graphs.values()]
    guards = [guard for variant in variants for _, guard in variant._known]

    def hold() -> None:
        for guard in guards:
            assert guard.hold()

    return min(timeit.repeat(hold, number=20, repeat=50)) / 20


def main() -> None:
    """Measure all networks, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn, at least one step")
    args = parser.parse_args()
    rows = []
    for name in NETWORKS:
        engine = OnEngine(find(name), SPARSITY, "uniform")
        engine.settle()
        row = {"case": f"{name} at {100 * SPARSITY:g} %"}
        row |= measure(contenders(engine), args.rounds, args.seconds)
        row["guards_us"] = 1e6 * seconds_of_guards(engine)
        rows.append(row)
        print(
            f"{row['case']:20} step {row['engine']['median_ms']:7.1f} ms, "
            f"guards {row['guards_us']:5.0f} us, "
            f"{row['without_guards_ratio']:.3f} of the time without guards, "
            f"{row['conversions_anew_ratio']:.3f} of the time with conversions anew",
            flush=True,
        )
    print(save("guards", rows, rounds=args.rounds, seconds=args.seconds))


if __name__ == "__main__":
    main()
