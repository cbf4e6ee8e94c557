"""The errors that a user can mend; each is shown as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend: a setting, a file, the machine. The message is one line that names it."""


class DivergedError(UserError):
    """A run whose numbers are out of range; going on would come to the same."""


class ConfigError(UserError):
    """A configuration that can't be used. `mistakes`: a line for each, `where: dotted.key: expected, found`."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__(mistakes[0])
        self.mistakes = mistakes
