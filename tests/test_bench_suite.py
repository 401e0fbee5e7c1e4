"""The benchmark's suite: FLOPs, bytes and floors by formulas of their own; cases and peers."""

import itertools
import math

import numpy as np
import pytest

from benchmarks import cases, plain, suite
from benchmarks.suite import Shape, SuiteError, load, select

with open(suite.SUITE, "rb") as opened:
    ENTRIES = {e["name"]: e for e in suite.tomllib.load(opened)["shape"]}
SHAPES = {s.name: s for s in load()}

every = pytest.mark.parametrize("name", ENTRIES)


def pair(value):
    return tuple(value) if isinstance(value, list) else (value, value)


def sizes(entry):
    """Return the output's rows and columns, by the formulas of PyTorch's documentation."""
    found = []
    for n, k, s, p, d in zip(
        entry["input"][:2],
        entry["kernel"],
        pair(entry.get("stride", 1)),
        pair(entry.get("padding", 0)),
        pair(entry.get("dilation", 1)),
        strict=True,
    ):
        if entry.get("transposed"):
            found.append((n - 1) * s - 2 * p + d * (k - 1) + 1)
        else:
            found.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
    return found


# ---------------------------------------------------------------------------------- the suite


def test_the_networks_are_there():
    networks = {e["network"].partition(",")[0] for e in ENTRIES.values()}
    for wanted in (
        "ResNet-50", "VGG-16", "MobileNetV2", "ConvNeXt-T", "Inception-v3", "DeepLabv3", "U-Net",
        "LeNet",
    ):  # fmt: skip
        assert any(n.startswith(wanted) for n in networks), wanted
    kinds = {s.kind for s in SHAPES.values()}
    assert kinds == set(suite.CLASSES)
    batches = {s.problem.batch for s in SHAPES.values()}
    assert min(batches) == 1
    assert max(batches) >= 32
    assert 6 <= len(select(SHAPES.values(), quick=True)) <= 12


@every
def test_flops_bytes_and_floor(name):
    entry, shape = ENTRIES[name], SHAPES[name]
    rows, columns = sizes(entry)
    batch, in_ch, out_ch = entry["batch"], entry["input"][2], entry["out_channels"]
    groups, taps = entry.get("groups", 1), math.prod(entry["kernel"])
    x = batch * math.prod(entry["input"])
    y = batch * rows * columns * out_ch
    w = taps * in_ch * out_ch // groups
    # Each input cell of a transposed layer meets each weight of its group once.
    products = (
        x * taps * out_ch // groups if entry.get("transposed") else y * taps * in_ch // groups
    )
    flops = {"forward": 2 * products, "train": 6 * products}
    flops["input_grad"] = flops["weight_grad"] = flops["forward"]
    b = 0 if entry.get("transposed") else out_ch
    moved = {
        "forward": x + w + b + y,
        # The backward reads dy, y, x and w and writes dx, dw and db.
        "train": (x + w + b + y) + (y + y + x + w) + (x + w + b),
        "input_grad": y + w + x,
        "weight_grad": y + x + w + b,
    }
    if entry.get("transposed"):
        moved["train"] = (x + w + y) + (y + w + x) + (y + x + w)
    for pass_ in suite.PASSES:
        assert shape.flops(pass_) == flops[pass_]
        for dtype, size in (("float32", 4), ("float64", 8)):
            typed = shape.with_dtype(dtype)
            assert typed.bytes(pass_) == size * moved[pass_]
            assert typed.floor(pass_, 3e11, 4e10) == pytest.approx(
                max(flops[pass_] / 3e11, size * moved[pass_] / 4e10)
            )


@every
def test_flops_are_pytorchs(name):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    entry = ENTRIES[name]
    rows, columns, in_ch = entry["input"]
    options = {
        "stride": pair(entry.get("stride", 1)),
        "padding": pair(entry.get("padding", 0)),
        "dilation": pair(entry.get("dilation", 1)),
        "groups": entry.get("groups", 1),
        "bias": False,
        "device": "meta",
    }
    transposed = entry.get("transposed", False)
    cls = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer = cls(in_ch, entry["out_channels"], tuple(entry["kernel"]), **options)
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.empty(entry["batch"], in_ch, rows, columns, device="meta"))
    assert counter.get_total_flops() == SHAPES[name].flops("forward")
    p = SHAPES[name].problem
    image = (p.batch, p.in_channels, *p.in_shape) if transposed else None
    assert tuple(y.shape) == (image or (p.batch, p.out_channels, *p.out_shape))


