"""What the machine can do: where to compute, in which precision, and with how many processes."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

PRECISIONS = ("auto", "portable", "float32", "bfloat16", "float16")


def default_device() -> torch.device:
    """The accelerator of this process, or the CPU.

    Under ``torchrun`` each process of a machine takes a GPU of its own (``LOCAL_RANK``);
    elsewhere it is the one that :func:`torch.cuda.set_device` has chosen, or the first.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", int(rank) % torch.cuda.device_count())


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Resolves a precision's name for a device.

    Args:
        precision: ``"auto"`` is bfloat16 where the hardware computes it, float16 on older CUDA
            cards (training then scales the loss) and float32 elsewhere. ``"portable"`` does
            the same on GPUs and is float32 on every CPU, so that all give the same figures.
            On GPUs PyTorch rounds what convolutions in ``"float32"`` multiply to 11 bits (TF32),
            unless ``torch.backends.cudnn.allow_tf32`` is set to False.
        device: Where to compute.

    Raises:
        ValueError: There is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if precision not in ("auto", "portable"):
        return getattr(torch, precision)
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    fast_cpu = precision == "auto" and device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if fast_cpu else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    # torch has no public question for this; without an answer float32 is right everywhere.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def cpu_has_matrix_units() -> bool:
    """Whether this CPU multiplies whole tiles of bfloat16 in one instruction (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@functools.cache
def compiled_kernels(module: str = "deconvnet.kernels") -> ModuleType | None:
    """A module of compiled loops, or None where Numba, which compiles them, is not at hand.

    Args:
        module: :mod:`deconvnet.kernels` or :mod:`deconvnet.crf_kernels`.
    """
    try:
        kernels = importlib.import_module(module)  # takes a moment, which not everybody needs
    except (ImportError, RuntimeError):  # none, none for this NumPy, or nowhere to keep code
        return None
    return None if kernels.numba.config.DISABLE_JIT else kernels


_tried_out: dict[torch.device, ModuleType | None] = {}


def gpu_kernels(device: torch.device) -> ModuleType | None:
    """:mod:`deconvnet.triton_kernels`, or None where there is no Triton or it fails its trial.

    The trial, one for each GPU and process, waits for the GPU, which nothing may do while a CUDA
    graph is captured: a network that has not run before is captured without these kernels.

    Args:
        device: The GPU on which to try them out.
    """
    if device not in _tried_out:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        _tried_out[device] = _try_out(device)
    return _tried_out[device]


def _try_out(device: torch.device) -> ModuleType | None:
    try:
        from deconvnet import triton_kernels as kernels

        kernels.try_out(device)
    except ImportError:
        return None
    except Exception as error:  # a compiler's, a driver's: whatever it is, tensors can do it too
        warnings.warn(
            f"pooling and unpooling on {device} do without Triton, which fails there "
            f"({type(error).__name__}: {error}); slower, with the same results",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return kernels


def keep_memory() -> bool:
    """From now on, memory that one tensor gives back is there for the next one.

    The C library of most Linux systems, glibc, returns blocks of many megabytes to the system as
    soon as they are free. The next tensor of that size gets other pages, and the system clears
    each of them, 4 KiB at a time, when it is first touched. That can take as long as the
    arithmetic. (On a GPU, PyTorch keeps a store of its own.)

    This holds for the whole process and to its end, and for those that it forks, so it is a
    decision for a program, not for a library: ``deconvnet train`` takes it on a CPU. It suits work
    that repeats itself, whose freed pieces fit again; such a process holds up to a quarter more
    than it needs at its peak. Where sizes change all the time, or a small tensor stays after every
    large one, pieces seldom fit, and the process grows far beyond what it needs.

    Returns:
        Whether it does. Not if the C library is another one, nor if the environment
        (``MALLOC_…``, ``GLIBC_TUNABLES``) has settings of the user's for its memory.
    """
    if sys.platform != "linux" or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
    ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    trim_threshold, mmap_max = -1, -4  # their numbers in glibc's malloc.h
    # No block of its own for a large tensor, and nothing back from the end of the others.
    return bool(library.mallopt(mmap_max, 0) and library.mallopt(trim_threshold, -1))


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which convolutions compute in ``precision``."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def join_processes() -> tuple[int, int]:
    """Joins the process group that ``torchrun`` announces, unless this process is in one already.

    With CUDA, each process gets a GPU of its own; what is not a tensor there travels by the CPU.

    Returns:
        This process's rank, and the number of processes; 0 and 1 without a group.
    """
    if dist.is_available() and dist.is_initialized():  # by mp.spawn perhaps, which announces none
        return dist.get_rank(), dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def message_device(device: torch.device) -> torch.device:
    """Where a small tensor must lie to reach the other processes of the group.

    Args:
        device: The process's own; what a group of NCCL alone needs.
    """
    return torch.device("cpu") if "cpu:" in dist.get_backend_config() else device


def gathered(value: Any) -> list[Any]:
    """Every process's value, by rank; a list of one where there is a single process.

    Args:
        value: Anything that can be pickled.
    """
    _, processes = join_processes()
    if processes == 1:
        return [value]
    values: list = [None] * processes
    dist.all_gather_object(values, value)
    return values
