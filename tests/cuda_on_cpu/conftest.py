"""Stand-ins for the tests in here; without a C++17 compiler the tests are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tests.cuda_on_cpu import compiler_available, stand_in


@pytest.fixture(params=["fast", "checked"])
def cp(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The stand-in, in each mode that works in any process."""
    with _started(mode=request.param) as module:
        yield module


@pytest.fixture
def fast() -> Iterator[Any]:
    with _started() as module:
        yield module


@pytest.fixture
def checked() -> Iterator[Any]:
    with _started(mode="checked") as module:
        yield module


@pytest.fixture
def start() -> Callable[..., AbstractContextManager[Any]]:
    """``stand_in`` itself."""
    return _started


def _started(**options: Any) -> AbstractContextManager[Any]:
    reason = compiler_available()
    if reason:
        pytest.skip(reason)
    return stand_in(**options)
