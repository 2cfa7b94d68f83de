# SPDX-License-Identifier: Apache-2.0
"""The main loop is found in machine code, and floats in it, also where code lies out of line."""

import pytest
from sass_loops import main_loops

CODE = """
        /*0000*/                   I2FP.F32.S32 R1, R2 ;         /* 0x0000000000000000 */
        /*0010*/                   FMUL R5, R5, UR4 ;            /* 0x0000000000000000 */
        /*0020*/                   HFMA2 R1, -RZ, RZ, 0, 0 ;     /* 0x0000000000000000 */
        /*0030*/                   IMAD R1, R2, R3, R4 ;         /* 0x0000000000000000 */
        /*0040*/                   {inside} ;                    /* 0x0000000000000000 */
        /*0050*/                   {multiply} ;                  /* 0x0000000000000000 */
        /*0060*/              @!P0 BRA 0x20 ;                    /* 0x0000000000000000 */
        /*0070*/                   FFMA R5, R5, R6, R7 ;         /* 0x0000000000000000 */
        /*0080*/               @P0 BRA 0x0 ;                     /* 0x0000000000000000 */
        /*0090*/                   BRA 0x90 ;                    /* 0x0000000000000000 */
"""


@pytest.mark.parametrize(
    ("inside", "multiply", "found"),
    [
        ("NOP", "IMMA.16832.S8.S8 R60, R52.ROW, R158.COL, R60", (1, 0)),
        ("NOP", "IGMMA.64x256x32.S8.S8 R24, gdesc[UR12], R24, gsb0", (1, 0)),
        ("I2F R1, R2", "IMMA.16864.S4.S4 R60, R52.ROW, R158.COL, R60", (1, 1)),
        ("@P0 FFMA R1, R2, R3, R1", "IMMA.16864.S4.S4 R60, R52.ROW, R158.COL, R60", (1, 1)),
        ("HFMA2 R1, R2, R3, R1", "IMMA.16864.S4.S4 R60, R52.ROW, R158.COL, R60", (1, 1)),
        ("FADD R1, R2, R3", "NOP", (0, 0)),
    ],
)
def test_floats_are_counted_in_the_innermost_loop_that_multiplies(
    inside: str, multiply: str, found: tuple[int, int]
) -> None:
    """Not before it, not after it, and not in the loop around it."""
    code = CODE.replace("{inside}", inside).replace("{multiply}", multiply)
    assert main_loops(code) == found


OUT_OF_LINE = """
        /*0000*/                   NOP ;                          /* 0x0000000000000000 */
        /*0010*/               @P0 BRA 0x30 ;                     /* 0x0000000000000000 */
        /*0020*/              @!P1 BRA 0x80 ;                     /* 0x0000000000000000 */
        /*0030*/                   IGMMA.64x32x32.S8.S8 R24, gdesc[UR12], R24 ;
        /*0040*/               @P2 BRA 0x10 ;                     /* 0x0000000000000000 */
        /*0050*/                   FMUL R21, R7, R8 ;             /* 0x0000000000000000 */
        /*0060*/               @P3 BRA 0x0 ;                      /* 0x0000000000000000 */
        /*0070*/                   EXIT ;                         /* 0x0000000000000000 */
        /*0080*/                   FADD R1, R2, R3 ;              /* 0x0000000000000000 */
        /*0090*/              @!P1 BRA 0x80 ;                     /* 0x0000000000000000 */
        /*00a0*/                   BRA 0x30 ;                     /* 0x0000000000000000 */
"""


def test_a_jump_back_from_code_out_of_line_is_no_loop() -> None:
    """The wait at 80 returns into the loop from 10 to 40 and is part of it; the epilogue at 50 lies
    between them."""
    assert main_loops(OUT_OF_LINE) == (1, 1)
