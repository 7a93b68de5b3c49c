"""Bundles of every family, shared with the tests of engines."""

from tests.engine.conftest import bundle_of as bundle_of
