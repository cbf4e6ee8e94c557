"""What goes wrong by the user's hand: one clear line, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend: a setting, a file, the machine. The message is one line that names it."""
