"""Compiled loops on several threads: those that PyTorch keeps.

PyTorch computes on OpenMP's threads. Between two operations they stay awake for a moment and look
for more to do, so that other threads would find no core free just then. A loop compiled by Numba
therefore runs on the very same threads, which moreover start in a few microseconds.
"""

from __future__ import annotations

import ctypes
import math

import llvmlite.binding
import llvmlite.ir
import numba
import torch
from numba import types
from numba.core import cgutils
from torch._C import __file__ as _TORCH

VALUES_A_THREAD = 2**15  # as in PyTorch; with fewer, a second one is not worth waking

_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _find_openmp() -> bool:
    """Tells compiled code where OpenMP's functions are, if PyTorch was built with them."""
    library = ctypes.CDLL(_TORCH)  # whose names include those of the libraries it is linked with
    if not all(hasattr(library, name) for name in _OPENMP):
        return False
    for name in _OPENMP:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(name, address)
    return True


HAS_OPENMP = _find_openmp()
"""Whether PyTorch's threads are at hand; elsewhere (on Windows) one thread does it all."""


def threads_for(values: int) -> int:
    """How many threads this many values keep busy, of those that PyTorch uses here."""
    return min(torch.get_num_threads(), max(1, math.ceil(values / VALUES_A_THREAD)))


@numba.extending.intrinsic
def in_parallel(typing, loop, rows, threads, arguments):
    """For compiled code: ``loop(start, stop, *arguments)`` on each thread, with its own rows.

    Args:
        typing: Numba's own; a caller leaves it out.
        loop: A compiled function that returns nothing and raises nothing.
        rows: How many there are; each thread gets about as many.
        threads: How many are wanted.
        arguments: A tuple.
    """
    index = types.intp
    types_there = (index, index, *arguments.types)
    loop.get_call_type(typing, types_there, {})  # compiles it
    compiled = loop.dispatcher.overloads[types_there]

    def generate(context, builder, signature, values):
        """A function of one pointer, as OpenMP calls them, and the call that passes it on."""
        context.active_code_library.add_linking_library(compiled.library)
        _, rows, threads, arguments = values

        def call(builder, start, stop, arguments):
            given = start, stop, *cgutils.unpack_tuple(builder, arguments)
            context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, given)

        if not HAS_OPENMP:
            call(builder, rows.type(0), rows, arguments)
            return context.get_dummy_value()

        given = cgutils.make_anonymous_struct(builder, (rows, arguments))
        number, pointer = llvmlite.ir.IntType(32), cgutils.voidptr_t

        def declare(name, returns, *takes):
            kind = llvmlite.ir.FunctionType(returns, takes)
            return cgutils.get_or_insert_function(builder.module, kind, name)

        work = llvmlite.ir.Function(
            builder.module,
            llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [pointer]),
            builder.module.get_unique_name("in_parallel"),
        )
        work.linkage = "internal"
        inside = llvmlite.ir.IRBuilder(work.append_basic_block())
        taken = inside.load(inside.bitcast(work.args[0], given.type.as_pointer()))
        rows, arguments = cgutils.unpack_tuple(inside, taken)
        me, all_threads = (
            inside.sext(inside.call(declare(name, number), ()), rows.type) for name in _OPENMP[1:]
        )
        after = inside.add(me, me.type(1))
        start, stop = (inside.sdiv(inside.mul(rows, first), all_threads) for first in (me, after))
        call(inside, start, stop, arguments)
        inside.ret_void()

        place = cgutils.alloca_once_value(builder, given)
        start_all = declare(_OPENMP[0], llvmlite.ir.VoidType(), work.type, pointer, number, number)
        count, no_flags = builder.trunc(threads, number), number(0)
        builder.call(start_all, (work, builder.bitcast(place, pointer), count, no_flags))
        return context.get_dummy_value()

    return types.void(loop, index, index, arguments), generate
