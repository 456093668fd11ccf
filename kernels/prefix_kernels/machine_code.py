"""How many instructions a compiled kernel spends on KV, read from its machine code.

The counting rule, for NVIDIA's SASS as ``cuobjdump -sass`` prints it:

- A loop is a backward branch that its target leads to without leaving the instructions between
  the two. Blocks that the assembler moved behind the kernel, such as waits and shuffles of
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

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["KINDS", "Instruction", "KvLoop", "find_kv_loops", "parse_sass"]

# Of instructions, by what executes them:
# - "matrix": the matrix unit's products;
# - "float": float32 arithmetic, comparisons and selections, with exp2 and the like;
# - "conversion": from one number format to another, F2F among them;
# - "integer": arithmetic and comparisons, addresses, masks and moves, also those of the uniform
#   path that runs beside the threads;
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

# The first that matches the name without its modifiers, in this order.
_SASS_KINDS = (
    (
        "integer",
        r"U?(IMAD|IADD|IADD3|LEA|SHF|SHL|SHR|LOP|LOP3|ISETP|IMNMX|VIADD|VIADDMNMX|VIMNMX3?|IABS"
        r"|PRMT|SEL|MOV|SGXT|BMSK|POPC|FLO|BREV|I2I|IDP|P2R|R2P|PLOP3|PSETP)|CS2R|CS2UR|R2UR|LEPC",
    ),
    ("conversion", r"U?(F2F|F2FP|F2I|F2IP|I2F|I2FP|FRND)"),
    ("matrix", r"[A-Z]G?MMA|UTC[A-Z]*MMA"),
    ("float", r"MUFU|U?[FHD](ADD|MUL|FMA|MNMX|SEL|SET|SETP|CHK|SWZADD)\d*"),
    ("copy", r"LDGSTS|LDGDEPBAR|DEPBAR|ARRIVES|UTMALDG|UTMASTG|UTMACMDFLUSH|UBLKCP"),
    ("global", r"LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG|CCTL"),
    ("shared", r"LDS|LDSM|STS|STSM|ATOMS|LDTM|STTM|UTCCP"),
    ("local", r"LDL|STL|CCTLL"),
    ("shuffle", r"SHFL|REDUX|VOTE|VOTEU|MATCH"),
    ("barrier", r"BAR|WARPGROUP|WARPSYNC|SYNCS|MEMBAR|ERRBAR|FENCE|UTCBAR|UTCATOMSWS"),
)
_SASS_KIND = re.compile("|".join(f"(?P<{kind}>{names})" for kind, names in _SASS_KINDS))
_SASS_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@\S+ +)?([A-Z]\w*)(\S*)([^;]*);")
_SASS_TARGET = re.compile(r"^\s*(?:.*, *)?0x([0-9a-f]+)\s*$")
_SASS_BRANCHES = ("BRA", "CALL", "JMP")  # the assembler also leaves loops by a predicated CALL
_SASS_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        name: without predicate, modifiers and operands.
        kind: one of :data:`KINDS`.
        starts_copy: whether it copies to shared memory asynchronously.
        target: place in the kernel of what a branch leads to.
        falls_through: whether the one behind it may be next.
    """

    name: str
    kind: str
    starts_copy: bool = False
    target: int | None = None
    falls_through: bool = True


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


def parse_sass(text: str) -> list[Instruction]:
    """Read the kernel that ``cuobjdump -sass`` printed, without the padding at its end.

    Raises:
        ValueError: there is no instruction.
    """
    lines = _SASS_LINE.findall(text)
    places = {int(line[0], 16): place for place, line in enumerate(lines)}
    code = []
    for place, (_, predicate, name, _modifiers, operands) in enumerate(lines):
        target, falls_through = None, name not in _SASS_ENDS or bool(predicate)
        if name in _SASS_BRANCHES and (address := _SASS_TARGET.match(operands)):
            target = places.get(int(address[1], 16))
            # A condition is a predicate or stands before the address; a call returns.
            is_plain = not predicate and "," not in operands
            falls_through = not is_plain or name == "CALL"
            if target == place and is_plain:  # the assembler's mark of the end
                break
        found = _SASS_KIND.fullmatch(name)
        kind = found.lastgroup if found and found.lastgroup else "other"
        code.append(Instruction(name, kind, name in _SASS_COPIES, target, falls_through))
    if not code:
        raise ValueError(f"no instruction in what cuobjdump printed: {text[:1000]}")
    return code


def find_kv_loops(code: Sequence[Instruction]) -> list[KvLoop]:
    """The KV loops of a kernel by ascending number of matrix instructions, see the module.

    A kernel of two tiles has two, the one of fewer rows first: a tile that has the wgmma or tcgen05
    instructions of Hopper and Blackwell, which many threads share, comes last.
    """
    loops = _find_loops(code)
    inner = _innermost(code, loops, lambda one: one.kind == "matrix")
    inner = inner or _innermost(code, loops, lambda one: one.starts_copy)
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
    copy = next((place for place in range(begin, loop.stop) if code[place].starts_copy), None)
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
