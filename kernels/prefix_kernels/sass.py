"""The machine code of NVIDIA's GPUs, as ``cuobjdump`` of Triton's wheel prints it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from prefix_kernels.machine_code import Instruction, MachineCode

__all__ = ["disassemble", "parse_sass"]

# Names without their modifiers. Those that begin with U run once for a warp, beside the threads.
_KINDS = (
    ("matrix", r"[A-Z]G?MMA|UTC[A-Z]*MMA"),
    ("float", r"MUFU|U?[FHD](ADD|MUL|FMA|MNMX|SEL|SET|SETP|CHK)\d*"),
    ("conversion", r"U?(F2F|F2FP|F2I|F2IP|I2F|I2FP|FRND)"),
    (
        "integer",
        r"U?(IMAD|IADD|IADD3|LEA|SHF|SHL|SHR|LOP3?|ISETP|IMNMX|VIADD|VIADDMNMX|VIMNMX3?|IABS|PRMT"
        r"|SEL|MOV|SGXT|BMSK|POPC|FLO|BREV|I2I|P2R|R2P|PLOP3)|CS2R|CS2UR|R2UR",
    ),
    ("copy", r"LDGSTS|LDGDEPBAR|DEPBAR|ARRIVES|UTMALDG|UTMACMDFLUSH|UBLKCP"),
    ("global", r"LDG?|STG?|ATOMG?|REDG?|CCTL"),
    ("shared", r"LDSM?|STSM?|ATOMS|LDTM|STTM|UTCCP"),
    ("local", r"LDL|STL|CCTLL"),
    ("shuffle", r"SHFL|U?REDUX|VOTEU?|MATCH"),
    ("barrier", r"BAR|WARPGROUP|WARPSYNC|SYNCS|MEMBAR|ERRBAR|FENCE|UTCBAR|UTCATOMSWS"),
)
_KIND = re.compile("|".join(f"(?P<{kind}>{names})" for kind, names in _KINDS))
# An address, a predicate, a name, modifiers, operands.
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@\S+ +)?([A-Z]\w*)(\S*)([^;]*);")
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
_BRANCHES = ("BRA", "CALL", "JMP")  # the assembler also leaves loops by a predicated CALL
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")
_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
_COPY_BYTES = {"128": 16, "64": 8}


def disassemble(cubin: bytes) -> MachineCode:
    """Read the binary of one kernel.

    Raises:
        RuntimeError: cuobjdump prints something else.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(binary)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage, code = re.search(r"REG:(\d+) STACK:(\d+)", printed), parse_sass(printed)
    if usage is None or not code:
        raise RuntimeError(f"cuobjdump printed no kernel: {printed[:1000]}")
    return MachineCode(int(usage[1]), int(usage[2]), code)


def parse_sass(text: str) -> list[Instruction]:
    """Read the instructions of one kernel, up to the padding at its end."""
    lines = _LINE.findall(text)
    places = {int(line[0], 16): place for place, line in enumerate(lines)}
    code = []
    for place, (_, predicate, name, modifiers, operands) in enumerate(lines):
        target, falls_through = None, name not in _ENDS or bool(predicate)
        if name in _BRANCHES and (address := _ADDRESS.search(operands)):
            target = places.get(int(address[1], 16))
            # Other conditions than a predicate are operands before the address.
            is_conditional = bool(predicate) or "," in operands
            falls_through = is_conditional or name == "CALL"
            if target == place and not is_conditional:  # behind the end, so that nothing runs on
                break
        found = _KIND.fullmatch(name)
        kind = found.lastgroup if found and found.lastgroup else "other"
        copied = _COPY_BYTES.get(modifiers.rpartition(".")[2], 4) if name in _COPIES else 0
        code.append(Instruction(name, kind, copied, target, falls_through))
    return code
