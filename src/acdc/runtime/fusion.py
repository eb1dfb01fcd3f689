"""Operations that become part of the convolution before them.

A BatchNorm scales the kept weights: zeros stay zeros. A sum becomes the residual, with which the
sums of the convolution start. An activation is applied before the sums are stored.
"""

from __future__ import annotations

from acdc.runtime.program import Conv, Map, Op, Program, readers_of


def fuse(program: Program) -> None:
    """Move operations into the convolutions before them, in place."""
    _Fusion(program).run()
    program.drop_unused()


class _Fusion:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.ops: list[Op] = []
        self._maker: dict[int, Op] = {}
        self._readers = readers_of(program.ops, program.outputs, len(program.values))

    def run(self) -> None:
        for op in self.program.ops:
            if not (isinstance(op, Map) and self._absorbed(op)):
                self.ops.append(op)
                self._maker[op.out] = op
        self.program.ops = self.ops

    def _absorbed(self, op: Map) -> bool:
        """Return whether the operation has become a part of one before it."""
        if op.is_sum:
            return self._absorb_sum(op)
        before = self._only_read_here(op.x)
        if op.is_affine and isinstance(before, Conv) and before.residual is None:
            if before.activation != "nothing":
                return False
            assert op.scale is not None
            assert op.offset is not None
            before.scale(op.scale, op.offset)
        elif op.is_activation and isinstance(before, Conv | Map) and before.activation == "nothing":
            before.activation = op.activation
        else:
            return False
        self._take_over(before, op)
        return True

    def _absorb_sum(self, op: Map) -> bool:
        for mine, other in ((op.y, op.x), (op.x, op.y)):
            assert mine is not None
            assert other is not None
            before = self._only_read_here(mine)
            if mine == other or not isinstance(before, Conv):
                continue
            if before.residual is not None or before.activation != "nothing":
                continue
            # The other value may be made later than this convolution, which therefore moves.
            self.ops.remove(before)
            self.ops.append(before)
            before.residual = other
            self._take_over(before, op)
            return True
        return False

    def _only_read_here(self, value: int) -> Op | None:
        return self._maker.get(value) if self._readers[value] == 1 else None

    def _take_over(self, before: Op, op: Op) -> None:
        before.out = op.out
        self._maker[op.out] = before
