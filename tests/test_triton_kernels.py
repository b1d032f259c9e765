"""The GPU's kernels without a GPU: interpreted on the CPU, and compiled for GPUs that are not here.

What they are worth only a GPU can show; see ``benchmarks/unpooling.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from maps_to_pool import LAYOUTS, SHAPES, a_map, assert_same, there_and_back
from torch.nn import functional as F

from deconvnet import hardware, unpooling

triton = pytest.importorskip("triton", minversion="3.3", reason="needs Triton")
compiler = pytest.importorskip("triton.backends.compiler")

ARCHITECTURES = (75, 80, 90)  # of Colab's T4, the A100 and the H100
NUMBERS = ("fp16", "bf16", "fp32", "fp64")
BITS = ("u8", "i16", "i32", "i64")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as Triton's interpreter runs it; how, is settled when it is loaded."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("deconvnet.triton_kernels")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "layout"), [*itertools.product(SHAPES, LAYOUTS)])
def test_same_values_as_tensors(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    interpreted: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward, as the network calls them."""
    x = a_map(shape, layout, dtype)
    used = []
    pool = interpreted.max_pool
    monkeypatch.setattr(interpreted, "max_pool", lambda x: used.append(1) or pool(x))
    monkeypatch.setattr(unpooling, "gpu_kernels", lambda device: interpreted)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch.Tensor, "is_cuda", True)
        on_a_gpu.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
        found = there_and_back(x)
    assert used, "Triton's kernels were not asked"
    monkeypatch.setattr(unpooling, "compiled_kernels", lambda: None)
    assert_same(found, there_and_back(x), layout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    device = hardware.default_device()
    assert hardware.gpu_kernels(device) is not None
    x = a_map((3, 40, 64, 48), layout, dtype).to(device)
    found = there_and_back(x)
    monkeypatch.setattr(unpooling, "gpu_kernels", lambda device: None)
    assert_same(found, there_and_back(x), layout)


def test_several_tiles_and_no_values(interpreted: ModuleType) -> None:
    x = torch.randn(3, 5, 80, 70).relu()
    for layout in (torch.contiguous_format, torch.channels_last):
        large = x.contiguous(memory_format=layout)
        for actual, expected in zip(interpreted.max_pool(large), unpooling._find(large, 2)):
            assert torch.equal(actual, expected)
    pooled, switches = interpreted.max_pool(torch.empty(0, 3, 4, 4))
    assert pooled.shape == switches.shape == (0, 3, 2, 2)


def test_a_switch_out_of_range_drops_its_value(interpreted: ModuleType) -> None:
    x = torch.randn(1, 4, 8, 8)
    switches = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    unpooled = interpreted.unpool(x, switches)
    assert torch.equal(F.avg_pool2d(unpooled, 2) * 4, x * (switches < 4))
    assert torch.equal(interpreted.gather(unpooled, switches), x * (switches < 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_compile_for_gpus(architecture: int, tmp_path, monkeypatch) -> None:
    """Down to machine code, with the assembler that comes with Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = pytest.importorskip("deconvnet.triton_kernels")
    target = compiler.GPUTarget("cuda", architecture, 32)
    cases = [
        *((kernels._pool_kernel, ("x", "pooled"), kind) for kind in NUMBERS),
        *((kernels._unpool_kernel, ("unpooled", "x"), kind) for kind in BITS),
        *((kernels._gather_kernel, ("x", "gathered"), kind) for kind in BITS),
    ]
    for kernel, maps, kind in cases:
        signature = {
            **dict.fromkeys(maps, f"*{kind}"),
            "switches": "*u8",
            **dict.fromkeys(("rows", "length", "height", "width", "h", "inner"), "i32"),
            **dict.fromkeys(("tall", "wide"), "constexpr"),
        }
        source = triton.compiler.ASTSource(kernel, signature, {"tall": 8, "wide": 128})
        assert triton.compile(source, target=target).asm["cubin"]


def test_channels_last_maps_move_many_bytes_at_a_time(tmp_path, monkeypatch) -> None:
    """Triton is told what 16 divides, and reads and writes 16 bytes in one instruction."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = pytest.importorskip("deconvnet.triton_kernels")._pool_kernel
    assert "length" not in {p.name for p in kernel.params if p.do_not_specialize}
    names = kernel.arg_names
    numbers = ("rows", "length", "height", "width", "h", "inner")
    signature = {
        **dict.fromkeys(("x", "pooled"), "*bf16"),
        "switches": "*u8",
        **dict.fromkeys(numbers, "i32"),
        **dict.fromkeys(("tall", "wide"), "constexpr"),
    }
    divisible = ("x", "pooled", "switches", "length", "inner")
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = triton.compiler.ASTSource(kernel, signature, {"tall": 1, "wide": 1024}, hints)
    code = triton.compile(source, target=compiler.GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code


def test_they_are_tried_out_before_they_are_used(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deconvnet.triton_kernels", interpreted)
    monkeypatch.setattr("deconvnet.triton_kernels", interpreted, raising=False)
    here = torch.device("cpu")
    monkeypatch.setattr(hardware, "_tried_out", {})
    with warnings.catch_warnings(), torch.device("meta"):  # a default that is not meant
        warnings.simplefilter("error")
        with monkeypatch.context() as capturing:  # a trial would spoil the graph
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert hardware.gpu_kernels(torch.device("cuda", 0)) is None
        assert hardware.gpu_kernels(here) is interpreted
    pool = interpreted.max_pool

    def with_a_fault(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, switches = pool(x)
        return pooled, switches.clamp(max=2)

    monkeypatch.setattr(interpreted, "max_pool", with_a_fault)
    assert hardware.gpu_kernels(here) is interpreted  # one trial is enough
    hardware._tried_out.clear()
    with pytest.warns(RuntimeWarning, match="do without Triton.*other values than tensors"):
        assert hardware.gpu_kernels(here) is None


def test_without_triton_tensors_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deconvnet.triton_kernels", None)
    monkeypatch.delattr("deconvnet.triton_kernels", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hardware._try_out(torch.device("cuda", 0)) is None


def test_a_triton_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "deconvnet.triton_kernels", raising=False)
    monkeypatch.delattr("deconvnet.triton_kernels", raising=False)
    with pytest.warns(RuntimeWarning, match="fails there .RuntimeError: broken.; slower"):
        assert hardware._try_out(torch.device("cuda", 0)) is None
