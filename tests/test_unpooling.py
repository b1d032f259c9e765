"""Switches and unpooling against PyTorch's own pooling, and where the two leave PyTorch behind."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deconvnet.unpooling import (
    MaxPool2dWithSwitches,
    Unpool2d,
    indices_to_switches,
    max_pool2d_with_switches,
    switches_to_indices,
    unpool2d,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def pooling_problems(draw, dtypes=tuple(DTYPES)):
    """A map to pool, batched or not, in either memory format, and the window's side.

    Half of the maps hold five small integers, so that ties abound; some hold NaN or infinities.
    """
    kernel_size = draw(st.integers(1, 5))
    height, width = (draw(st.integers(kernel_size, kernel_size * 3 + 1)) for _ in range(2))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), height, width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        x = torch.randint(-2, 3, shape, generator=generator).float()
    for special in draw(st.sets(st.sampled_from([float("nan"), float("inf"), -float("inf")]))):
        x[torch.rand(shape, generator=generator) < 0.3] = special
    x = x.to(draw(st.sampled_from(dtypes)))
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    if draw(st.booleans()):
        x = x[0]
    return x, kernel_size


def assert_same(actual, expected):
    """Equal to the last bit, NaN included, zeros of either sign being the same."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


# --- equal to PyTorch -----------------------------------------------------------------------


@given(pooling_problems())
def test_pooling_equals_pytorch(problem):
    x, kernel_size = problem
    pooled, switches = max_pool2d_with_switches(x, kernel_size)
    expected, indices = F.max_pool2d(x, kernel_size, return_indices=True)
    assert_same(pooled, expected)
    assert switches.dtype == torch.uint8
    size = tuple(x.shape[-2:])
    assert torch.equal(switches_to_indices(switches, size, kernel_size), indices)
    assert torch.equal(indices_to_switches(indices, size, kernel_size), switches)


@given(pooling_problems())
def test_unpooling_equals_pytorch(problem):
    x, kernel_size = problem
    size = tuple(x.shape[-2:])
    _, indices = F.max_pool2d(x, kernel_size, return_indices=True)
    values = torch.randn(indices.shape).to(x)
    unpooled = unpool2d(values, indices_to_switches(indices, size, kernel_size), size, kernel_size)
    assert unpooled.dtype == x.dtype
    assert_same(unpooled, F.max_unpool2d(values, indices, kernel_size, output_size=size))


@given(pooling_problems())
def test_gradients_equal_pytorch(problem):
    x, kernel_size = problem
    size = tuple(x.shape[-2:])
    ours, theirs = (x.detach().requires_grad_() for _ in range(2))

    pooled, switches = max_pool2d_with_switches(ours, kernel_size)
    unpooled = unpool2d(pooled * 3, switches, size, kernel_size)
    expected, indices = F.max_pool2d(theirs, kernel_size, return_indices=True)
    expected_unpooled = F.max_unpool2d(expected * 3, indices, kernel_size, output_size=size)

    weights = torch.randn(x.shape).to(x)
    unpooled.backward(weights)
    expected_unpooled.backward(weights)
    assert ours.grad.dtype == x.dtype
    assert_same(ours.grad, theirs.grad)


def test_nan_and_infinity_stay_in_their_place():
    values = torch.tensor([[[float("nan"), float("inf")]]])
    unpooled = unpool2d(values, torch.tensor([[[3, 0]]], dtype=torch.uint8))
    nan, inf = float("nan"), float("inf")
    assert_same(unpooled, torch.tensor([[[0.0, 0.0, inf, 0.0], [0.0, nan, 0.0, 0.0]]]))


def test_gradient_of_pooling_keeps_infinity_out_of_other_places():
    # The loss scaling of fp16 training looks for infinities: none may spread as 0 * inf = NaN.
    x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]], requires_grad=True)
    pooled, _ = max_pool2d_with_switches(x)
    pooled.backward(torch.tensor([[[float("inf")]]]))
    assert_same(x.grad, torch.tensor([[[0.0, 0.0], [float("inf"), 0.0]]]))


# --- by hand ----------------------------------------------------------------------------------


