"""Initial weights: fans, bounds, variances, seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuconv import activations, initializers
from gpuconv.initializers import fans, generator, get_initializer, glorot_gain

NAMES = [
    "glorot_uniform", "glorot_normal", "he_uniform", "he_normal", "std_normal", "trunc_normal",
    "zeros",
]  # fmt: skip
#: A shape with enough values to tell a variance, its fans, and its groups.
SHAPES = [
    ((300, 400), 1, (300, 400)),
    ((3, 3, 64, 128), 1, (9 * 64, 9 * 128)),
    ((5, 1, 16, 512), 4, (5 * 16, 5 * 128)),
    ((3, 3, 1, 8192), 8192, (9, 9)),
]

sized = pytest.mark.parametrize(("shape", "groups", "want"), SHAPES, ids=lambda v: str(v))
small = st.integers(1, 6)


def variance(name: str, fan_in: int, fan_out: int, gain: float) -> float:
    if name.startswith("glorot"):
        return gain**2 * 2 / (fan_in + fan_out)
    if name.startswith("he"):
        return 2 / fan_in
    # Of a standard normal distribution, whole or cut off at two standard deviations.
    density, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    return {"std_normal": 1.0, "trunc_normal": 1 - 4 * density / inside, "zeros": 0.0}[name]


@sized
@pytest.mark.parametrize("gain", [1.0, 5 / 3])
@pytest.mark.parametrize("name", NAMES)
def test_mean_and_variance(name, shape, groups, want, gain):
    w = get_initializer(name)(shape, 7, gain=gain, groups=groups)
    assert w.shape == shape
    assert w.dtype == np.float64
    expected = variance(name, *want, gain)
    error = 6 / math.sqrt(w.size)
    assert abs(w.mean()) <= error * math.sqrt(expected)
    assert w.var() == pytest.approx(expected, rel=2 * error)


@sized
@pytest.mark.parametrize("name", ["glorot_uniform", "he_uniform", "trunc_normal"])
def test_bounds(name, shape, groups, want):
    w = get_initializer(name)(shape, 3, groups=groups)
    bound = 2.0 if name == "trunc_normal" else math.sqrt(3 * variance(name, *want, 1.0))
    assert abs(w).max() <= bound
    assert abs(w).max() >= 0.99 * bound
    if name != "trunc_normal":
        counts = np.histogram(w, 10, (-bound, bound))[0]
        assert counts.min() > 0.9 * w.size / 10


@pytest.mark.parametrize("name", ["glorot_normal", "he_normal", "std_normal"])
def test_normal_ones_have_tails(name):
    w = get_initializer(name)((300, 400), 0)
    beyond = (abs(w) > 2 * w.std()).mean()
    assert beyond == pytest.approx(1 - math.erf(math.sqrt(2)), rel=0.1)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("glorot_uniform", "xavier_uniform_"), ("glorot_normal", "xavier_normal_"),
     ("he_uniform", "kaiming_uniform_"), ("he_normal", "kaiming_normal_")],
)  # fmt: skip
def test_spread_is_pytorchs(name, theirs):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    made = torch.empty(128, 64, 3, 3)  # (out, in, rows, columns)
    options = {"nonlinearity": "relu"} if name.startswith("he") else {}
    getattr(torch.nn.init, theirs)(made, **options)
    w = get_initializer(name)((3, 3, 64, 128), 0)
    assert w.std() == pytest.approx(float(made.std()), rel=0.02)
    if name.endswith("uniform"):
        assert abs(w).max() == pytest.approx(float(made.abs().max()), rel=1e-3)


@pytest.mark.parametrize(
    ("activation", "theirs"),
    [(activations.Tanh(), ("tanh",)), (activations.ReLU(), ("relu",)),
     (activations.LeakyReLU(0.2), ("leaky_relu", 0.2)), (activations.Identity(), ("linear",)),
     (activations.Sigmoid(), ("sigmoid",))],
    ids=str,
)  # fmt: skip
def test_gains_are_pytorchs(activation, theirs):
    torch = pytest.importorskip("torch")
    assert glorot_gain(activation) == pytest.approx(torch.nn.init.calculate_gain(*theirs))


@given(st.lists(small, min_size=2, max_size=5), small)
def test_fans_by_counting(shape, groups):
    *kernel, n_in, per_group = shape
    n_out = per_group * groups
    fan_in, fan_out = fans((*kernel, n_in, n_out), groups)
    # Weights that touch one output, and those that one input channel touches in its group.
    assert fan_in == math.prod(kernel) * n_in
    assert fan_out == math.prod(kernel) * per_group
    assert fan_in * n_out == math.prod((*kernel, n_in, n_out))


@pytest.mark.parametrize("name", NAMES)
def test_seeds(name):
    f = get_initializer(name)
    shape = (3, 3, 4, 5)
    np.testing.assert_array_equal(f(shape, 5), f(shape, 5))
    np.testing.assert_array_equal(f(shape, 5), f(shape, np.random.default_rng(5)))
    if name != "zeros":
        assert (f(shape, 5) != f(shape, 6)).any()
        assert (f(shape) != f(shape)).any()
        rng = np.random.default_rng(5)
        assert (f(shape, rng) != f(shape, rng)).any()


def test_global_generator_is_left_alone():
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for name in NAMES:
        get_initializer(name)((4, 4))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_gain_scales_glorot_only():
    for name in NAMES:
        f = get_initializer(name)
        factor = 3.0 if name.startswith("glorot") else 1.0
        np.testing.assert_allclose(
            f((4, 5), 1, gain=3.0), factor * f((4, 5), 1), rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("rng", [1.5, "7", True, [1], np.random])
def test_wrong_seeds(rng):
    with pytest.raises(TypeError, match=r"^rng is .*; expected a numpy.random.Generator, a seed"):
        generator(rng)


def test_negative_seed():
    with pytest.raises(ValueError, match=r"^rng is -1; expected"):
        generator(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "error"),
    [((3,), ValueError), ((), ValueError), ((0, 3), ValueError), ((3, 4.0), TypeError),
     (3, TypeError), ((3, -1), ValueError), (None, TypeError), (("a", 2), TypeError)],
)  # fmt: skip
def test_wrong_shapes(name, shape, error):
    with pytest.raises(error, match=r"^shape is .*; expected two or more positive integers$"):
        get_initializer(name)(shape, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("groups", "error"), [(3, ValueError), (0, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_wrong_groups(name, groups, error):
    with pytest.raises(error, match=r"^groups is .*; expected"):
        get_initializer(name)((3, 3, 2, 8), 0, groups=groups)


@pytest.mark.parametrize("name", ["glorot_uniform", "glorot_normal"])
def test_wrong_gain(name):
    with pytest.raises(ValueError, match=r"^gain is nan; expected a finite number"):
        get_initializer(name)((3, 3), 0, gain=math.nan)


def test_names():
    assert set(NAMES) == set(initializers._BY_NAME)
    for name in NAMES:
        assert get_initializer(name) is getattr(initializers, name)
    with pytest.raises(ValueError, match="init is 'xavier'; expected one of glorot_uniform, "):
        get_initializer("xavier")
    with pytest.raises(TypeError, match=r"^init is .*; expected one of"):
        get_initializer(initializers.zeros)
