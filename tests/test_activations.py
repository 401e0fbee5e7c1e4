"""Activations against PyTorch, central differences, and what numpy-ml prints and computes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gpuconv
from gpuconv import activations as act
from gpuconv import elementwise, normal
from gpuconv.activations import Activation, get_activation

ALL = [
    act.Identity(), act.Affine(), act.Affine(-1.5, 0.25), act.ReLU(), act.LeakyReLU(),
    act.LeakyReLU(0.1), act.ELU(), act.ELU(0.5), act.SELU(), act.GELU(), act.GELU(False),
    act.Tanh(), act.Sigmoid(), act.HardSigmoid(), act.SoftPlus(), act.Exponential(),
]  # fmt: skip
INVERTIBLE = [a for a in ALL if not isinstance(a, act.GELU)]
#: Away from 0 and from where HardSigmoid bends.
POINTS = np.concatenate([np.linspace(-9, 9, 61) + 0.013, [-2.4, 2.4, -2.6, 2.6, -1e-3, 1e-3]])

each = pytest.mark.parametrize("a", ALL, ids=str)


def by_torch(a: Activation):
    """Return PyTorch's function of the same values."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    return {
        act.Identity: lambda z: z * 1,
        act.Affine: lambda z: a.slope * z + a.intercept,
        act.ReLU: f.relu,
        act.LeakyReLU: lambda z: f.leaky_relu(z, a.alpha),
        act.ELU: lambda z: f.elu(z, a.alpha),
        act.SELU: f.selu,
        act.GELU: lambda z: f.gelu(z, approximate="tanh" if a.approximate else "none"),
        act.Tanh: torch.tanh,
        act.Sigmoid: torch.sigmoid,
        # PyTorch's hardsigmoid has a slope of 1/6; this one is numpy-ml's and Keras's.
        act.HardSigmoid: lambda z: torch.clip(0.2 * z + 0.5, 0, 1),
        act.SoftPlus: lambda z: f.softplus(z, threshold=1e3),
        act.Exponential: torch.exp,
    }[type(a)]


