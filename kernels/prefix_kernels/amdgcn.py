"""The machine code of AMD's GPUs, as Triton's AMD backend writes it before it is assembled."""

from __future__ import annotations

import re

from prefix_kernels.machine_code import Instruction, MachineCode

__all__ = ["parse_amdgcn", "read_amdgcn"]

# Names with their suffixes; the first that matches. Those that begin with s_ run once for a wave.
_KINDS = (
    ("matrix", r"v_s?mfmac?_.*"),
    ("conversion", r"v_cvt_.*"),
    ("shuffle", r"ds_(b?permute|swizzle)_.*|v_(readlane|readfirstlane|writelane|permlane)\w*"),
    ("float", r"v_\w+_(pk_)?f(16|32|64)(_\w+)?|v_cndmask_.*"),
    ("copy", r"global_load_lds_.*"),
    ("global", r"(global|buffer|flat)_.*|s_load_.*|s_buffer_load_.*"),
    ("shared", r"ds_.*"),
    ("local", r"scratch_.*"),
    ("barrier", r"s_barrier.*"),
    (
        "other",
        r"s_(waitcnt|nop|branch|cbranch|endpgm|setprio|sched|sleep|getreg|setreg|setpc|getpc|swappc"
        r"|inst_prefetch|icache|clause|trap|set_gpr_idx).*",
    ),
    ("integer", r"[sv]_.*"),
)
_KIND = re.compile("|".join(f"(?P<{kind}>{names})" for kind, names in _KINDS))
_LABEL = re.compile(r"(\.LBB\w+):")
_LINE = re.compile(r"\s+([a-z]\w+)\b([^;]*)")
_END = "s_endpgm"
_COPY_BYTES = {"x4": 16, "x3": 12, "x2": 8}
_USAGE = {"registers": ".vgpr_count", "spill_bytes": ".private_segment_fixed_size"}


def read_amdgcn(text: str) -> MachineCode:
    """Read the text of one kernel. Its registers are vector registers, accumulators included.

    Raises:
        RuntimeError: it says nothing about registers, or has no instructions.
    """
    usage = {
        name: int(found[1])
        for name, key in _USAGE.items()
        if (found := re.search(rf"{re.escape(key)}:\s*(\d+)", text))
    }
    code = parse_amdgcn(text)
    if len(usage) < len(_USAGE) or not code:
        raise RuntimeError(f"the AMD backend wrote no kernel: {text[:1000]}")
    return MachineCode(**usage, code=code)


def parse_amdgcn(text: str) -> list[Instruction]:
    """Read the instructions of one kernel, up to its end."""
    lines: list[tuple[str, str]] = []
    places: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(lines)
        elif found := _LINE.match(line):
            lines.append((found[1], found[2].strip()))
        elif line.startswith("\t.section") and lines:  # what follows is data
            break
    code = []
    for name, operands in lines:
        found = _KIND.fullmatch(name)
        kind = found.lastgroup if found and found.lastgroup else "other"
        is_copy = kind == "copy" or (name.startswith("buffer_load") and operands.endswith(" lds"))
        is_branch = name.startswith(("s_branch", "s_cbranch"))
        code.append(
            Instruction(
                name,
                "copy" if is_copy else kind,
                _COPY_BYTES.get(name[-2:], 4) if is_copy else 0,
                places.get(operands) if is_branch else None,
                name not in ("s_branch", _END),
            )
        )
    return code
