"""Errors whose message is shown to the person at the page."""


class InvalidRequest(ValueError):
    """The client sent something the page does not accept."""


class JobStopped(Exception):
    """A job was stopped by its owner or ran out of time."""
