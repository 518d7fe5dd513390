"""The one exception type for mistakes that a user can correct."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the user's input; its one-line message says what to change."""
