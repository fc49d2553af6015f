"""Cases that pass and that fail in every way, for the test of the campaigns themselves."""

import os
import signal
import time

from torture.campaign import Campaign, Case, Failed


def checked(case: Case) -> str:
    """Hang, die, break a promise, raise, or pass, by the case's number."""
    if case.number == 1:
        time.sleep(60)
    if case.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if case.number == 3:
        (case.folder / "evidence").touch()
        raise Failed(f"a broken promise, {case.random.random()}")
    if case.number == 4:
        raise ZeroDivisionError
    return "passes"


CAMPAIGN = Campaign("selfcheck", "The campaigns find what fails", checked, 6, limit=1)
