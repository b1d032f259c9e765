"""The network as an ONNX file, for runtimes other than PyTorch: a phone, a server, a web page.

ONNX describes a network as a graph of standard operations with its weights inside. Unpooling by
byte switches needs only slices, comparisons and a scatter, so the whole network goes into such a
graph, and any runtime draws the same mask from it.

``python -m deconvnet.export shapes-deconvnet book/live/shapes-deconvnet.onnx`` writes the file that
the book runs in its reader's browser.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from deconvnet.activations import LEVELS
from deconvnet.files import atomic_write
from deconvnet.model import DeconvNet
from deconvnet.weights import load_model, pretrained

if TYPE_CHECKING:
    import onnx

__all__ = ["STAGES", "export_onnx", "main"]

STAGES: tuple[str, ...] = ("fc7", "fc6-deconv", *(f"deconv{level}" for level in LEVELS))
"""The extra outputs of a file with stages: the decoder's map from a single point to the crop."""


def export_onnx(model: DeconvNet, path: str | Path, stages: bool = True) -> Path:
    """Writes a network to an ONNX file.

    The file's inputs are ``images``, ``uint8 [N, 3, S, S]``, RGB, and, if the network was trained
    with switches, ``use_switches``, a single ``bool``: false sets all switches to 0, so that each
    value goes to the upper left of its window. Its outputs are ``scores``,
    ``float32 [N, num_classes, S, S]``, and the :data:`STAGES`, ``float32 [N, C, h, w]`` with
    ``h = w`` of 1, S/32, S/16, S/8, S/4, S/2 and S pixels. Its metadata properties ``class_names``
    and ``input_size`` are JSON.

    Weights that half precision holds without loss, as those that come with the package, are stored
    in half precision; the graph computes in ``float32`` in any case.

    Args:
        model: A DeconvNet in evaluation mode.
        path: The ``.onnx`` file to write.
        stages: Whether the decoder's maps are outputs too.

    Returns:
        ``path``.

    Raises:
        ImportError: The packages ``onnx`` and ``onnxscript`` are not installed.
        TypeError: ``model`` is not a DeconvNet.
        ValueError: ``model`` is in training mode.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx needs {' and '.join(missing)}, which deconvnet does not install by "
            "itself: pip install onnx onnxscript"
        )
    if not isinstance(model, DeconvNet):
        raise TypeError(f"model must be a DeconvNet, got {type(model).__name__}")
    if model.training:
        raise ValueError("the network is in training mode; call model.eval() first")

    # A batch of 2: the exporter takes a 1 for a size that never changes.
    images = torch.zeros(2, 3, model.config.input_size, model.config.input_size, dtype=torch.uint8)
    arguments, names = (images,), ["images"]
    shapes: tuple[dict, ...] = ({0: torch.export.Dim("batch", min=1)},)
    if model.config.use_switches:
        arguments += (torch.tensor(True),)
        names, shapes = [*names, "use_switches"], (*shapes, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about versions of its own parts
        program = torch.onnx.export(
            _Exportable(model, stages),
            arguments,
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=["scores", *(STAGES if stages else ())],
            dynamic_shapes=shapes,
        )
    graph = program.model_proto
    _forget_origin(graph)
    _widen_switches(graph)
    _halve(graph)
    facts = {
        "class_names": getattr(model, "metadata", {}).get("class_names", []),
        "input_size": model.config.input_size,
    }
    for key, value in facts.items():
        graph.metadata_props.add(key=key, value=json.dumps(value))
    with atomic_write(path) as temporary:
        temporary.write_bytes(graph.SerializeToString())
    return Path(path)


class _Exportable(nn.Module):
    """The network with its switches to turn off and its decoder's maps to look at."""

    def __init__(self, model: DeconvNet, stages: bool) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float()
        self.stages = stages
        _separate_batch_norm(self.model)

    def forward(self, images: Tensor, use_switches: Tensor | None = None) -> tuple[Tensor, ...]:
        model = self.model
        pooled, switches = model.encoder(model.normalise(images))
        if use_switches is None:
            switches = [torch.zeros_like(where) for where in switches]
        else:
            switches = [torch.where(use_switches, where, 0) for where in switches]
        maps = [model.fc7(model.fc6(pooled[-1]))]
        maps.append(model.fc6_deconv(maps[-1]))
        for block, where in zip(model.decoder.blocks, reversed(switches)):
            maps.append(block(model.decoder.unpool(maps[-1], where)))
        return (model.score(maps[-1]), *(maps if self.stages else ()))


class _Affine(nn.Module):
    """Batch norm with fixed statistics: each channel scaled and shifted."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - scale * norm.running_mean
        self.register_buffer("scale", scale.detach().view(-1, 1, 1))
        self.register_buffer("shift", shift.detach().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def _separate_batch_norm(module: nn.Module) -> None:
    # The exporter would fold batch norm into the weights, and half precision would no longer
    # hold them without loss. The runtime folds it when it loads the file.
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _Affine(child))
        else:
            _separate_batch_norm(child)


def _forget_origin(graph: onnx.ModelProto) -> None:
    """Drop what the exporter notes about source lines: paths of this machine, half a megabyte."""
    del graph.metadata_props[:]
    functions = [node for function in graph.functions for node in function.node]
    for part in (graph.graph, *graph.graph.node, *functions):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del value.metadata_props[:]


def _widen_switches(graph: onnx.ModelProto) -> None:
    """Compute with switches in 32 bits: few runtimes have ``Max`` and ``Equal`` for bytes."""
    from onnx import TensorProto, helper, shape_inference

    inferred = shape_inference.infer_shapes(graph).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    nodes = []
    for node in graph.graph.node:
        narrow = [name for name in node.input if types.get(name) == TensorProto.UINT8]
        if node.op_type not in ("Max", "Equal") or not narrow:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            node.input[i] = f"{name}.wide{len(nodes)}"
            cast = helper.make_node("Cast", [name], [node.input[i]], to=TensorProto.INT32)
            nodes.append(cast)
        nodes.append(node)
        if node.op_type == "Max":
            (result,) = node.output
            node.output[0] = f"{result}.wide"
            cast = helper.make_node("Cast", list(node.output), [result], to=TensorProto.UINT8)
            nodes.append(cast)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _halve(graph: onnx.ModelProto) -> None:
    """Store in half precision what it holds without loss, and cast it back in the graph."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size > 64 and np.array_equal(half.astype(np.float32), values):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    for position, node in enumerate(casts):
        graph.graph.node.insert(position, node)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes weights that come with the package, or a file of weights, as an ONNX file.

    Args:
        arguments: The command line; by default the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m deconvnet.export", description=main.__doc__)
    parser.add_argument("weights", help="such as shapes-deconvnet, or a .safetensors file")
    parser.add_argument("path", type=Path, help="the .onnx file to write")
    parser.add_argument("--no-stages", action="store_true", help="only the scores as output")
    options = parser.parse_args(arguments)
    source = options.weights if Path(options.weights).is_file() else pretrained(options.weights)
    path = export_onnx(load_model(source), options.path, stages=not options.no_stages)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
