"""Launches of a compiled step of sampling, counted without a GPU; a row of docs/performance.md."""

import pytest

pytest.importorskip("triton")

from count_launches import per_step

#: Of the SISMA block with kept states: in_proj, x_proj and out_proj twice, and the step sizes of the one scan.
PRODUCTS = {"mm": 7, "addmm": 2, "bmm": 1}
#: The norms before the three layers, each with the residual before it, and those after the two Mamba layers.
NORMS = {"reduction": 5}


def test_a_step_of_sisma_xl_launches_what_its_page_says():
    """One scan, in two passes at batch 1 and 2; one kernel reads the kept states of all conditions."""
    total, block = per_step(24, guided=True, keep=True)
    kernels = dict(block)
    assert kernels.pop("triton_scan") == 2
    assert {name: kernels.pop(name) for name in [*PRODUCTS, *NORMS]} == PRODUCTS | NORMS
    assert kernels == {"triton_conv_silu": 2, "pointwise": 1} and total == 486  # GELU
