"""Pure functions on tensors: the scans with their backends, the layers around them, and token orders."""

from ssmgen.ops.backend import Backend, ScanBackend
from ssmgen.ops.dispatch import BackendStatus
from ssmgen.ops.label_check import check_labels
from ssmgen.ops.linear_attention.gated_delta_rule import gated_delta_rule
from ssmgen.ops.local.layers import conv_silu, gelu, norm, sum_rows
from ssmgen.ops.report import OPERATORS, backends
from ssmgen.ops.scan.inputs import ScanInputs
from ssmgen.ops.scan.selective_scan import selective_scan
from ssmgen.ops.scan_order import (
    HILBERT_ORDERS,
    SCAN_ORDERS,
    ZIGZAG_ORDERS,
    ScanOrder,
    register_order,
    reorder,
    scan_directions,
    scan_order,
    scan_orders,
)
from ssmgen.ops.ssd.ssd import ssd

__all__ = ["HILBERT_ORDERS", "OPERATORS", "SCAN_ORDERS", "ZIGZAG_ORDERS", "Backend", "BackendStatus", "ScanBackend"]
__all__ += ["ScanInputs", "ScanOrder", "backends", "check_labels", "conv_silu", "gated_delta_rule", "gelu", "norm"]
__all__ += ["register_order", "reorder", "scan_directions", "scan_order", "scan_orders", "selective_scan", "ssd"]
__all__ += ["sum_rows"]
