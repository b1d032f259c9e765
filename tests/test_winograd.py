"""Winograd's way computes the convolution; its compiled loops are compared in test_kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deconvnet import winograd as winograd_module
from deconvnet.winograd import WinogradConvolution, winograd


def a_convolution(channels_in: int = 5, channels_out: int = 7, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options).requires_grad_(False)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 10), (12, 9), (14, 14)])
@pytest.mark.parametrize("cache", [1, 20_000, 2**24])  # bytes: a row of tiles, some, all at once
def test_winograd_is_the_convolution(
    tile: int, size: tuple[int, int], cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd_module, "CACHE_BYTES", cache)
    convolution = a_convolution()
    x = torch.randn(3, 5, *size, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    y = WinogradConvolution(convolution, tile)(x)
    torch.testing.assert_close(y, convolution(x), rtol=1e-4, atol=1e-4)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_winograd_without_a_bias() -> None:
    convolution, x = a_convolution(bias=False), torch.randn(1, 5, 8, 8)
    expected = convolution(x)
    torch.testing.assert_close(
        WinogradConvolution(convolution, 4)(x), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("dtype", "widths", "matrix_units", "tile"),
    [
        (torch.float32, (128, 128), True, 4),
        (torch.float32, (64, 128), True, None),
        (torch.bfloat16, (256, 256), False, 2),
        (torch.bfloat16, (256, 256), True, None),
        (torch.float16, (256, 256), True, 2),
        (torch.bfloat16, (128, 256), False, None),
    ],
)
def test_winograd_where_it_pays(
    dtype: torch.dtype,
    widths: tuple[int, int],
    matrix_units: bool,
    tile: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deconvnet.winograd.cpu_has_matrix_units", lambda: matrix_units)
    chosen = winograd(a_convolution(*widths), dtype)
    assert getattr(chosen, "tile", None) == tile


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_winograd_is_for_the_networks_convolutions_only(options: dict) -> None:
    convolution = nn.Conv2d(128, 128, **options)
    assert winograd(convolution, torch.float32) is convolution
