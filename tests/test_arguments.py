"""Checks of arguments, and specs in text."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuconv.arguments import boolean, integer, normal_name, pair, parse_call, real

KNOWN = {"thing": 1, "leakyrelu": 2}


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3)])
def test_integers(value):
    got = integer("n", value, 0)
    assert got == 3
    assert type(got) is int


@pytest.mark.parametrize("value", [True, np.True_, 3.0, "3", None, [3], np.float32(3)])
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match=r"^n is .*; expected an integer of at least 0$"):
        integer("n", value, 0)


@given(st.integers(), st.integers())
def test_the_least_integer(value, least):
    if value >= least:
        assert integer("n", value, least) == value
    else:
        with pytest.raises(ValueError, match=re.escape(f"n is {value}; expected what I say")):
            integer("n", value, least, "what I say")


@pytest.mark.parametrize(
    ("value", "want"), [(2, (2, 2)), ((1, 4), (1, 4)), ([np.int32(5), 6], (5, 6))]
)
def test_pairs(value, want):
    assert pair("stride", value, 1) == want


@pytest.mark.parametrize(
    ("value", "error"),
    [((1, 2, 3), ValueError), ((), ValueError), ((1, 0), ValueError), (0, ValueError),
     ((1, 2.0), TypeError), ("12", TypeError), (None, TypeError)],
)  # fmt: skip
def test_what_is_no_pair(value, error):
    with pytest.raises(error, match=r"^stride is .*an integer of at least 1, or two of them"):
        pair("stride", value, 1)


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.int64(1)])
def test_real_numbers(value):
    got = real("lr", value, 0, 1)
    assert got == value
    assert type(got) is float


@pytest.mark.parametrize("value", [True, "1", None, 1j, np.complex64(1), [1.0], np.True_])
def test_what_is_no_real_number(value):
    with pytest.raises(TypeError, match=r"^lr is .*; expected a finite number"):
        real("lr", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_real_numbers_are_finite(value):
    with pytest.raises(ValueError, match=r"expected a finite number$"):
        real("lr", value)


@given(st.floats(-2, 2), st.booleans(), st.booleans())
def test_bounds_of_real_numbers(value, above, below):
    inside = (value > 0 if above else value >= 0) and (value < 1 if below else value <= 1)
    if inside:
        assert real("p", value, 0, 1, above=above, below=below) == value
    else:
        limits = f"{'>' if above else '>='} 0 and {'<' if below else '<='} 1"
        with pytest.raises(ValueError, match=re.escape(f"expected a finite number {limits}")):
            real("p", value, 0, 1, above=above, below=below)


def test_booleans():
    assert boolean("b", np.True_) is True
    assert boolean("b", False) is False
    for value in (0, 1, "yes", None):
        with pytest.raises(TypeError, match=r"^b is .*; expected True or False$"):
            boolean("b", value)


@pytest.mark.parametrize("name", ["LeakyReLU", "leaky_relu", "Leaky ReLU", "leaky-relu"])
def test_names(name):
    assert normal_name(name) == "leakyrelu"
    assert parse_call("act", name, KNOWN, "all") == (2, [], {})


@pytest.mark.parametrize(
    ("text", "arguments", "options"),
    [
        ("thing()", [], {}),
        ("Thing(1, -2.5e-3)", [1, -0.0025], {}),
        ("thing(a=1, b='x', c=None, d=(1, 2), e=[True])", [],
         {"a": 1, "b": "x", "c": None, "d": (1, 2), "e": [True]}),
        ("thing(3, lr_scheduler=Cosine(total_steps=9, f=g(1)))", [3],
         {"lr_scheduler": "Cosine(total_steps=9, f=g(1))"}),
        ("thing(ConstantScheduler(lr=0.1))", ["ConstantScheduler(lr=0.1)"], {}),
    ],
)  # fmt: skip
def test_calls(text, arguments, options):
    assert parse_call("what", text, KNOWN, "all") == (1, arguments, options)


@pytest.mark.parametrize(
    "text",
    ["thing(", "thing(1", "thing(1))", "thing(1)(2)", "thing(1) + 1", "thing(x)",
     "thing(x.y)", "thing(**{'a': 1})", "thing(*[1])", "thing(a=1, a=2)", "thing(1 if 1 else 2)",
     "thing(1); thing(2)", "thing(1)\nthing(2)", "thing(a=[i for i in 'x'])", "thing(\0)",
     "thing(f'{1}')", "thing(" + "[" * 5000 + ")", "thing(lambda: 1)"],
)  # fmt: skip
def test_what_is_no_call(text):
    with pytest.raises(ValueError, match=r"^what is .*; expected a name or a call such as"):
        parse_call("what", text, KNOWN, "all")


@pytest.mark.parametrize(
    "text", ["", "(", "()", "thing)", "unknown", "unknown(1)", "thin", "thing2"]
)
def test_unknown_names(text):
    with pytest.raises(ValueError, match=r"^what is .*; expected one of A, B$"):
        parse_call("what", text, KNOWN, "A, B")


def test_nothing_is_executed(tmp_path):
    place = tmp_path / "made"
    text = f"thing(open({str(place)!r}, 'w'))"
    assert parse_call("what", text, KNOWN, "all")[1] == [text[len("thing(") : -1]]
    with pytest.raises(ValueError, match="expected a name or a call"):
        parse_call("what", f"thing(a=1 + (open({str(place)!r}, 'w') and 1))", KNOWN, "all")
    assert not place.exists()


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    for spec in (text, f"thing({text}", f"thing({text})"):
        try:
            found = parse_call("what", spec, KNOWN, "all")
        except ValueError as error:
            found = str(error)
        if isinstance(found, str):
            assert found.startswith("what is ")
        else:
            assert found[0] in (1, 2)
            assert all(isinstance(k, str) for k in found[2])
