"""What the tests of stored activations share with those of recording."""

from tests.recording.conftest import collection, plan, run, write

__all__ = ["collection", "plan", "run", "write"]
