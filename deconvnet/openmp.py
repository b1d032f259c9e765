"""Compiled loops on several threads: those that PyTorch keeps.

PyTorch computes on OpenMP's threads. Between two operations they stay awake for a moment and look
for more to do, so that other threads would find no core free just then. A loop compiled by Numba
therefore runs on the very same threads, which moreover start in a few microseconds.

In a process that was forked, OpenMP's threads may be gone, and PyTorch's own operations wait for
them for ever. There the loops run on one thread.
"""

# Numba keeps machine code for as long as the loop's own file stays the same: whoever changes what
# `in_parallel` generates must also change the files of the loops, or delete their __pycache__.

from __future__ import annotations

import ctypes
import math
import os
from contextlib import suppress

import llvmlite.binding
import llvmlite.ir
import numba
import torch
from numba import types
from numba.core import cgutils
from torch._C import __file__ as _TORCH

VALUES_A_THREAD = 2**15  # as in PyTorch; with fewer, a second one is not worth waking

_START, _NUMBER, _COUNT = _FUNCTIONS = (
    "GOMP_parallel",
    "omp_get_thread_num",
    "omp_get_num_threads",
)


def _find_openmp() -> ctypes.CDLL | None:
    """The library in which PyTorch finds OpenMP's functions, if it does."""
    for place in (None, _TORCH):  # what was loaded for all comes first, as it did for PyTorch
        with suppress(OSError, TypeError):  # on Windows None is no library
            library = ctypes.CDLL(place)
            if all(hasattr(library, name) for name in _FUNCTIONS):
                return library
    return None


def _tell_compiled_code(library: ctypes.CDLL | None) -> None:
    """Gives the functions names of our own, by which machine code that is kept finds them."""
    for name in _FUNCTIONS:
        # Each needs some address, even where it is never called.
        function = getattr(library, name) if library else ctypes.pythonapi.Py_IsInitialized
        address = ctypes.cast(function, ctypes.c_void_p).value
        llvmlite.binding.add_symbol(f"deconvnet_{name}", address)


_library = _find_openmp()
_tell_compiled_code(_library)

HAS_OPENMP = _library is not None
"""Whether PyTorch's threads are at hand; elsewhere (on Windows) one thread does it all."""


def _forget_threads() -> None:
    global HAS_OPENMP
    HAS_OPENMP = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def threads_for(values: int) -> int:
    """How many threads this many values keep busy, of those that PyTorch uses here."""
    wanted = math.ceil(values / VALUES_A_THREAD)
    return min(torch.get_num_threads(), max(1, wanted)) if HAS_OPENMP else 1


@numba.extending.intrinsic
def in_parallel(typing, loop, rows, threads, arguments):
    """For compiled code: ``loop(start, stop, *arguments)`` on each thread, with its own rows.

    Args:
        typing: Numba's own; a caller leaves it out.
        loop: A compiled function that returns nothing and raises nothing.
        rows: How many there are; each thread gets about as many.
        threads: How many are wanted, from :func:`threads_for`.
        arguments: A tuple.
    """
    index = types.intp
    types_there = (index, index, *arguments.types)
    loop.get_call_type(typing, types_there, {})  # compiles it
    compiled = loop.dispatcher.overloads[types_there]

    def generate(context, builder, signature, values):
        """A call on this thread; or a function of one pointer, which OpenMP calls on each."""
        context.active_code_library.add_linking_library(compiled.library)
        _, rows, threads, arguments = values
        number, pointer = llvmlite.ir.IntType(32), cgutils.voidptr_t

        def declare(name, returns, *takes):
            kind = llvmlite.ir.FunctionType(returns, takes)
            return cgutils.get_or_insert_function(builder.module, kind, f"deconvnet_{name}")

        def call(builder, start, stop, arguments):
            given = start, stop, *cgutils.unpack_tuple(builder, arguments)
            context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, given)

        given = cgutils.make_anonymous_struct(builder, (rows, threads, arguments))
        work = llvmlite.ir.Function(
            builder.module,
            llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [pointer]),
            builder.module.get_unique_name("in_parallel"),
        )
        work.linkage = "internal"
        inside = llvmlite.ir.IRBuilder(work.append_basic_block())
        taken = inside.load(inside.bitcast(work.args[0], given.type.as_pointer()))
        all_rows, wanted, taken_arguments = cgutils.unpack_tuple(inside, taken)
        me, there = (
            inside.sext(inside.call(declare(name, number), ()), rows.type)
            for name in (_NUMBER, _COUNT)
        )
        parts = inside.select(inside.icmp_signed("<", wanted, there), wanted, there)
        with inside.if_then(inside.icmp_signed("<", me, parts)):
            after = inside.add(me, me.type(1))
            start, stop = (inside.sdiv(inside.mul(all_rows, first), parts) for first in (me, after))
            call(inside, start, stop, taken_arguments)
        inside.ret_void()

        alone = builder.icmp_signed("<=", threads, threads.type(1))
        with builder.if_else(alone) as (here, on_others):
            with here:
                call(builder, rows.type(0), rows, arguments)
            with on_others:
                place = builder.bitcast(cgutils.alloca_once_value(builder, given), pointer)
                start_all = declare(
                    _START, llvmlite.ir.VoidType(), work.type, pointer, number, number
                )
                # All threads that PyTorch uses, with nothing to do for some of them: asked for
                # fewer, OpenMP would end the others, and start them again for the next operation.
                every, no_flags = number(0), number(0)
                builder.call(start_all, (work, place, every, no_flags))
        return context.get_dummy_value()

    return types.void(loop, index, index, arguments), generate
