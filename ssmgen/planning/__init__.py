"""What a training would take on hardware you do not have: counted work, published figures, stated assumptions."""

from ssmgen.planning.counting import StepCounts, count_step
from ssmgen.planning.devices import DEVICES, Device, device_named
from ssmgen.planning.plan import Plan, gather_seconds, make_plan, reduce_seconds

__all__ = [
    "DEVICES",
    "Device",
    "Plan",
    "StepCounts",
    "count_step",
    "device_named",
    "gather_seconds",
    "make_plan",
    "reduce_seconds",
]
