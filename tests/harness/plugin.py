"""pytest plugin: limits, and ranks that agree on the outcome of every test."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Settings of `[tool:pytest]`."""
    parser.addini("test_limit", "seconds a test may take, fixtures included", default="120")
    parser.addini("test_grace", "seconds a failed rank waits for the others", default="10")


def pytest_configure(config: pytest.Config) -> None:
    """The marker `limit`."""
    config.addinivalue_line("markers", "limit(seconds): the limit of this test")
