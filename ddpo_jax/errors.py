"""Failures that a user reads as one line instead of a traceback."""


class UserError(ValueError):
    """Input that cannot be used. The message gives the value, what was expected and what to do."""


class RunStopped(RuntimeError):
    """A run that cannot go on (rewards missing, gradients not finite, a deadline). Its last whole round is saved."""


class Preempted(RuntimeError):
    """A run that was asked to stop. Its last whole round is saved; the same command continues it."""
