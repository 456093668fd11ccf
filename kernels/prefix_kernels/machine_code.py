"""How many instructions a compiled kernel spends on KV, counted in its machine code.

The counting rule, the same for all architectures; `sass.py` and `amdgcn.py` read their text:

- A loop is a backward branch that its target leads to without leaving the instructions between
  the two. Blocks that an assembler moved behind the kernel, such as waits and shuffles of
  diverged warps, jump back as well, but are no loops by this rule.
- A KV loop is a loop that has matrix instructions and no smaller loop that has some. Where a
  kernel has no matrix instructions, as in float32, asynchronous copies stand for them.
- Its instructions are all from the target up to the branch, whichever of them are predicated off:
  what one warp issues in one iteration if no branch within is taken.
- An item loop is the smallest loop around a KV loop, or else the whole kernel.
- What comes before the first copy is counted from the top of the item loop to the tile's first
  asynchronous copy, in the order of the addresses; the code of another tile, which a branch skips,
  is left out.
- Padding behind the kernel is not counted at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["KINDS", "Instruction", "KvLoop", "MachineCode", "find_kv_loops"]

# Of instructions, by what executes them:
# - "matrix": the matrix unit's products;
# - "float": other arithmetic of floats, comparisons and selections, exp2 and the like;
# - "conversion": from one number format to another;
# - "integer": arithmetic and comparisons, addresses, masks and moves, also those that run once for
#   a warp;
# - "copy": asynchronous copies to shared memory, and waiting for them;
# - "global", "shared": other loads and stores; the latter with Blackwell's tensor memory;
# - "local": loads and stores of what spilled;
# - "shuffle": between the threads of a warp;
# - "barrier": among warps;
# - "other": branches, constants, special registers and all that is not known here.
KINDS = (
    "matrix",
    "float",
    "conversion",
    "integer",
    "copy",
    "global",
    "shared",
    "local",
    "shuffle",
    "barrier",
    "other",
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        name: without predicate, modifiers and operands.
        kind: one of :data:`KINDS`.
        copy_bytes: that a thread copies to shared memory asynchronously; 0 if it does not.
        target: place in the kernel of what a branch leads to.
        falls_through: whether the one behind it may be next.
    """

    name: str
    kind: str
    copy_bytes: int = 0
    target: int | None = None
    falls_through: bool = True


@dataclass(frozen=True, slots=True)
class MachineCode:
    """A kernel as the device runs it.

    Attributes:
        registers: per thread.
        spill_bytes: memory per thread, which holds what did not fit into registers.
        code: the instructions, without padding.
    """

    registers: int
    spill_bytes: int
    code: Sequence[Instruction]

    @property
    def matrix_instructions(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(sorted({one.name for one in self.code if one.kind == "matrix"}))

    @property
    def copy_bytes(self) -> tuple[int, ...]:
        """Widths of the asynchronous copies to shared memory."""
        return tuple(sorted({one.copy_bytes for one in self.code} - {0}))


@dataclass(frozen=True, slots=True)
class KvLoop:
    """The KV loop of a tile.

    Attributes:
        counts: instructions of one iteration by kind, for one warp; kinds with none are left out.
        first_copy_instructions: from the top of the item loop up to the first asynchronous copy;
            None where there is no such copy.
    """

    counts: dict[str, int]
    first_copy_instructions: int | None


def find_kv_loops(code: Sequence[Instruction]) -> list[KvLoop]:
    """The KV loops of a kernel by ascending number of matrix instructions, see the module.

    A kernel of two tiles has two, the one of fewer rows first: a tile that has the wgmma or tcgen05
    instructions of Hopper and Blackwell, which many threads share, comes last.
    """
    loops = _find_loops(code)
    inner = _innermost(code, loops, lambda one: one.kind == "matrix")
    inner = inner or _innermost(code, loops, lambda one: one.copy_bytes > 0)
    return [
        KvLoop(_count(code, loop), _before_copy(code, loop, loops, inner))
        for loop in sorted(inner, key=lambda loop: _matrix_size(code, loop))
    ]


def _innermost(
    code: Sequence[Instruction], loops: list[range], is_work: Callable[[Instruction], bool]
) -> list[range]:
    """The loops with such an instruction that have no smaller one with any, by place."""
    working = [loop for loop in loops if any(map(is_work, code[loop.start : loop.stop]))]
    return [one for one in working if not any(_is_inside(other, one) for other in working)]


def _find_loops(code: Sequence[Instruction]) -> list[range]:
    """Loops by the place of their top; of those with one top the largest."""
    ends: dict[int, int] = {}
    for place, one in enumerate(code):
        if one.target is not None and one.target <= place and _leads_to(code, one.target, place):
            ends[one.target] = place + 1
    return [range(top, end) for top, end in sorted(ends.items())]


def _leads_to(code: Sequence[Instruction], top: int, end: int) -> bool:
    """Whether ``end`` is reached from ``top`` by way of the instructions between the two."""
    seen, waiting = {top}, [top]
    while waiting:
        place = waiting.pop()
        if place == end:
            return True
        for following in _successors(code, place):
            if top <= following <= end and following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


def _successors(code: Sequence[Instruction], place: int) -> Iterator[int]:
    one = code[place]
    if one.falls_through:
        yield place + 1
    if one.target is not None:
        yield one.target


def _is_inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def _count(code: Sequence[Instruction], loop: range) -> dict[str, int]:
    counts = Counter(code[place].kind for place in loop)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _matrix_size(code: Sequence[Instruction], loop: range) -> tuple[bool, int]:
    names = [code[place].name for place in loop if code[place].kind == "matrix"]
    return any("GMMA" in name or name.startswith("UTC") for name in names), len(names)


def _before_copy(
    code: Sequence[Instruction], loop: range, loops: list[range], kv_loops: list[range]
) -> int | None:
    """Instructions from the top of the item loop up to the first copy of a KV loop's tile."""
    around = [one for one in loops if _is_inside(loop, one)]
    top = min(around, key=len).start if around else 0
    before = [one for one in kv_loops if top <= one.start < loop.start]
    begin = before[-1].stop if before else top
    copy = next((place for place in range(begin, loop.stop) if code[place].copy_bytes), None)
    if copy is None or not before:
        return None if copy is None else copy - top
    # The branch to this tile leads furthest; an earlier one may skip no more than the other loop.
    jumps = [
        (target, place)
        for place in range(top, before[0].start)
        if (target := code[place].target) is not None and begin <= target <= copy
    ]
    target, place = max(jumps, default=(0, -1))
    return copy - top - (target - place - 1)
