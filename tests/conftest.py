"""What every test run has: the limit and the agreement of ranks, and repeatable examples."""

from hypothesis import HealthCheck, settings

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
