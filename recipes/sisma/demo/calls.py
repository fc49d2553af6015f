"""The calls that the page makes to its server, checked before gradio sees them."""

import json
import re
from typing import Any

#: Deepest accepted nesting of a request; the page's own has four levels.
MAX_DEPTH = 16
_SESSION = re.compile(r"\w{1,64}", re.ASCII)
_JOIN_KEYS = {"data", "event_data", "fn_index", "session_hash", "trigger_id"}


class RejectedCall(Exception):
    """A request is answered with ``status`` and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def parse_json(body: bytes) -> Any:
    """Content of a request.

    Raises:
        RejectedCall: not JSON, nested deeper than `MAX_DEPTH`, or with a reference to what gradio treats as a file.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RejectedCall(400, "The request is not JSON.") from error
    pending = [(content, 1)]
    while pending:
        value, depth = pending.pop()
        if not isinstance(value, dict | list):
            continue
        if depth > MAX_DEPTH:
            raise RejectedCall(400, f"The request is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(value, dict) and value.keys() & {"path", "_type"}:
            raise RejectedCall(400, "The request references a file; this page accepts none.")
        pending += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
    return content


def check_join(content: Any, functions: dict[int, int]) -> str:
    """Session of a request to queue a job.

    Args:
        content: the parsed request.
        functions: number of inputs of each function of the page, by its index.

    Raises:
        RejectedCall: 404 for an unknown function, else 422.
    """
    if not isinstance(content, dict):
        raise RejectedCall(422, "The request must be a JSON object.")
    index = content.get("fn_index")
    if type(index) is not int or index not in functions:
        raise RejectedCall(404, "This page has no such function.")
    unknown = sorted(content.keys() - _JOIN_KEYS)
    if unknown:
        raise RejectedCall(422, f"The request has an unknown key: {unknown[0][:40]!r}.")
    data = content.get("data")
    if not isinstance(data, list) or len(data) != functions[index]:
        raise RejectedCall(422, f"data must be a list of {functions[index]} values.")
    return check_session(content.get("session_hash"))


def check_session(session: Any) -> str:
    """A session's name as the browser chose it; raises a RejectedCall with 422 for anything else."""
    if not isinstance(session, str) or not _SESSION.fullmatch(session):
        raise RejectedCall(422, "session_hash must be 1 to 64 letters and digits.")
    return session
