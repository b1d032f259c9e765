"""Pooling and unpooling alone: ours, with switches of one byte, and PyTorch's, with eight.

    OMP_NUM_THREADS=2 python benchmarks/unpooling.py --json

At the five sizes of the full network, forward and backward, in both memory layouts and, with
``--compile``, also through ``torch.compile``. They take turns; the best of the rounds counts.
``tensors`` are ours without what Numba compiles for a CPU, or Triton for a GPU. ``library`` is
what :func:`deconvnet.deployment.library_pool` makes of PyTorch's code: its places, narrowed to
bytes, without a backward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from deconvnet import unpooling
from deconvnet.deployment import library_pool, library_unpool
from deconvnet.evaluation import provenance, record
from deconvnet.hardware import choose_precision, default_device
from deconvnet.unpooling import max_pool2d_with_switches, unpool2d

SIZES = ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))  # channels, side
REPEATS = 5  # in a row, since in the network a map comes from the layer before, by the cache
PASSES = ("pool", "unpool", "pool_backward", "unpool_backward")


def main() -> None:
    """Runs the benchmark and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crops", type=int, default=2, help="at once")
    parser.add_argument("--rounds", type=int, default=7, help="of which the best counts")
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", help="also write it to this file")
    options = parser.parse_args()

    device = default_device()
    ways: dict[str, tuple[Callable, Callable]] = {
        "torch": (torch_pool, torch_unpool),
        "ours": (max_pool2d_with_switches, our_unpool),
        "tensors": (max_pool2d_with_switches, our_unpool),
        "library": (library_pool, library_unpool),
    }
    if options.compile:
        ours = max_pool2d_with_switches, our_unpool
        ways["compiled"] = tuple(torch.compile(f, dynamic=False) for f in ours)
    entries = []
    for dtype in dict.fromkeys((torch.float32, choose_precision("auto", device))):
        for layout in ("contiguous", "channels_last"):
            for channels, side in SIZES:
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(options.crops, channels, side, side, generator=generator).relu()
                memory_format = getattr(torch, f"{layout}_format", None) or torch.channels_last
                x = x.to(device, dtype).contiguous(memory_format=memory_format)
                entry = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "layout": layout,
                    "channels": channels,
                    "side": side,
                }
                entries.append(entry | compare(ways, x, options.rounds))
    result = {"crops": options.crops, "sizes": entries, "summary": summary(entries)}
    result |= provenance()
    if options.out:
        record(options.out, **result)
    if options.json:
        print(json.dumps(result))
        return
    for row in result["summary"]:
        print(row)


def torch_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's pooling, with indices."""
    return F.max_pool2d(x, 2, return_indices=True)


def torch_unpool(x: Tensor, indices: Tensor) -> Tensor:
    """PyTorch's unpooling, from indices."""
    return F.max_unpool2d(x, indices, 2)


def our_unpool(x: Tensor, switches: Tensor) -> Tensor:
    """Unpooling as the network calls it."""
    return unpool2d(x, switches, check_range=False)


def compare(ways: dict[str, tuple[Callable, Callable]], x: Tensor, rounds: int) -> dict:
    """Seconds of every pass and bytes of the places, by way; all must give the same map."""
    torch.compiler.reset()  # which else stops compiling after a few kinds of maps
    calls: dict[str, dict[str, Callable]] = {}
    place_bytes = {}
    expected = None
    for way, (pool, unpool) in ways.items():
        with torch.no_grad():
            pooled, places = pool(x)
            unpooled = unpool(pooled, places)
        expected = unpooled if expected is None else expected
        assert torch.equal(unpooled, expected), f"{way} unpools to another map"
        place_bytes[way] = places.numel() * places.element_size()
        calls[way] = {
            "pool": without_gradient(pool, x),
            "unpool": without_gradient(unpool, pooled, places),
        }
        if way != "library":
            calls[way]["pool_backward"] = backward(lambda y, pool=pool: pool(y)[0], x)
            calls[way]["unpool_backward"] = backward(
                lambda y, unpool=unpool, places=places: unpool(y, places), pooled
            )
    seconds = {way: dict.fromkeys(found, math.inf) for way, found in calls.items()}
    names = dict.fromkeys(name for found in calls.values() for name in found)
    for _, name, way in itertools.product(range(rounds), names, ways):
        with no_kernels() if way == "tensors" else contextlib.nullcontext():
            for _ in range(REPEATS if name in calls[way] else 0):
                start = time.perf_counter()
                calls[way][name]()
                if x.is_cuda:
                    torch.cuda.synchronize()
                seconds[way][name] = min(seconds[way][name], time.perf_counter() - start)
    milliseconds = {
        way: {name: round(1000 * value, 4) for name, value in found.items()}
        for way, found in seconds.items()
    }
    return {"milliseconds": milliseconds, "place_bytes": place_bytes}


@contextlib.contextmanager
def no_kernels() -> Iterator[None]:
    """Leaves pooling and unpooling to tensors, on a CPU and on a GPU."""
    none = {"compiled_kernels": lambda: None, "gpu_kernels": lambda device: None}
    with mock.patch.multiple(unpooling, **none):
        yield


def without_gradient(function: Callable, *tensors: Tensor) -> Callable:
    """The forward pass."""

    def call() -> None:
        with torch.no_grad():
            function(*tensors)

    return call


def backward(function: Callable, x: Tensor) -> Callable:
    """The backward pass alone, with a gradient in the layout of the map."""
    x = x.detach().requires_grad_()
    y = function(x)
    gradient = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, gradient, retain_graph=True)


def summary(entries: list[dict]) -> list[dict]:
    """PyTorch's time over ours, the five sizes added up: above 1 ours is the faster."""
    rows = []
    for dtype, layout in dict.fromkeys((e["dtype"], e["layout"]) for e in entries):
        chosen = [
            e["milliseconds"] for e in entries if (e["dtype"], e["layout"]) == (dtype, layout)
        ]

        def total(way: str, names: tuple[str, ...], chosen: list[dict] = chosen) -> float:
            return sum(entry[way][name] for entry in chosen for name in names)

        row = {"dtype": dtype, "layout": layout}
        for way, found in chosen[0].items():
            if way != "torch":
                names = tuple(name for name in PASSES if name in found)
                row[f"ratio_{way}"] = round(total("torch", names) / total(way, names), 2)
                row[f"ratio_{way}_forward"] = round(
                    total("torch", PASSES[:2]) / total(way, PASSES[:2]), 2
                )
        rows.append(row)
    first = entries[0]["place_bytes"]
    return [row | {"place_bytes_ratio": first["torch"] / first["ours"]} for row in rows]


if __name__ == "__main__":
    main()
