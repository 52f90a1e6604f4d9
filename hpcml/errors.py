"""The errors that are the user's to mend: one line that names the value and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input (configuration, data, mesh, environment): one line with the value and the remedy.

    The command line prints the line, without a traceback, and ends every rank with `exit_code`.
    """

    exit_code = 2


class NonFiniteError(UserError):
    """The loss or a gradient became infinite or not-a-number: training cannot go on."""

    exit_code = 3
