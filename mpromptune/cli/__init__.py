"""The ``mpromptune`` command."""
