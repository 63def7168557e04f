from __future__ import annotations

import emulator
import pytest


@pytest.fixture(scope="session")
def builder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> emulator.Builder:
    if reason := emulator.why_unavailable():
        pytest.skip(reason)
    cache = getattr(pytestconfig, "cache", None)
    return emulator.Builder(cache.mkdir("cuda_emulation") if cache else tmp_path_factory.mktemp("cuda_emulation"))
