"""What several test modules use."""

from __future__ import annotations

import pkgutil

import pytest

# Failing asserts in here show their values, as those of the tests do.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
