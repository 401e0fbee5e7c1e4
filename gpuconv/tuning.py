"""Choosing engines by measuring them: each convolution's candidates are timed once and remembered.

The cost models predict well enough for most; ``autotune`` settles it. What was measured is kept
in the user's cache directory, by convolution, pass, device and number of threads, and used
whether or not tuning is still on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from gpuconv import cache, settings
from gpuconv.cuda import runtime
from gpuconv.engines.base import Engine, Pass
from gpuconv.problem import ConvProblem

__all__ = ["autotune", "forget", "is_on", "known", "measure"]

_NAME = "tuned"
#: Candidates that are predicted to take longer than the best by this are not worth a try.
_HOPELESS = 5.0
#: Runs of a candidate: the shortest counts.
_RUNS = 5
#: Seconds after which a candidate is not run again.
_ENOUGH = 0.5

_on = False
#: From a key to the seconds of each engine; None until the file was looked for.
_times: dict[str, dict[str, float]] | None = None


class autotune:
    """Time the candidates of each convolution that is met, for good or for a ``with`` block.

    The first call of a convolution takes longer then: each of its candidates runs some times on
    random arrays of its shape. ``gpuconv.explain`` shows what was measured beside what was
    predicted.

    Parameters
    ----------
    on : bool
        Whether to tune; what was measured before is used in any case.

    Raises
    ------
    TypeError
        If ``on`` is neither True nor False.
    """

    def __init__(self, on: bool = True) -> None:
        global _on
        if not isinstance(on, bool):
            raise TypeError(f"on is {on!r}; expected True or False")
        self._previous = _on
        _on = on
        settings.changed()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _on
        _on = self._previous
        settings.changed()


def is_on() -> bool:
    """Return whether convolutions that are met are timed."""
    return _on


def forget() -> None:
    """Forget what was measured, here and in the cache directory."""
    global _times
    _times = {}
    cache.write(_NAME, {})
    settings.changed()


def _key(problem: ConvProblem, pass_: Pass, device_kind: str) -> str:
    device = device_kind
    if device_kind == "cuda":
        properties = runtime.cupy().cuda.runtime.getDeviceProperties(
            runtime.cupy().cuda.runtime.getDevice()
        )
        name = properties["name"]
        device = name.decode() if isinstance(name, bytes) else str(name)
    values = [
        problem.batch, problem.in_channels, problem.out_channels, problem.in_shape,
        problem.kernel, problem.stride, problem.padding, problem.dilation, problem.groups,
        problem.dtype, problem.layout, str(problem.activation or ""), pass_, device,
        settings.get_num_threads(),
    ]  # fmt: skip
    return json.dumps(values, separators=(",", ":"))


def _loaded() -> dict[str, dict[str, float]]:
    global _times
    if _times is None:
        _times = _checked(cache.read(_NAME) or {})
    return _times


def _checked(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return those entries of a file's content that are times of engines."""
    found = {}
    for key, times in content.items():
        if not isinstance(times, dict) or not times:
            continue
        if all(isinstance(v, float) and math.isfinite(v) and 0 < v < 1e4 for v in times.values()):
            found[key] = dict(times)
    return found


def known(problem: ConvProblem, pass_: Pass, device_kind: str) -> dict[str, float]:
    """Return the seconds that engines were measured to take, by name; empty if none was."""
    times = _loaded()
    return times.get(_key(problem, pass_, device_kind), {}) if times else {}


def measure(
    problem: ConvProblem,
    pass_: Pass,
    device_kind: str,
    predicted: Mapping[str, float],
    engine_of: Callable[[str], Engine],
) -> dict[str, float]:
    """Time the candidates that may be the best, remember their seconds, and return them.

    Parameters
    ----------
    problem, pass_, device_kind
        What is computed and where.
    predicted : mapping of str to float
        The candidates' predicted seconds.
    engine_of : callable
        Returns the engine of a name.
    """
    best = min(predicted.values())
    names = [n for n, seconds in predicted.items() if seconds <= _HOPELESS * best]
    xp = np if device_kind == "cpu" else runtime.cupy()
    shapes = problem.x_shape, problem.w_shape, problem.y_shape
    rng = np.random.default_rng(0)
    x, w, y = (_laid(xp, rng, shape, problem, k == 1) for k, shape in enumerate(shapes))
    times = {}
    for name in sorted(names, key=lambda n: predicted[n]):
        made = engine_of(name)

        def run(made: Engine = made) -> None:
            if pass_ == "forward":
                made.forward(problem, x, w, None, y)
            elif pass_ == "input_grad":
                made.input_grad(problem, y, w, x)
            else:
                made.weight_grad(problem, y, x, w, None)
            if device_kind == "cuda":
                xp.cuda.runtime.deviceSynchronize()

        times[name] = _least(run)
    _loaded()[_key(problem, pass_, device_kind)] = times
    # Another process may have measured something else meanwhile.
    cache.write(_NAME, {**_checked(cache.read(_NAME) or {}), **_loaded()})
    return times


def _laid(xp: Any, rng: Any, shape: tuple[int, ...], problem: ConvProblem, weights: bool) -> Any:
    """Return a random array, channels last, that lies in memory as the caller's would."""
    if problem.layout == "channels_last":
        return xp.asarray(rng.standard_normal(shape).astype(problem.dtype))
    axes = tuple(range(len(shape)))
    order = (axes[-1], axes[-2], *axes[:-2]) if weights else (0, axes[-1], *axes[1:-1])
    first = rng.standard_normal([shape[a] for a in order]).astype(problem.dtype)
    return xp.asarray(first).transpose(tuple(int(k) for k in np.argsort(order)))


def _least(run: Callable[[], None]) -> float:
    """Return the shortest of some runs after a first one."""
    run()
    least, spent = math.inf, 0.0
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        least, spent = min(least, seconds), spent + seconds
        if spent > _ENOUGH:
            break
    return least
