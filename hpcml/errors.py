"""The errors that are the user's to mend: one line that names the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(ValueError):
    """Bad input (configuration, data, mesh, environment): one line with the value and the remedy.

    The command line prints the line, without a traceback, and ends every rank with `exit_code`.
    """

    exit_code = 2

    def report(self) -> str:
        """What the command line prints: the message as one line."""
        return " ".join(str(self).split())


class NonFiniteError(UserError):
    """The loss or a gradient became infinite or not-a-number: training cannot go on."""

    exit_code = 3


class MemoryLimitError(UserError):
    """An allocation would have exceeded the limit of memory; nothing was allocated.

    The message is one line, then the table "where did all the memory go". `live` holds the bytes
    in use by category, `category` and `request` what was asked for, `limit` the limit in bytes.
    """

    def __init__(
        self,
        message: str,
        *,
        live: Mapping[str, int] | None = None,
        category: str = "",
        request: int = 0,
        limit: int = 0,
    ) -> None:
        super().__init__(message)
        self.live = dict(live or {})
        self.category, self.request, self.limit = category, request, limit
        self._advised = False

    def advise(self, advice: str) -> None:
        """Add what would fit to the message, for who knows what the memory is for.

        Who is nearest to the cause speaks first, and alone.
        """
        if not self._advised:
            self.args, self._advised = (f"{self}\n{advice}",), True

    def report(self) -> str:
        """The message as it is: a table has lines."""
        return str(self)
