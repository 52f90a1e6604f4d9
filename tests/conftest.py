"""What every test has: a limit, the agreement of ranks, repeatable examples, an own account."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from hpcml import memory
from hpcml.account import Account

pytest_plugins = ["tests.harness.plugin"]

# The same examples on every run and every rank: ranks that try different ones would call different
# collectives. No deadline and no complaint about slow examples: how long one takes says nothing on
# a shared machine, and the limit of the whole test remains.
settings.register_profile(
    "hpcml",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("hpcml")


@pytest.fixture(autouse=True)
def own_account() -> Iterator[None]:
    """What one test holds, at its peak or as a limit, is no other's."""
    before = memory.standing()
    memory.stand_in((Account(), "activations"))
    yield
    memory.stand_in(before)
