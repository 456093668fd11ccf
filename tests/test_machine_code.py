"""What is counted in machine code, on short texts that show each rule."""

from __future__ import annotations

import pytest

from prefix_kernels.amdgcn import parse_amdgcn, read_amdgcn
from prefix_kernels.machine_code import KINDS, KvLoop, find_kv_loops
from prefix_kernels.sass import parse_sass


def sass(*lines: str) -> str:
    """As ``cuobjdump`` prints it: 16 bytes an instruction, and their encoding beside them."""
    end = f"BRA {len(lines) * 16:#x}"
    rows = []
    for place, line in enumerate((*lines, end, "NOP", "NOP")):
        text = line
        for target in range(len(lines)):
            text = text.replace(f"<{target}>", f"{target * 16:#x}")
        rows.append(f"        /*{place * 16:04x}*/   {text} ;   /* 0x0000000000007918 */")
        rows.append("                                             /* 0x000fc00000000000 */")
    return "\n".join(rows)


# An item loop from 1 to 9 with a KV loop from 4 to 7 in it, and a block behind that jumps back.
ONE_TILE = (
    "S2R R0, SR_CTAID.X",
    "LDG.E R2, desc[UR4][R2.64]",
    "LDGSTS.E.BYPASS.128 [R5], desc[UR4][R6.64], !P1",
    "@P5 BRA <8>",
    "BRA.DIV UR4, <11>",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@!P2 LDGSTS.E.64 [R5+0x80], desc[UR4][R8.64]",
    "@!P3 BRA <4>",
    "STG.E desc[UR4][R2.64], R4",
    "@!P4 BRA <1>",
    "EXIT",
    "WARPSYNC.COLLECTIVE R9, 0xb0",
    "BRA <5>",
)


def test_loops_of_a_kernel() -> None:
    code = parse_sass(sass(*ONE_TILE))
    assert len(code) == len(ONE_TILE)
    assert [one.copy_bytes for one in code if one.copy_bytes] == [16, 8]
    counts = {"matrix": 1, "copy": 1, "other": 2}
    assert find_kv_loops(code) == [KvLoop(counts, first_copy_instructions=1)]


def test_without_an_item_loop_all_instructions_are_the_items() -> None:
    lines = [*ONE_TILE]
    lines[9] = "NOP"
    (loop,) = find_kv_loops(parse_sass(sass(*lines)))
    assert loop.first_copy_instructions == 2


def test_a_loop_that_a_call_leaves_and_a_plain_branch_closes() -> None:
    """As ptxas writes it for sm_80."""
    lines = [*ONE_TILE]
    lines[4], lines[7] = "@P3 CALL.REL.NOINC <8>", "BRA <4>"
    (loop,) = find_kv_loops(parse_sass(sass(*lines)))
    assert loop.counts == {"matrix": 1, "copy": 1, "other": 2}


def test_copies_stand_for_matrix_instructions_where_there_are_none() -> None:
    """And what spilled in the loop is told from other loads."""
    lines = [*ONE_TILE]
    lines[4], lines[5] = "LDL R7, [R1]", "FFMA R4, R5, R6, R4"
    (loop,) = find_kv_loops(parse_sass(sass(*lines)))
    assert loop.counts == {"float": 1, "copy": 1, "local": 1, "other": 1}
    lines[2] = lines[6] = "NOP"
    assert find_kv_loops(parse_sass(sass(*lines))) == []


