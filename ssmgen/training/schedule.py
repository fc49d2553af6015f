"""The learning-rate schedule over the life of a run, which may be prolonged.

A checkpoint keeps it as ``schedule``: ``[{"step": 0, "lr_decay_steps": 1000}, {"step": 1000, "lr_decay_steps": 3000}]``
means that the second schedule holds from step 1000 on.
"""

from __future__ import annotations

from typing import Any

History = list[dict[str, int]]


def may_follow(before: int, after: int) -> bool:
    """Whether a run with ``lr_decay_steps=before`` may continue with ``after``.

    A cosine may become longer or end, and a constant rate may begin to fall. A shorter cosine is usually a setting
    forgotten on the command line.
    """
    return not before or not after or after >= before


def schedule_of(state: dict[str, Any], lr_decay_steps: int = 0) -> History:
    """The schedule in a checkpoint's state; without one, the record's ``lr_decay_steps``, or the given one."""
    recorded = state.get("record", {}).get("lr_decay_steps", lr_decay_steps)
    return state.get("schedule") or [{"step": 0, "lr_decay_steps": recorded}]


def continued(history: History, step: int, lr_decay_steps: int) -> History:
    """The history of a run that continues after ``step`` with ``lr_decay_steps``; unchanged if that is the same."""
    if history[-1]["lr_decay_steps"] == lr_decay_steps:
        return history
    return [*history, {"step": step, "lr_decay_steps": lr_decay_steps}]


def schedule_changes(history: History) -> list[str]:
    """A sentence about every change, oldest first."""
    return [
        f"learning-rate schedule changed at step {now['step']}: lr_decay_steps={now['lr_decay_steps']}, "
        f"{before['lr_decay_steps']} until then"
        for before, now in zip(history, history[1:], strict=False)
    ]