def test_the_example_of_the_module():
    x = torch.tensor([[[1, 2, 0, 0], [3, 4, 9, 0], [5, 0, 0, 7], [0, 0, 0, 0]]])
    pooled, switches = max_pool2d_with_switches(x.float())
    assert pooled.tolist() == [[[4, 9], [5, 7]]]
    assert switches.tolist() == [[[3, 2], [0, 1]]]
    unpooled = unpool2d(torch.tensor([[[20.0, 30.0], [40.0, 50.0]]]), switches)
    assert unpooled.tolist() == [[[0, 0, 0, 0], [0, 20, 30, 0], [40, 0, 0, 50], [0, 0, 0, 0]]]


def test_odd_sizes_return_to_the_size_they_had():
    x = torch.zeros(1, 1, 5, 7)
    x[0, 0, 3, 5] = 1  # the last full window of a 5 x 7 map
    pooled, switches = max_pool2d_with_switches(x)
    assert_same(unpool2d(pooled, switches, (5, 7)), x)
    assert unpool2d(pooled, switches).shape == (1, 1, 4, 6)


def test_the_largest_window_uses_the_whole_byte():
    x = torch.arange(256.0).reshape(1, 16, 16)
    pooled, switches = max_pool2d_with_switches(x, 16)
    assert pooled.item() == 255
    assert switches.item() == 255
    assert unpool2d(pooled, switches, kernel_size=16).argmax() == 255


def test_indices_of_a_map_wider_than_a_byte():
    x = torch.randn(1, 2, 5, 601)
    _, switches = max_pool2d_with_switches(x)
    _, indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(switches_to_indices(switches, (5, 601)), indices)
    assert torch.equal(indices_to_switches(indices, (5, 601)), switches)


def test_windows_of_one_pixel_change_nothing_and_share_nothing():
    x = torch.randn(1, 3, 3)
    pooled, switches = max_pool2d_with_switches(x, 1)
    assert_same(unpool2d(pooled, switches, kernel_size=1), x)
    assert pooled.data_ptr() != x.data_ptr()


def test_an_empty_batch_passes_through():
    pooled, switches = max_pool2d_with_switches(torch.zeros(0, 3, 6, 6))
    assert unpool2d(pooled, switches).shape == (0, 3, 6, 6)


def test_a_switch_out_of_range_drops_its_value_and_its_gradient_when_not_checked():
    values = torch.ones(1, 1, 1, requires_grad=True)
    unpooled = unpool2d(values, torch.full((1, 1, 1), 4, dtype=torch.uint8), check_range=False)
    unpooled.sum().backward()
    assert unpooled.sum() == 0
    assert values.grad.sum() == 0


# --- derivatives, checked numerically ----------------------------------------------------------


