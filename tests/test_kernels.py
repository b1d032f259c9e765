"""Compiled loops against tensors: the same values, in every layout, alone or among threads."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from maps_to_pool import LAYOUTS, SHAPES, a_map, assert_same, there_and_back
from torch import Tensor, nn
from torch.nn import functional as F

from deconvnet import hardware, unpooling
from deconvnet.deployment import prepare_for_inference
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.unpooling import max_pool2d_with_switches
from deconvnet.winograd import WinogradConvolution

kernels = pytest.importorskip("deconvnet.kernels", reason="needs Numba")
openmp = pytest.importorskip("deconvnet.openmp", reason="needs Numba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "layout"), [*itertools.product(SHAPES, LAYOUTS)])
def test_same_values_as_tensors(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    three_threads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unpooling, "COMPILED_FROM", 0)
    monkeypatch.setattr(openmp, "VALUES_A_THREAD", 64)  # so that threads share even these
    x = a_map(shape, layout, dtype)
    used = []
    pool = kernels.max_pool
    monkeypatch.setattr(kernels, "max_pool", lambda x: used.append(1) or pool(x))
    compiled = there_and_back(x)
    assert used, "the compiled loops were not asked"
    monkeypatch.setattr(unpooling, "compiled_kernels", lambda: None)
    assert_same(compiled, there_and_back(x), layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_what_is_compiled_is_what_stands_there(layout: str, dtype: torch.dtype) -> None:
    """The loops as plain Python: what a reader, and the coverage, sees of them."""
    x = a_map((2, 3, 4, 6), layout, dtype)
    read = x.view(torch.uint16) if dtype == torch.bfloat16 else x
    pooled, switches = kernels.max_pool(x)
    x, pooled = x.float(), pooled.float()
    kinds = "pixels" if layout == "channels_last" else "planes"

    def array(x: Tensor) -> np.ndarray:
        return (x.permute(0, 2, 3, 1) if kinds == "pixels" else x.flatten(0, 1)).numpy()

    arrays = [np.zeros_like(array(t)) for t in (pooled, switches, x, pooled)]
    rows = arrays[0].shape[0] * arrays[0].shape[1]
    loop = {name: getattr(kernels, f"_{name}_{kinds}").py_func for name in ("pool", "unpool")}
    loop["pool"](0, rows, array(read), *arrays[:2], np.float32(1))
    np.testing.assert_array_equal(arrays[0], array(pooled))
    np.testing.assert_array_equal(arrays[1], array(switches))
    loop["unpool"](0, rows, arrays[2], array(pooled), array(switches))
    np.testing.assert_array_equal(arrays[2], array(kernels.unpool(pooled, switches)))
    # `_gather` computes with the bits
    bits = [np.ascontiguousarray(a).view(np.int32) for a in (array(x), arrays[3])]
    getattr(kernels, f"_gather_{kinds}").py_func(0, rows, *bits, array(switches))
    np.testing.assert_array_equal(bits[1].view(np.float32), array(pooled))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_whole_numbers(dtype: torch.dtype) -> None:
    """Beyond what a float32 can tell apart."""
    largest = torch.iinfo(dtype).max
    x = largest - torch.randint(0, 9, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    x = x.to(dtype)
    for actual, expected in zip(kernels.max_pool(x), unpooling._find(x, 2)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nearly_equal_values_are_a_tie_where_it_is_asked_for(layout: torch.memory_format) -> None:
    x = torch.tensor([[1.0, 1.0 + 5e-6], [1.0 + 2e-5, 1.0]]).expand(2, 3, 2, 2)
    x = x.contiguous(memory_format=layout)
    for tie, place in ((0.0, 2), (1e-5, 2), (1e-4, 0)):
        pooled, switches = kernels.max_pool(x, tie)
        assert (switches == place).all()
        assert torch.equal(pooled, x.flatten(2)[:, :, place, None, None])
    zeros = kernels.max_pool(0 * x, 1e-4)
    assert not zeros[0].any() and not zeros[1].any()


def test_a_switch_out_of_range_drops_its_value() -> None:
    x = torch.randn(1, 4, 32, 32)
    switches = torch.randint(0, 9, x.shape, dtype=torch.uint8)
    unpooled = kernels.unpool(x, switches)
    assert torch.equal(F.avg_pool2d(unpooled, 2) * 4, x * (switches < 4))
    assert torch.equal(kernels.gather(unpooled, switches), x * (switches < 4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("channels", "out"), [(16, 16), (3, 40), (70, 5)])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 9), (28, 31), (3, 64)])
def test_winograd(
    channels: int, out: int, size: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvnet.winograd.STRIP_BYTES", 2**15)  # several strips
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, out, 3, padding=1, bias=bias).requires_grad_(False)
    x = torch.randn(3, channels, *size)
    expected = convolution(x)
    found = WinogradConvolution(convolution, 4, compiled=True)(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    plain = WinogradConvolution(convolution, 4)(x)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


def test_winograds_loops_as_plain_python() -> None:
    convolution = nn.Conv2d(2, 3, 3, padding=1).double().requires_grad_(False)
    layer = WinogradConvolution(convolution, 4, compiled=True)
    x = torch.randn(1, 2, 5, 9).double()
    tiles, y = np.empty((6, 6, 1, 2, 3, 2)), np.empty((1, 5, 9, 3))
    pixels = x.permute(0, 2, 3, 1).contiguous().numpy()
    kernels.transform_input.py_func(pixels, np.array(layer.input_transform, float), 0, tiles)
    products = torch.bmm(torch.from_numpy(tiles).view(36, -1, 2), layer.transformed_kernel)
    products = products.view(6, 6, 1, 2, 3, 3).numpy()
    matrix, bias = np.array(layer.output_transform, float), convolution.bias.numpy()
    kernels.transform_output.py_func(products, matrix, bias, -np.inf, 0, y)
    np.testing.assert_allclose(y, convolution(x).permute(0, 2, 3, 1).numpy(), atol=1e-12)


def test_scratch_is_kept_by_each_thread_and_of_use_in_every_mode() -> None:
    with torch.inference_mode():
        first = kernels.scratch("test", (4, 5), torch.float32)
    again = kernels.scratch("test", (2, 3), torch.float32)
    assert again.data_ptr() == first.data_ptr()
    torch.mul(torch.ones(2, 3), 2, out=again)  # an inference tensor would refuse
    assert kernels.scratch("test", (6, 5), torch.float32).shape == (6, 5)
    assert kernels.scratch("test", (4,), torch.float64).dtype == torch.float64


def test_a_relu_is_done_on_the_way_out() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    layer = WinogradConvolution(convolution, 4, compiled=True)
    layer.least = 0.0
    x = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(layer(x), convolution(x).relu(), atol=2e-5, rtol=1e-4)
    x[0, 0, 0, 0] = torch.nan
    assert layer(x)[0, :, 0, 0].isnan().all()


def test_shares_keep_their_order_and_run_on_one_thread_each(two_threads) -> None:
    def work(number: int, text: str) -> tuple:
        return number, text, torch.get_num_threads(), torch.is_grad_enabled()

    found = kernels.share(work, ((i, str(i)) for i in range(7)))
    assert found == [(i, str(i), 1, False) for i in range(7)]
    assert torch.get_num_threads() == 2
    assert kernels.share(work, []) == []


def test_a_share_leaves_the_threads_of_others_alone(two_threads) -> None:
    """A worker's own setting must not become that of threads which start later."""
    kernels._workers.cache_clear()
    kernels.share(lambda _: None, [(0,), (1,)])
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == 2


