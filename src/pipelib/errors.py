"""The one exception for what the user can mend: its message says the value, the consequence and the remedy."""


class UserError(ValueError):
    """A mistake or a circumstance that the user can mend.

    A stage or command that meets one prints its message without a traceback and exits with 1. Everything else that
    is raised is a defect of ours and keeps its traceback.
    """
