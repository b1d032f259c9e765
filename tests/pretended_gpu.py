"""A GPU that is not there: tensors that say ``cuda``, computed by the CPU.

What a GPU computes, and how fast, only a GPU can show. But the faults that programs have most often
on their first GPU show without one: a tensor left on the CPU and added to one that is not, NumPy
asked to read what it cannot reach, a choice by ``device.type`` that nobody ever tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

# What may take tensors of two devices. An index on the CPU may address a GPU's tensor.
_COPIES = {Tensor.copy_, Tensor.to, Tensor.type_as, Tensor.data.__set__, Tensor.grad.__set__}
_INDEXES = {Tensor.__getitem__, Tensor.__setitem__}


class OnGPU(Tensor):
    """Lies in the CPU's memory, and says that it lies in a GPU's."""


@contextlib.contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[torch.device]:
    """Within, there is one CUDA device, of a compute capability, as far as Python can see."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "pretended",
        "get_device_capability": capability,
        "is_bf16_supported": capability >= (8, 0),
        "_lazy_init": None,
    }
    overwrite = torch.__future__.set_overwrite_module_params_on_conversion
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            told = mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer)
            stack.enter_context(told)
        check = "_accelerator_graph_capture_health_check"  # would ask the driver
        if hasattr(torch.optim.Optimizer, check):
            stack.enter_context(mock.patch.object(torch.optim.Optimizer, check, return_value=None))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        overwrite(True)  # a parameter that moves is another tensor then
        stack.callback(overwrite, before)
        stack.enter_context(_Pretence())
        yield GPU


class _Pretence(TorchFunctionMode):
    """Computes what is asked, and keeps account of where it would lie."""

    backward = False  # gradients of the engine's own do not say where they lie

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [isinstance(x, OnGPU) for x in tensors]
        if function is torch.device or name == "_parse_to":
            return function(*args, **kwargs)
        if function is Tensor.pin_memory:  # memory of the CPU, but a GPU's driver gives it
            return args[0]
        if name == "_has_compatible_shallow_copy_type" and len(set(there)) == 2:
            return False
        if any(there):
            first_there = isinstance(args[0], OnGPU)
            if function == Tensor.device.__get__:
                return GPU
            if function == Tensor.is_cuda.__get__:
                return True
            if function == Tensor.is_cpu.__get__:
                return False
            if function is Tensor.__deepcopy__:
                return _deep_copy(*args)
            if function is Tensor.__reduce_ex__:  # files do not keep the mark
                return args[0].detach().as_subclass(Tensor).__reduce_ex__(args[1])
            if function in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if function in _INDEXES and not first_there:
                raise RuntimeError("indices should be on the CPU, where the indexed tensor lies")
            free = function in _COPIES or function in _INDEXES or self.backward
            if not free and any(x.ndim and not on for x, on in zip(tensors, there)):
                raise RuntimeError(f"Expected all tensors to be on the same device: {name}")

        target = _target(name, args, kwargs)
        if target is not None:  # it is on the CPU that all is done
            args, kwargs = tree_map(_without_gpu, (args, kwargs))
        self.backward, before = self.backward or function is Tensor.backward, self.backward
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = function(*args, **kwargs)
        finally:
            self.backward = before
        if isinstance(result, torch.Size):
            return result  # a tree_map would make a tuple of it
        return tree_map(lambda x: _placed(x, tensors, any(there), target), result)


def _target(name: str, args: tuple, kwargs: dict) -> str | None:
    """``"cuda"`` or ``"cpu"`` where a call says on which device its result has to lie."""
    if name in ("cpu", "cuda"):
        return name
    if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
        return "cuda" if isinstance(args[1], OnGPU) else "cpu"
    device = kwargs.get("device")
    if name == "to" and device is None:
        device = next((x for x in args[1:] if isinstance(x, (str, torch.device))), None)
    return None if device is None else torch.device(device).type


def _without_gpu(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(x, str) and x.split(":")[0] == "cuda" else x


def _placed(result: Any, inputs: list[Tensor], there: bool, target: str | None) -> Any:
    """A result, marked or not; what moves to the other memory is another tensor."""
    if not isinstance(result, Tensor):
        return result
    goes = target == "cuda" if target is not None else there
    same = next((x for x in inputs if x is result), None)
    if same is not None and (target is None or isinstance(same, OnGPU) == goes):
        return same
    with torch._C.DisableTorchFunctionSubclass():
        moved = result.clone() if target is not None and same is not None else result
        return moved.as_subclass(OnGPU if goes else Tensor)


def _deep_copy(x: Tensor, memo: dict) -> Tensor:
    if id(x) not in memo:
        with torch._C.DisableTorchFunctionSubclass():
            copy = x.detach().clone().as_subclass(OnGPU).requires_grad_(x.requires_grad)
        if isinstance(x, torch.nn.Parameter):
            copy._is_param = True  # how PyTorch tells parameters of other classes
        memo[id(x)] = copy
    return memo[id(x)]
