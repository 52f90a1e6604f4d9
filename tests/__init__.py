"""Tests. A package, so that `tests.harness` cannot be mistaken for another project's `tests`."""
