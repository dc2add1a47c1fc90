"""A pytest plugin for the tests of enrichment workers: ``pytest_plugins = ["creditstream.client.fixtures"]``."""

import pytest

from creditstream.client.testing import MemoryGate, MemoryProducer


@pytest.fixture
def cell_runs() -> MemoryProducer:
    """A producer whose ``runs`` the test reads."""
    return MemoryProducer()


@pytest.fixture
def gate() -> MemoryGate:
    """A gate whose balances the test sets; it says no to workspaces that the test did not mention."""
    return MemoryGate()
