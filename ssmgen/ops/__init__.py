"""Pure functions on tensors: the selective scan with its backends, the layers around it, and token orders."""

from ssmgen.ops.label_check import check_labels
from ssmgen.ops.local.layers import conv_silu, gelu, norm, sum_rows
from ssmgen.ops.scan.backend import Backend, ScanInputs
from ssmgen.ops.scan.dispatch import BackendStatus, backends
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

__all__ = ["HILBERT_ORDERS", "SCAN_ORDERS", "ZIGZAG_ORDERS", "Backend", "BackendStatus", "ScanInputs", "ScanOrder"]
__all__ += ["backends", "check_labels", "conv_silu", "gelu", "norm", "register_order", "reorder", "scan_directions"]
__all__ += ["scan_order", "scan_orders", "selective_scan", "ssd", "sum_rows"]
