"""Pure functions on tensors: the scans with their backends, the layers around them, and token orders."""

from ssmgen.ops.backend import Backend, ScanBackend
from ssmgen.ops.dispatch import BackendStatus
from ssmgen.ops.label_check import check_labels
from ssmgen.ops.linear_attention.gated_delta_rule import gated_delta_rule
from ssmgen.ops.local.layers import conv_silu, gelu, norm, sum_rows
from ssmgen.ops.report import OPERATORS, backends
from ssmgen.ops.scan.inputs import ScanInputs
from ssmgen.ops.scan.selective_scan import selective_scan
from ssmgen.ops.scan_order import SCAN_ORDERS, ScanOrder, reorder, scan_order
from ssmgen.ops.ssd.ssd import ssd

__all__ = ["OPERATORS", "SCAN_ORDERS", "Backend", "BackendStatus", "ScanBackend", "ScanInputs", "ScanOrder"]
__all__ += ["backends", "check_labels", "conv_silu", "gated_delta_rule", "gelu", "norm", "reorder", "scan_order"]
__all__ += ["selective_scan", "ssd", "sum_rows"]