@every
def test_shapes_survive_json(name):
    shape = SHAPES[name].with_dtype("float64")
    assert Shape.from_json(shape.to_json()) == shape
    assert str(shape.problem.batch) in shape.describe()


def test_variations():
    shape = SHAPES["resnet50_conv2_3x3"]
    assert shape.with_batch(3).flops("forward") * 8 == shape.flops("forward") * 3
    assert shape.with_input(28, 56).flops("forward") * 2 == shape.flops("forward")
    with pytest.raises(ValueError, match="not transposed"):
        SHAPES["unet_up_28"].with_input(28, 28)
    with pytest.raises(ValueError, match="pass is 'backward'; expected one of forward"):
        shape.flops("backward")


def test_selections():
    names = [s.name for s in select(SHAPES.values(), ["vgg16_*", "lenet_conv1"])]
    assert names == [n for n in ENTRIES if n.startswith("vgg16_") or n == "lenet_conv1"]
    quick = select(SHAPES.values(), ["resnet50_*"], quick=True)
    assert quick
    assert all("quick" in s.tags and s.name.startswith("resnet50") for s in quick)
    with pytest.raises(SuiteError, match="no shape is called 'alexnet'; the suite has resnet50"):
        select(SHAPES.values(), ["alexnet"])


GOOD = 'name="a"\nbatch=1\ninput=[4,4,2]\nout_channels=4\nkernel=[3,3]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"should consist of \[\[shape\]\] entries"),
        ("x = 1\n[[shape]]\n" + GOOD, r"should consist of \[\[shape\]\] entries"),
        ("[[shape]\n", "is not TOML"),
        ("[[shape]]\nbatch = 1\n", "has no name"),
        (f"[[shape]]\n{GOOD}[[shape]]\n{GOOD}", "names twice: a"),
        (f"[[shape]]\n{GOOD}strides = 1\n", "a: unknown strides"),
        ('[[shape]]\nname="a"\nbatch=1\n', "a: input, kernel, out_channels is missing"),
        (f"[[shape]]\n{GOOD}stride = 0\n", "a: stride is 0; expected an integer of at least 1"),
        (f"[[shape]]\n{GOOD}padding = [1]\n", r"a: padding is \[1\]; expected 2 integers"),
        (f"[[shape]]\n{GOOD}groups = 3\n", "a: 3 groups do not divide 2 and 4"),
        (f"[[shape]]\n{GOOD}dilation = 4\n", "a: the kernel is larger than the padded input"),
        (f"[[shape]]\n{GOOD}transposed = 1\n", "a: transposed is 1; expected true or false"),
        (f"[[shape]]\n{GOOD}tags = 'quick'\n", "a: tags is 'quick'; expected a list of strings"),
        (f"[[shape]]\n{GOOD}".replace("[4,4,2]", "4"), r"a: input is 4; expected \[rows"),
        (f"[[shape]]\n{GOOD}".replace("batch=1", "batch=true"), "a: batch is True; expected"),
    ],
)  # fmt: skip
def test_wrong_suites(tmp_path, text, message):
    file = tmp_path / "suite.toml"
    file.write_text(text)
    with pytest.raises(SuiteError, match=message):
        load(file)


def test_no_suite(tmp_path):
    with pytest.raises(SuiteError, match=r"none\.toml cannot be read: No such file"):
        load(tmp_path / "none.toml")


# --------------------------------------------------------------------------- cases and peers

