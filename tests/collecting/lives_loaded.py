"""Imported by the process that lives are forked from."""

from tests.collecting import lives

lives.load()
