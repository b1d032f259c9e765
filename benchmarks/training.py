"""How fast the full network learns, how near to the hardware's peak, and in how much memory.

    OMP_NUM_THREADS=2 python benchmarks/training.py --json

Each way runs in a process of its own, whose peak memory is hence its own: float32 and, where the
hardware has it, 16 bits; ``plain`` as a user of the network would write it, then with the fc
layers as matrix products, as :func:`deconvnet.training.train` has it, then with freed memory kept
as well, as ``deconvnet train`` has it, or with ``recompute`` in its place. The ways take turns,
and the best of the rounds counts.

An update takes ``--batch`` crops, ``--micro-batch`` at a time (gradients accumulate); the best of
a few micro-batches counts, and the time of all is what it implies, plus the optimiser's step. The
utilisation counts three times the forward pass's operations (the backward pass has twice as many;
recomputing adds none that count) by the peak of the same number format, a large matrix product or
convolution. ``new_pages`` are those that the system had to clear for a micro-batch, and
``seconds_system`` what that and its other work took it, on all cores together. ``shares`` says
where one more micro-batch's time went, by PyTorch's profiler. Last, the data path alone: crops a
second that one process cuts, resizes and flips.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from network import natural_crops, operations, peak, peak_mebibytes
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from deconvnet.deployment import matrix_products
from deconvnet.evaluation import provenance, record
from deconvnet.hardware import autocast, choose_precision, default_device, keep_memory
from deconvnet.instances import InstanceConfig, Stage1Dataset, StreamSampler, balanced_indices
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.shapes import write_shapes
from deconvnet.training import StageConfig, make_optimizer, pixel_loss, prepare_worker, recomputed
from deconvnet.voc import VOCDataset

KINDS = ("plain", "products", "kept", "recomputed")


def main() -> None:
    """Runs the benchmark and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="crops an update (the paper's 64)")
    parser.add_argument("--micro-batch", type=int, help="crops at once (4; on a GPU 32)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument("--recipe", choices=("full", "tiny"), default="full", help="which network")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", help="also write it to this file")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)  # its dtype and kind, here
    options = parser.parse_args()

    torch.backends.cudnn.allow_tf32 = False  # a GPU's float32, too, is to have 24 bits
    device = default_device()
    micro = options.micro_batch or (32 if device.type == "cuda" else 4)
    if options.way:
        dtype, kind = getattr(torch, options.way[0]), options.way[1]
        found = one_way(options.recipe, device, dtype, kind, options.batch, micro)
        print(json.dumps(found))
        return
    config = ModelConfig() if options.recipe == "full" else ModelConfig.tiny()
    forward = operations(config)
    result: dict = {
        "network": options.recipe,
        "batch": options.batch,
        "micro_batch": micro,
        "gflop_a_crop": round(3 * forward, 1),
        "ways": [],
    }
    dtypes = dict.fromkeys((torch.float32, choose_precision("auto", device)))
    peaks = {str(d).removeprefix("torch."): peak(device, d) for d in dtypes}
    for dtype, hardware in peaks.items():
        found: dict[str, dict] = {}
        for _, kind in itertools.product(range(options.rounds), KINDS):
            way = in_a_fresh_process(options, micro, dtype, kind)
            found[kind] = max(found.get(kind, way), way, key=lambda w: w["crops_a_second"])
        for way in found.values():
            share = way["crops_a_second"] * 3 * forward / hardware
            result["ways"].append(way | {"share_of_peak": round(share, 3)})
            if not options.json:
                print(result["ways"][-1], flush=True)
    result["rounds"] = options.rounds
    result["peak_gflops"] = {name: round(value, 1) for name, value in peaks.items()}
    result["data"] = data_path(config)
    fastest = max(way["crops_a_second"] for way in result["ways"])
    result["data"]["by_twice_training"] = round(
        result["data"]["crops_a_second_one_process"] / (2 * fastest), 2
    )
    result |= provenance()
    if options.out:
        record(options.out, **result)
    print(json.dumps(result if options.json else result["data"]))