@each
def test_values_and_derivatives_are_pytorchs(a):
    torch = pytest.importorskip("torch")
    z = torch.tensor(POINTS, requires_grad=True)
    y = by_torch(a)(z)
    (slope,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    np.testing.assert_allclose(a.fn(POINTS), y.detach(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(a.grad(POINTS), slope.detach(), rtol=1e-11, atol=1e-13)
    if slope.requires_grad:
        (curve,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
        curve = torch.zeros_like(z) if curve is None else curve
        np.testing.assert_allclose(a.grad2(POINTS), curve, rtol=1e-9, atol=1e-11)
    else:
        np.testing.assert_array_equal(a.grad2(POINTS), np.zeros_like(POINTS))


@each
def test_derivatives_are_central_differences(a):
    h = 1e-5
    slope = (a.fn(POINTS + h) - a.fn(POINTS - h)) / (2 * h)
    np.testing.assert_allclose(a.grad(POINTS), slope, rtol=1e-6, atol=1e-7)
    curve = (a.grad(POINTS + h) - a.grad(POINTS - h)) / (2 * h)
    np.testing.assert_allclose(a.grad2(POINTS), curve, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("a", INVERTIBLE, ids=str)
def test_derivative_from_the_output(a):
    assert a.invertible
    np.testing.assert_allclose(
        a.grad_from_output(a.fn(POINTS)), a.grad(POINTS), rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize("a", [a for a in ALL if a.by_sign], ids=str)
def test_sign_of_argument_and_output_are_one(a):
    np.testing.assert_array_equal(a.grad_from_output(POINTS), a.grad_from_output(a.fn(POINTS)))


def test_gelu_has_no_derivative_from_its_output():
    for a in (act.GELU(), act.GELU(False)):
        assert not a.invertible
        with pytest.raises(ValueError, match=r"GELU.*does not follow from its output.*ReLU"):
            a.grad_from_output(POINTS)


@each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_is_kept(a, dtype):
    eps = 2**-7
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    else:
        eps = np.finfo(dtype).eps
    z = POINTS[abs(POINTS) < 3].astype(dtype)
    kept = z.copy()
    y = a.fn(z)
    wide = z.astype("float64")
    # bfloat16 is computed in float32 and rounded once.
    tolerance = (0.5 + 1e-4 if dtype == "bfloat16" else 8) * eps
    out = np.zeros_like(z)
    assert a.fn(z, out=out) is out
    np.testing.assert_array_equal(out, y)
    pairs = [(y, a.fn(wide)), (a.grad(z), a.grad(wide)), (a.grad2(z), a.grad2(wide))]
    if a.invertible:
        pairs.append((a.grad_from_output(y), a.grad_from_output(y.astype("float64"))))
    for got, want in pairs:
        assert got.dtype == dtype
        scale = max(1, abs(want).max())
        got = got.astype("float64")
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)
    np.testing.assert_array_equal(z, kept)


@each
def test_out(a):
    want = a.fn(POINTS)
    out = np.full_like(POINTS, np.nan)
    assert a.fn(POINTS, out=out) is out
    np.testing.assert_array_equal(out, want)
    z = POINTS.copy()
    assert a.fn(z, out=z) is z
    np.testing.assert_array_equal(z, want)


@each
def test_nan_stays(a):
    z = np.array([np.nan, 1.0])
    np.testing.assert_array_equal(np.isnan(a.fn(z)), [True, False])
    if isinstance(a, (act.ELU, act.SELU, act.GELU, act.Tanh, act.Sigmoid, act.SoftPlus)):
        np.testing.assert_array_equal(np.isnan(a.grad(z)), [True, False])
        np.testing.assert_array_equal(np.isnan(a.grad2(z)), [True, False])


@each
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_large_arguments(a, dtype):
    big = np.finfo(dtype).max / 4
    z = np.array([-big, -1e4, -750.0, 750.0, 1e4, big], dtype)
    z = z[:3] if isinstance(a, act.Exponential) else z
    # A warning (overflow, 0 * inf) is an error.
    for values in (a.fn(z), a.grad(z), a.grad2(z)):
        assert np.isfinite(values).all()
    if a.invertible:
        assert np.isfinite(a.grad_from_output(a.fn(z))).all()
    assert (a.grad2(z) == 0).all()


@each
def test_one_example_of_one_axis(a):
    np.testing.assert_array_equal(a(POINTS), a.fn(POINTS)[None])
    square = POINTS[:6].reshape(2, 3)
    np.testing.assert_array_equal(a(square), a.fn(square))


def test_exact_gelu_is_the_normal_distributions():
    want = [0.5 * (1 + math.erf(z / math.sqrt(2))) * z for z in POINTS]
    np.testing.assert_allclose(act.GELU(False).fn(POINTS), want, rtol=1e-13, atol=1e-300)


@given(hnp.arrays("float64", 50, elements=st.floats(-30, 30)))
def test_error_function(x):
    want = [math.erf(v) for v in x]
    np.testing.assert_allclose(normal.erf(x), want, rtol=1e-15, atol=1e-300)


@given(hnp.arrays("float64", 30, elements=st.floats(-40, 40)))
def test_monotone_but_for_gelu(z):
    z.sort()
    for a in ALL:
        if not isinstance(a, act.GELU) and a != act.Affine(-1.5, 0.25):
            y = a.fn(z)
            assert (np.diff(y) >= -1e-15 * abs(y[1:])).all(), str(a)


# -------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "want"),
    [
        # As numpy-ml prints them.
        ("Identity", act.Identity()),
        ("Affine(slope=1, intercept=0)", act.Affine(1, 0)),
        ("ReLU", act.ReLU()),
        ("Leaky ReLU(alpha=0.3)", act.LeakyReLU(0.3)),
        ("ELU(alpha=1.0)", act.ELU(1.0)),
        ("SELU", act.SELU()),
        ("GELU(approximate=True)", act.GELU(True)),
        ("Tanh", act.Tanh()),
        ("Sigmoid", act.Sigmoid()),
        ("Hard Sigmoid", act.HardSigmoid()),
        ("SoftPlus", act.SoftPlus()),
        ("Exponential", act.Exponential()),
        # As people write them.
        ("relu", act.ReLU()),
        ("LeakyReLU(alpha=0.1)", act.LeakyReLU(0.1)),
        ("leaky_relu(0.2)", act.LeakyReLU(0.2)),
        ("LeakyReLU()", act.LeakyReLU()),
        ("gelu(approximate=False)", act.GELU(False)),
        ("hard-sigmoid", act.HardSigmoid()),
        (None, act.Identity()),
        (act.ELU(0.7), act.ELU(0.7)),
    ],
)
def test_names(text, want):
    assert get_activation(text) == want


@each
def test_text_and_back(a):
    assert get_activation(str(a)) == a
    assert hash(get_activation(str(a))) == hash(a)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("Swish", ValueError, r"activation is 'Swish'; expected one of Identity, Affine, ReLU"),
        ("", ValueError, "expected one of"),
        ("ReLU(1)", ValueError, "its arguments do not fit ReLU"),
        ("LeakyReLU(beta=1)", ValueError, "its arguments do not fit LeakyReLU.*beta"),
        ("LeakyReLU(alpha=-1)", ValueError, r"alpha is -1; expected a finite number >= 0"),
        ("LeakyReLU(alpha='x')", ValueError, "alpha is 'x'; expected a finite number"),
        ("LeakyReLU(alpha=1e999)", ValueError, "alpha is inf"),
        ("GELU(approximate=3)", ValueError, "approximate is 3; expected True or False"),
        ("LeakyReLU(alpha=0.1", ValueError, "expected a name or a call"),
        ("LeakyReLU(alpha=x)", ValueError, "expected a name or a call"),
        (3, TypeError, "activation is 3; expected an Activation, its name, or None"),
        (act.ReLU, TypeError, "expected an Activation, its name, or None"),
    ],
)
def test_wrong_names(spec, error, message):
    with pytest.raises(error, match=message):
        get_activation(spec)


@pytest.mark.parametrize(
    ("make", "error"),
    [(lambda: act.ELU(-0.1), ValueError), (lambda: act.ELU("1"), TypeError),
     (lambda: act.Affine(float("nan")), ValueError), (lambda: act.Affine(1, None), TypeError),
     (lambda: act.LeakyReLU(True), TypeError), (lambda: act.GELU(None), TypeError)],
)  # fmt: skip
def test_wrong_parameters(make, error):
    with pytest.raises(error, match="expected"):
        make()


# ------------------------------------------------------------------------------ whole arrays

#: More than the workers' blocks, and no multiple of anything.
MANY = 2 * elementwise.BLOCK + 12_345


@each
def test_many_values_are_pytorchs_in_float32(a):
    """Values and gradients of arrays that are divided among workers and into blocks."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(3)
    z = (4 * random.standard_normal(MANY)).astype("f4")
    z[[0, 5, elementwise.BLOCK, MANY - 1]] = 0, -0.0, 1e-30, -1e-30
    dy = random.standard_normal(MANY).astype("f4")
    wide = torch.tensor(z.astype("f8"), requires_grad=True)
    want = by_torch(a)(wide)
    (grad,) = torch.autograd.grad(want, wide, torch.tensor(dy.astype("f8")))
    bend = np.isclose(abs(z), 2.5, atol=1e-5) if isinstance(a, act.HardSigmoid) else z == np.inf
    y = a.fn(z)
    scale = np.maximum(1, abs(want.detach().numpy()))
    assert (abs(y - want.detach().numpy()) / scale).max() < 1e-6
    given = {"x": z} if not a.invertible else {"y": y}
    for dx in (a.backward(dy, **given), a.backward(dy, z)):
        assert dx.dtype == "float32"
        scale = np.maximum(1, abs(grad.numpy()))
        assert (abs(dx - grad.numpy()) / scale)[~bend].max() < 1e-5
    again = dy.copy()
    assert a.backward(again, z, out=again) is again
    np.testing.assert_array_equal(again, dx)


@each
def test_one_worker_or_two_give_the_same_bits(a):
    z = np.random.default_rng(4).standard_normal((3, MANY // 3)).astype("f4")
    results = []
    for count in (1, 2):
        gpuconv.set_num_threads(count)
        try:
            results.append((a.fn(z), a.grad(z), a.fn(z.T).T, a.backward(z, z)))
        finally:
            gpuconv.set_num_threads(None)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(results[0][0], results[0][2])


def test_gradients_need_what_they_are_made_of():
    with pytest.raises(ValueError, match="x and y are None"):
        act.ReLU().backward(POINTS)
    with pytest.raises(ValueError, match="does not follow from its output"):
        act.GELU().backward(POINTS, y=POINTS)


@pytest.mark.parametrize("a", INVERTIBLE, ids=str)
def test_gradients_are_products_with_the_derivative(a):
    y = a.fn(POINTS)
    dy = np.cos(POINTS)
    np.testing.assert_allclose(a.backward(dy, y=y), dy * a.grad_from_output(y), rtol=1e-14)
    np.testing.assert_allclose(a.backward(dy, POINTS), dy * a.grad(POINTS), rtol=1e-14)
    half = a.backward(dy.astype("f2"), y=y.astype("f2"))
    assert half.dtype == "float16"