def test_what_goes_wrong_in_a_thread_is_heard(two_threads) -> None:
    def work(number: int) -> None:
        raise ArithmeticError(f"in share {number}")

    with pytest.raises(ArithmeticError, match="in share 0"):
        kernels.share(work, [(0,), (1,)])


def test_threads_follow_inference_mode(two_threads) -> None:
    with torch.inference_mode():
        assert (
            kernels.share(lambda _: torch.is_inference_mode_enabled(), [(0,), (1,)]) == [True] * 2
        )


def _pooled_sum(x: Tensor) -> tuple[float, list]:
    shared = kernels.share(lambda number: number * number, [(2,), (3,), (4,)])
    return float(kernels.max_pool(x)[0].sum()), shared


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_without_its_parents_threads(two_threads) -> None:
    """Where PyTorch's own operations would wait for them for ever."""
    x = torch.arange(2.0**17).view(2, 1, 256, 256)
    expected = _pooled_sum(x)
    assert expected[1] == [4, 9, 16]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_pooled_sum, (x,)).get(timeout=60) == expected


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_network_with_and_without(
    dtype: torch.dtype, shared: bool, two_threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(5, (64, 64, 128, 128, 128), fc_width=64, input_size=64)
    model = DeconvNet(config).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
    crops = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    monkeypatch.setattr("deconvnet.deployment.LARGE", 1 if shared else 10**9)
    compiled = prepare_for_inference(model, dtype)
    kinds = [m for m in compiled.modules() if isinstance(m, WinogradConvolution) and m.compiled]
    assert kinds
    monkeypatch.setattr("deconvnet.deployment.compiled_kernels", lambda: None)
    plain = prepare_for_inference(model, dtype)
    assert not any(getattr(m, "compiled", False) for m in plain.modules())
    monkeypatch.undo()
    with torch.inference_mode():
        ours, expected = compiled(crops).float(), plain(crops).float()
    error = (ours - expected).square().mean().sqrt() / expected.std()
    assert error < (1e-2 if dtype == torch.float32 else 3e-2)


def test_without_numba_tensors_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware.compiled_kernels.cache_clear()
    monkeypatch.delitem(sys.modules, "deconvnet.kernels")
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
    try:
        assert hardware.compiled_kernels() is None
        x = torch.randn(2, 8, 32, 32)
        assert torch.equal(max_pool2d_with_switches(x)[0], F.max_pool2d(x, 2))
    finally:
        monkeypatch.undo()
        hardware.compiled_kernels.cache_clear()
    assert hardware.compiled_kernels() is kernels


def test_a_disabled_compiler_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware.compiled_kernels.cache_clear()
    monkeypatch.setattr(kernels.numba.config, "DISABLE_JIT", 1)
    assert hardware.compiled_kernels() is None
    hardware.compiled_kernels.cache_clear()