def test_two_tiles_in_one_loop() -> None:
    """The wide one comes first in the code, and last in the list; each without the other's."""
    code = parse_sass(
        sass(
            "MOV R1, R2",
            "@P0 BRA <8>",  # to the narrow tile
            "IMAD R3, R4, R5, R6",
            "IMAD R3, R4, R5, R6",
            "LDGSTS.E [R5], desc[UR4][R6.64]",
            "@P1 BRA <7>",  # past the KV loop
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24",
            "@P2 BRA <6>",
            "LDGSTS.E [R5], desc[UR4][R6.64]",
            "HMMA.16816.F32.BF16 R4, R8, R12, R4",
            "HMMA.16816.F32.BF16 R4, R8, R12, R4",
            "@P3 BRA <9>",
            "@P4 BRA <0>",
            "EXIT",
        )
    )
    narrow, wide = find_kv_loops(code)
    assert narrow == KvLoop({"matrix": 2, "other": 1}, first_copy_instructions=2)
    assert wide == KvLoop({"matrix": 1, "other": 1}, first_copy_instructions=4)


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("IMAD.WIDE R4, R5, R6, R8", "integer"),
        ("@!UP0 UIADD3 UR4, UR5, 0x1, URZ", "integer"),
        ("CS2R R4, SRZ", "integer"),
        ("VIADDMNMX R4, R5, R6, R7, PT", "integer"),
        ("FSETP.GT.AND P0, PT, R4, R5, PT", "float"),
        ("FFMA2 R4, R6, R8, R10", "float"),
        ("MUFU.EX2 R4, R5", "float"),
        ("F2FP.BF16.F32.PACK_AB R4, R5, R6", "conversion"),
        ("F2F.BF16.F32 R4, R5", "conversion"),
        ("QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", "matrix"),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11]", "matrix"),
        ("LDGDEPBAR", "copy"),
        ("DEPBAR.LE SB0, 0x1", "copy"),
        ("LDSM.16.MT88.4 R4, [R5]", "shared"),
        ("LDTM.x32 R4, tmem[UR4]", "shared"),
        ("ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R6.64], R8", "global"),
        ("STL.64 [R1], R4", "local"),
        ("SHFL.BFLY PT, R4, R5, 0x2, 0x1f", "shuffle"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "barrier"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "barrier"),
        ("BSSY B0, 0x10", "other"),
        ("BRANDNEW R4", "other"),
    ],
)
def test_kinds(instruction: str, kind: str) -> None:
    assert kind in KINDS
    assert parse_sass(sass(instruction))[0].kind == kind


AMDGCN = """\
	.text
pack_forward_kernel:                    ; @pack_forward_kernel
; %bb.0:
	s_load_dwordx2 s[0:1], s[4:5], 0x48
.LBB0_1:                                ; =>This Loop Header: Depth=1
	.loc	1 88 17 is_stmt 1               ; forward.py:88:17
	v_and_b32_e32 v0, 0x3ff, v0
	global_load_lds_dwordx4 v[14:15], off
	s_cbranch_vccnz .LBB0_3
.LBB0_2:                                ; %.lr.ph
	v_mfma_f32_16x16x16_bf16 a[0:3], v[4:5], v[6:7], a[0:3]
	v_mul_f32_e32 v1, v2, v3
	buffer_load_dword v1, s[8:11], 0 offen lds
	ds_bpermute_b32 v1, v2, v3
	s_waitcnt vmcnt(0)
	s_cbranch_scc1 .LBB0_2
.LBB0_3:
	scratch_store_dword off, v1, s32
	s_cbranch_scc0 .LBB0_1
; %bb.4:
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_next_free_vgpr 208
	.vgpr_count:     208
	.private_segment_fixed_size: 24
"""


def test_amdgcn() -> None:
    binary = read_amdgcn(AMDGCN)
    assert (binary.registers, binary.spill_bytes, len(binary.code)) == (208, 24, 13)
    assert binary.matrix_instructions == ("v_mfma_f32_16x16x16_bf16",)
    assert binary.copy_bytes == (4, 16)
    counts = {"matrix": 1, "float": 1, "copy": 1, "shuffle": 1, "other": 2}
    assert find_kv_loops(binary.code) == [KvLoop(counts, first_copy_instructions=1)]
    assert [one.kind for one in parse_amdgcn(AMDGCN)][-3:] == ["local", "other", "other"]


def test_no_kernel_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="wrote no kernel"):
        read_amdgcn(AMDGCN.replace(".vgpr_count", ".sgpr_count"))
    with pytest.raises(RuntimeError, match="wrote no kernel"):
        read_amdgcn("\t.vgpr_count: 1\n\t.private_segment_fixed_size: 0\n")