def one_way(
    recipe: str,
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    batch: int,
    micro: int,
) -> dict:
    """Crops a second and peak memory of updates as :func:`deconvnet.training.train` makes them."""
    torch.manual_seed(0)
    config = ModelConfig() if recipe == "full" else ModelConfig.tiny()
    model = DeconvNet(config).to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, StageConfig())
    crops = natural_crops(micro, config.input_size).to(device)
    size = (micro, config.input_size, config.input_size)
    labels = torch.randint(0, config.num_classes, size, device=device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def learn() -> float:
        start = wait()
        with autocast(device, dtype):
            scores = model(crops)
        (pixel_loss(scores.float(), labels) / labels.numel()).backward()
        return wait() - start

    def step() -> float:
        start = wait()
        optimizer.step()
        optimizer.zero_grad()
        return wait() - start

    faster = nullcontext() if kind == "plain" else matrix_products(model)
    saving = recomputed(model) if kind == "recomputed" else nullcontext()
    if kind == "kept" and device.type == "cpu":
        keep_memory()
    with faster, saving:
        learn(), step(), learn()  # warms up, and makes the momenta
        before = resource.getrusage(resource.RUSAGE_SELF)
        times = [learn() for _ in range(10 if device.type == "cuda" else 3)]
        after = resource.getrusage(resource.RUSAGE_SELF)
        update = step()
        peak_memory = peak_mebibytes(device)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            learn()
    seconds = min(times) * (batch / micro) + update
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "kind": kind,
        "crops_a_second": round(batch / seconds, 3),
        "seconds_a_micro_batch": round(min(times), 3),
        "seconds_system": round((after.ru_stime - before.ru_stime) / len(times), 3),
        "new_pages": round((after.ru_minflt - before.ru_minflt) / len(times)),
        "seconds_optimizer": round(update, 3),
        "seconds_an_update": round(seconds, 2),
        "peak_mebibytes": peak_memory,
        "shares": {} if device.type == "cuda" else shares(profiler, model),
    }


def shares(profiler: profile, model: DeconvNet) -> dict[str, float]:
    """Which share of the operations' time each kind of layer takes, forward and backward."""
    fc_shapes = set()
    for part in (model.fc6, model.fc7, model.fc6_deconv):
        c, d, *k = part[0].weight.shape
        matrix = c, math.prod((d, *k))
        fc_shapes |= {(c, d, *k), (c, *k, d), matrix, matrix[::-1]}
    spent = dict.fromkeys(("fc layers", "convolutions", "batch norm", "the rest"), 0.0)
    for operation in profiler.key_averages(group_by_input_shape=True):
        shapes = {tuple(shape) for shape in operation.input_shapes}
        if shapes & fc_shapes or operation.key in ("aten::mm", "aten::addmm"):
            kind = "fc layers"  # their weights' journeys too
        elif "conv" in operation.key.lower():
            kind = "convolutions"
        else:
            kind = "batch norm" if "batch_norm" in operation.key else "the rest"
        spent[kind] += operation.self_cpu_time_total
    return {kind: round(time / sum(spent.values()), 3) for kind, time in spent.items()}


def in_a_fresh_process(options: argparse.Namespace, micro: int, dtype: str, kind: str) -> dict:
    """:func:`one_way` in a process of its own."""
    command = [sys.executable, __file__, "--way", dtype, kind, "--recipe", options.recipe]
    answer = subprocess.run(
        [*command, "--batch", str(options.batch), "--micro-batch", str(micro)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    return json.loads(answer.stdout.splitlines()[-1])


def data_path(config: ModelConfig, crops: int = 256) -> dict:
    """Crops a second of stage 1's data, decoded once, without and with processes to help."""
    paper = InstanceConfig.paper()
    instances = replace(
        paper,
        crop=config.input_size,
        resize=round(config.input_size * paper.resize / paper.crop),
    )
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        root = write_shapes(folder, train=32, val=1, workers=1, progress=False)
        dataset = Stage1Dataset(VOCDataset(root, "train", decode_cache=True), instances)
        indices = balanced_indices(dataset.example_labels, 0)
        for workers, name in ((0, "one_process"), (os.cpu_count() or 1, "a_process_a_core")):
            sampler = StreamSampler(len(dataset), seed=0, length=2 * crops, indices=indices)
            loader = DataLoader(
                dataset, 8, sampler=sampler, num_workers=workers, worker_init_fn=prepare_worker
            )
            seen = 0
            for images, _ in loader:
                seen += len(images)
                if seen == crops:  # the first half starts the processes and warms up
                    start = time.perf_counter()
            found[f"crops_a_second_{name}"] = round(crops / (time.perf_counter() - start), 1)
    return found


if __name__ == "__main__":
    main()