SMALL = """
[[shape]]
name = "plain"
batch = 2
input = [7, 6, 3]
out_channels = 4
kernel = [3, 2]
stride = [2, 1]
padding = [1, 2]
dilation = [1, 2]
[[shape]]
name = "grouped"
batch = 2
input = [5, 6, 4]
out_channels = 6
kernel = [3, 3]
padding = 1
groups = 2
[[shape]]
name = "transposed"
batch = 2
input = [4, 3, 4]
out_channels = 3
kernel = [2, 2]
stride = 2
transposed = true
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("suite") / "suite.toml"
    file.write_text(SMALL)
    return {s.name: s.with_dtype("float64") for s in load(file)}


def by_definition(shape, x, w, b, dz):
    """Return the convolution and its gradients by a loop over single products."""
    p = shape.problem
    y, dx, dw = np.zeros(p.y_shape), np.zeros(p.x_shape), np.zeros(p.w_shape)
    in_group, out_group = p.in_channels // p.groups, p.out_channels // p.groups
    for n, i, j, c in itertools.product(*map(range, p.y_shape)):
        for k, m, q in itertools.product(*map(range, (*p.kernel, in_group))):
            row = i * p.stride[0] + k * p.dilation[0] - p.padding[0][0]
            column = j * p.stride[1] + m * p.dilation[1] - p.padding[1][0]
            if 0 <= row < p.in_shape[0] and 0 <= column < p.in_shape[1]:
                at = n, row, column, c // out_group * in_group + q
                y[n, i, j, c] += x[at] * w[k, m, q, c]
                dx[at] += dz[n, i, j, c] * w[k, m, q, c]
                dw[k, m, q, c] += dz[n, i, j, c] * x[at]
    if b is not None:
        y += b
    return y, dx, dw, dz.sum((0, 1, 2))


@pytest.mark.parametrize("name", ["plain", "grouped", "transposed"])
def test_cases_hold_the_definitions_results(small, name, monkeypatch):
    shape = small[name]
    made = {"default": cases.make(shape, 3)}
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)  # as without PyTorch
        made["without PyTorch"] = cases.make(shape, 3)
    for case in made.values():
        z, dx, dw, db = by_definition(shape, case.x, case.w, case.b, case.dz)
        y = np.maximum(z, 0) if case.relu else z
        want = {"y": y, "dx": dx, "dw": dw} | ({} if case.b is None else {"db": db})
        assert set(case.expected) == set(want)
        for key, value in want.items():
            assert cases.compare(case.expected[key], value) < 1e-13
        if case.relu:
            np.testing.assert_array_equal(case.dz, case.dy * (z > 0))
        # PyTorch returns views in its own axes' order; the values are those of the same seed.
        np.testing.assert_array_equal(case.x, made["default"].x)


@pytest.mark.parametrize("name", ["plain", "grouped", "transposed"])
def test_plain_ways_are_right(small, name):
    shape = small[name]
    p, case = shape.problem, cases.make(shape, 5)
    z, dx, dw, db = by_definition(shape, case.x, case.w, case.b, case.dz)
    ways = [
        (
            plain.loops_forward(p, case.x, case.w, case.b, False, 60.0),
            plain.loops_backward(p, case.dz, case.x, case.w, 60.0),
        )
    ]
    if p.groups == 1:
        ways.append(
            (
                plain.im2col_forward(p, case.x, case.w, case.b, False),
                plain.im2col_backward(p, case.dz, case.x, case.w),
            )
        )
        columns = plain._im2col(p, case.x)
        assert columns.nbytes == plain.columns_bytes(p, 8)
    for forward, gradients in ways:
        for got, want in zip((forward, *gradients), (z, dx, dw, db), strict=True):
            assert cases.compare(got, want) < 1e-13


def test_plain_ways_leave_out_what_is_not_needed(small):
    p, case = small["plain"].problem, cases.make(small["plain"])
    for backward in (
        lambda needs: plain.im2col_backward(p, case.dz, case.x, case.w, needs),
        lambda needs: plain.loops_backward(p, case.dz, case.x, case.w, 60.0, needs),
    ):
        for needs in ("x", "w", "b", "wb"):
            found = backward(needs)
            assert [g is not None for g in found] == [n in needs for n in "xwb"]


def test_loops_give_up(small):
    p, case = small["plain"].problem, cases.make(small["plain"])
    with pytest.raises(plain.TooSlow, match="more than 1e-07 s"):
        plain.loops_forward(p, case.x, case.w, case.b, True, 1e-7)
    with pytest.raises(plain.TooSlow):
        plain.loops_backward(p, case.dz, case.x, case.w, 1e-7)


def test_cases_on_disk(small, tmp_path):
    case = cases.make(small["plain"], 1)
    case.save(tmp_path)
    again = cases.Case.load(tmp_path, small["plain"])
    for name in ("x", "w", "b", "dy", "dz"):
        np.testing.assert_array_equal(getattr(again, name), getattr(case, name))
    assert set(again.expected) == {"y", "dx", "dw", "db"}


def test_comparison():
    a = np.array([1.0, -4.0])
    assert cases.compare(a, a) == 0
    assert cases.compare(np.array([1.5, -4.0], "f4"), a) == 0.125
    assert cases.compare(np.array([1.0]), a) == math.inf
    assert cases.compare(np.array([1.0, np.nan]), a) == math.inf
    assert cases.compare(np.array([1.0, np.inf]), a) == math.inf
    shape = SHAPES["resnet50_conv2_3x3"]
    assert cases.tolerance(shape, "y") == pytest.approx(1e-5 * 24)
    assert cases.tolerance(shape, "dx", 10) == pytest.approx(1e-4 * 24)
    assert cases.tolerance(shape, "dw") == pytest.approx(1e-5 * 56 * math.sqrt(8))
    assert cases.tolerance(shape.with_dtype("float64"), "dw", 10) == 1e-11