@pytest.fixture
def spread():
    """Distinct values far enough apart that a finite difference changes no maximum."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randperm(2 * 2 * 5 * 7, generator=generator).double() / 10).reshape(2, 2, 5, 7)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_derivatives_of_pooling(spread, kernel_size, check):
    x = spread.requires_grad_()
    # the square makes the second derivative something else than zero
    assert check(lambda x: max_pool2d_with_switches(x, kernel_size)[0] ** 2, (x,))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_derivatives_of_unpooling(spread, kernel_size, check):
    pooled, switches = max_pool2d_with_switches(spread, kernel_size)
    values = pooled.requires_grad_()
    assert check(lambda v: unpool2d(v, switches, (5, 7), kernel_size) ** 2, (values,))


def test_pooling_and_unpooling_are_adjoint(spread):
    pooled, switches = max_pool2d_with_switches(spread)
    values = torch.randn(pooled.shape, dtype=torch.float64)
    left = (pooled * values).sum()
    right = (spread * unpool2d(values, switches, (5, 7))).sum()
    torch.testing.assert_close(left, right)


def test_the_backward_pass_keeps_bytes_only():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pooled, switches = max_pool2d_with_switches(x)
        unpool2d(pooled, switches)
    assert {tensor.dtype for tensor in kept} == {torch.uint8}
    assert not switches.requires_grad


# --- where it runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_is_kept_forward_and_backward(dtype):
    x = torch.randn(2, 3, 9, 8, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    pooled, switches = max_pool2d_with_switches(x)
    unpooled = unpool2d(pooled, switches, (9, 8))
    (gradient,) = torch.autograd.grad(unpooled, x, torch.ones_like(unpooled))
    assert all(is_channels_last(t) for t in (pooled, switches, unpooled, gradient))


def test_views_with_any_strides():
    x = torch.randn(2, 9, 3, 8).transpose(1, 2)[..., ::2]
    pooled, switches = max_pool2d_with_switches(x)
    assert_same(pooled, F.max_pool2d(x, 2))
    expanded = torch.ones(1, 1, 1, 1).expand(pooled.shape)
    assert unpool2d(expanded, switches, (9, 4)).sum() == pooled.numel()


def test_deterministic_algorithms():
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        pooled, switches = max_pool2d_with_switches(x)
        unpool2d(pooled, switches).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad.sum() == pooled.numel()


def test_autocast():
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, switches = max_pool2d_with_switches(convolution(x))
        unpooled = unpool2d(pooled, switches)
        loss = convolution(unpooled[:, :3]).float().square().mean()
    assert pooled.dtype == unpooled.dtype == torch.bfloat16
    loss.backward()
    assert convolution.weight.grad.dtype == torch.float32
    assert convolution.weight.grad.abs().sum() > 0


def test_switches_of_another_device_are_refused():
    x = torch.randn(1, 1, 2, 2)
    elsewhere = torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="switches must be on cpu, as x is, got meta"):
        unpool2d(x, elsewhere)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype):
    x = torch.randn(2, 3, 9, 8, dtype=dtype)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for device in ("cpu", "cuda"):
            moved = x.detach().clone().to(device).requires_grad_()
            pooled, switches = max_pool2d_with_switches(moved)
            unpooled = unpool2d(pooled * 2, switches, (9, 8))
            unpooled.sum().backward()
            results.append([t.detach().cpu() for t in (pooled, switches, unpooled, moved.grad)])
    finally:
        torch.use_deterministic_algorithms(False)
    for on_cpu, on_cuda in zip(*results):
        assert_same(on_cuda, on_cpu)


class _PoolAndUnpool(nn.Module):
    """The pair as a network uses it: pooled, changed, put back at the size it had."""

    def __init__(self, kernel_size=2):
        super().__init__()
        self.pool = MaxPool2dWithSwitches(kernel_size)
        self.unpool = Unpool2d(kernel_size)

    def forward(self, x):
        pooled, switches = self.pool(x)
        return self.unpool(pooled * 2, switches, x.shape[-2:]), switches


def _ties_and_nan(shape):
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    x[0, 0, 0, :2] = float("nan")
    return x


def test_export():
    module, x = _PoolAndUnpool().eval(), _ties_and_nan((2, 3, 7, 8))
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}})
    x = _ties_and_nan((5, 3, 7, 8))
    for actual, expected in zip(program.module()(x), module(x)):
        assert_same(actual, expected)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_onnx(kernel_size):
    import onnxruntime

    module, x = _PoolAndUnpool(kernel_size).eval(), _ties_and_nan((2, 3, 7, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about versions of its own parts
        program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    model = io.BytesIO()
    program.save(model)
    session = onnxruntime.InferenceSession(model.getvalue(), providers=["CPUExecutionProvider"])
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for actual, expected in zip(results, module(x)):
        assert_same(torch.from_numpy(actual), expected)


def _gradients_of(function, x):
    x = x.clone().requires_grad_()
    unpooled, switches = function(x)
    unpooled.backward(torch.arange(unpooled.numel()).reshape(unpooled.shape).to(x))
    return unpooled.detach(), switches, x.grad


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (3, 5, 7)])
def test_compiled_graph(shape):
    # One whole graph, forward and backward, without a C++ compiler: what torch.compile would
    # hand to one runs eagerly.
    module = _PoolAndUnpool()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    for actual, expected in zip(_gradients_of(compiled, x), _gradients_of(module, x)):
        assert_same(actual, expected)


@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")),
    reason="torch.compile needs a C++ compiler on the CPU",
)
def test_compiled_code():
    module, x = _PoolAndUnpool(), _ties_and_nan((2, 3, 7, 8))
    for actual, expected in zip(torch.compile(module, fullgraph=True)(x), module(x)):
        assert_same(actual, expected)


# --- modules and errors -------------------------------------------------------------------------


def test_modules_say_what_they_are():
    assert repr(MaxPool2dWithSwitches(3)) == "MaxPool2dWithSwitches(kernel_size=3)"
    assert repr(Unpool2d()) == "Unpool2d(kernel_size=2, check_range=True)"
    assert not list(_PoolAndUnpool().state_dict())


MAP = torch.zeros(1, 32, 32)
VALUES = torch.zeros(1, 2, 3, 4)
SWITCHES = torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
INDICES = switches_to_indices(SWITCHES, (6, 8))


@pytest.mark.parametrize(
    ("error", "message", "function", "arguments"),
    [
        (ValueError, "kernel_size must be from 1 to 16, got 0", MaxPool2dWithSwitches, [0]),
        (TypeError, r"kernel_size must be an int, got \(2, 2\)", Unpool2d, [(2, 2)]),
        (ValueError, "from 1 to 16, got 17", max_pool2d_with_switches, [MAP, 17]),
        (ValueError, r"x must be \[N, C, .*got .*\(32, 32\)", max_pool2d_with_switches, [MAP[0]]),
        (ValueError, r"one 2 x 2 .*got .*\(1, 1, 32\)", max_pool2d_with_switches, [MAP[:, :1]]),
        (ValueError, r"x must be \[N, C, .*got .*\(3, 4\)", unpool2d, [VALUES[0, 0], SWITCHES]),
        (ValueError, r"x, \(1, 2, 3, 4\), got \(2, 3, 4\)", unpool2d, [VALUES, SWITCHES[0]]),
        (ValueError, r"x, \(1, 2, 3, 4\), got \(1, 1,", unpool2d, [VALUES, SWITCHES[:, :1]]),
        (TypeError, "must be uint8, got torch.int64; indices_to", unpool2d, [VALUES, INDICES]),
        (ValueError, "below 4 for kernel_size 2, got 8", unpool2d, [VALUES, SWITCHES + 8]),
        (ValueError, r"\(6, 8\) to \(7, 9\).*got \(5, 8\)", unpool2d, [VALUES, SWITCHES, (5, 8)]),
        (ValueError, r"to \(7, 9\).*got \(6, 10\)", unpool2d, [VALUES, SWITCHES, (6, 10)]),
        (ValueError, r"to \(11, 14\).*got \(9, 15\)", unpool2d, [VALUES, SWITCHES, (9, 15), 3]),
        (ValueError, r"output_size must be \(height,", unpool2d, [VALUES, SWITCHES, (1, 2, 6, 8)]),
        (ValueError, r"must be \(height, width\), got 6", unpool2d, [VALUES, SWITCHES, 6]),
        (ValueError, r"switches must be \[N, C", switches_to_indices, [SWITCHES[0, 0], (6, 8)]),
        (TypeError, "uint8, got torch.float32", switches_to_indices, [VALUES, (6, 8)]),
        (ValueError, "below 4 .*, got 4", switches_to_indices, [SWITCHES + 4, (6, 8)]),
        (ValueError, r"input_size must be from \(6", switches_to_indices, [SWITCHES, (8, 8)]),
        (ValueError, r"indices must be \[N, C", indices_to_switches, [INDICES[0, 0], (6, 8)]),
        (TypeError, "int64, got torch.uint8", indices_to_switches, [SWITCHES, (6, 8)]),
        (ValueError, r"input_size must be from \(6", indices_to_switches, [INDICES, (6, 10)]),
        (ValueError, "within their 2 x 2", indices_to_switches, [INDICES + 2, (6, 8)]),
        (ValueError, "within their 2 x 2", indices_to_switches, [INDICES - 1, (6, 8)]),
        (ValueError, "within their 2 x 2", indices_to_switches, [INDICES - 8, (6, 8)]),
        (ValueError, r"size \(6, 8\); were they", indices_to_switches, [INDICES + 16, (6, 8)]),
    ],
)
def test_bad_input_gets_a_clear_error(error, message, function, arguments):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_indices_of_overlapping_windows_are_refused():
    x = -torch.arange(36.0).reshape(1, 6, 6)  # each maximum in its window's upper left corner
    _, indices = F.max_pool2d(x, 3, stride=2, padding=1, return_indices=True)
    with pytest.raises(ValueError, match="another kernel, stride or padding"):
        indices_to_switches(indices, (6, 6))
