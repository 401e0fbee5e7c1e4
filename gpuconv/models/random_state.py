"""The random generators of a network's dropouts as JSON values, so that a run goes on exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpuconv.layers import Dropout

__all__ = ["load_random_state", "random_state"]

#: NumPy's own, by the name that their states give; nothing else is made from a file.
_KINDS: dict[str, type[np.random.BitGenerator]] = {
    kind.__name__: kind
    for kind in (
        np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64,
    )
}  # fmt: skip


def random_state(dropouts: Sequence[Dropout]) -> dict[str, Any]:
    """Return ``{"dropouts": [...], "generators": [...]}`` as JSON values.

    The first lists for each dropout the number of its generator in the second, where one that
    several share stands once.

    Raises
    ------
    TypeError
        If a generator is over none of NumPy's bit generators.
    """
    found: dict[int, int] = {}
    numbers: list[int] = []
    states: list[Any] = []
    for dropout in dropouts:
        bits = dropout.generator.bit_generator
        if id(bits) not in found:
            if type(bits) not in _KINDS.values():
                raise TypeError(
                    f"a Dropout draws from a {type(bits).__name__}, whose state cannot be kept; "
                    f"expected one of {', '.join(_KINDS)}"
                )
            found[id(bits)] = len(states)
            states.append(_plain(bits.state))
        numbers.append(found[id(bits)])
    return {"dropouts": numbers, "generators": states}


def load_random_state(dropouts: Sequence[Dropout], state: Any) -> None:
    """Give the dropouts generators as they were when :func:`random_state` returned ``state``.

    Raises
    ------
    ValueError
        If it is not that of as many dropouts; nothing is changed then.
    """
    if not isinstance(state, Mapping) or set(state) != {"dropouts", "generators"}:
        raise ValueError("random is no mapping of dropouts and generators")
    numbers, states = state["dropouts"], state["generators"]
    if not isinstance(numbers, (list, tuple)) or not isinstance(states, (list, tuple)):
        raise ValueError("random's dropouts and generators are no lists")
    if len(numbers) != len(dropouts):
        raise ValueError(f"random has {len(numbers)} dropouts; expected {len(dropouts)}")
    made = [_generator(k, part) for k, part in enumerate(states)]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(made):
            raise ValueError(f"random's dropouts name {number!r}; it has {len(made)} generators")
    for dropout, number in zip(dropouts, numbers, strict=True):
        dropout.generator = made[number]


def _generator(k: int, state: Any) -> np.random.Generator:
    name = state.get("bit_generator") if isinstance(state, Mapping) else None
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"random's generator {k} is {name!r}; expected one of {', '.join(_KINDS)}")
    bits = _KINDS[name](0)
    try:
        bits.state = state
        same = _plain(bits.state) == dict(state)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        same = False
    if not same:  # too large a number, one too many: what NumPy does not refuse
        raise ValueError(f"random's generator {k} is no state of a {name}")
    return np.random.Generator(bits)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
