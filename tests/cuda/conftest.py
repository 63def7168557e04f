from __future__ import annotations

import emulator
import pytest


@pytest.fixture(scope="session")
def builder(pytestconfig: pytest.Config) -> emulator.Builder:
    return emulator.builder(pytestconfig)
