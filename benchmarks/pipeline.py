"""Where the time of a whole image goes: from a photograph over 50 proposals to a label map.

    OMP_NUM_THREADS=2 python benchmarks/pipeline.py --json

Stage by stage, for the full network (untrained: the time is the same) and the tiny one, the best
of the rounds. Then how the time grows with the image, the number of proposals and the network's
width, and how much memory a process needs, each number of proposals in a fresh one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from network import natural_crops, peak_mebibytes, timed, untrained_but_lively
from torch import Tensor, nn
from torch.nn import functional as F

from deconvnet.aggregation import ScoreCanvas, cut_crops
from deconvnet.crf import CRFConfig, dense_crf
from deconvnet.deployment import prepare_for_inference
from deconvnet.evaluation import provenance, record
from deconvnet.hardware import choose_precision, default_device
from deconvnet.inference import InferenceConfig, select_boxes
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.proposals import EdgeBoxesConfig, edge_boxes
from deconvnet.shapes import make_scene
from deconvnet.weights import load_model, pretrained

STAGES = ("Edge Boxes", "crops", "network", "pasting", "labels", "CRF")
SIZE = (375, 500)  # of a typical VOC photograph, height and width


def main() -> None:
    """Runs the benchmark and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proposals", type=int, default=50, help="crops an image (the paper's 50)")
    parser.add_argument("--batch", type=int, default=10, help="crops at once")
    parser.add_argument("--rounds", type=int, default=2, help="of which the best counts")
    parser.add_argument(
        "--networks", nargs="+", choices=("full", "tiny"), default=("full", "tiny"), help="which"
    )
    parser.add_argument("--no-scaling", action="store_true", help="only the stages")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", help="also write it to this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # of this network, in this process
    options = parser.parse_args()

    device = default_device()
    if options.peak:
        print(json.dumps(peak_memory(options.peak, options.proposals, options.batch, device)))
        return
    image = photograph(*SIZE)
    result: dict = {"size": list(SIZE), "proposals": options.proposals, "batch": options.batch}
    for name in options.networks:
        for precision in precisions(device):
            model = make_network(name, device, precision)
            counts = options.proposals, options.batch
            seconds = best_of(options.rounds, model, image.to(device), *counts)
            rest = sum(seconds[s] for s in STAGES if s not in ("network", "CRF"))
            result.setdefault("networks", {})[f"{name}, {precision}"] = {
                "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
                "rest_by_network": round(rest / seconds["network"], 4),
            }
            del model
    if not options.no_scaling:
        result["scaling"] = scaling(image, options.batch, device)
        result["memory"] = [
            in_a_fresh_process(name, count, options.batch)
            for name in options.networks
            for count in (10, 50, 200)
        ]
    result |= provenance()
    if options.out:
        record(options.out, **result)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{'':26}" + "".join(f"{stage:>12}" for stage in STAGES) + "   all but network and CRF")
    for name, found in result["networks"].items():
        row = "".join(f"{found['seconds'][stage]:10.3f} s" for stage in STAGES)
        print(f"{name:26}{row}   {found['rest_by_network']:.1%} of the network")
    for row in result.get("memory", []):
        print(row)


def precisions(device: torch.device) -> list[str]:
    """The number formats to measure, as :func:`make_network` takes them."""
    fastest = dtype_name(choose_precision("auto", device))
    if fastest == "float32" or device.type != "cpu":
        return list(dict.fromkeys(("float32", fastest)))
    return ["float32", fastest, f"{fastest} throughout"]


def make_network(name: str, device: torch.device, precision: str) -> nn.Module:
    """The full network without training, or the tiny one that comes with the package.

    "Throughout" means the encoder too, as the ``Predictor``'s ``precision="auto"`` has it.
    """
    dtype = getattr(torch, precision.split()[0])
    encoder_dtype = dtype if precision.endswith("throughout") else None
    if name == "full":
        model = untrained_but_lively(DeconvNet(ModelConfig()))
    else:
        model = load_model(pretrained("shapes-deconvnet"))
    return prepare_for_inference(model.to(device).eval(), dtype, encoder_dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def photograph(height: int, width: int) -> Tensor:
    """One of scikit-image's photographs at this size, or a scene where that is not installed."""
    try:
        from skimage import data

        pixels = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)
    except ImportError:
        pixels = make_scene(seed=0).image
    resized = F.interpolate(pixels[None].float(), (height, width), mode="bilinear", antialias=True)
    return resized[0].round().byte()


@torch.inference_mode()
def stages(
    model: nn.Module, image: Tensor, proposals: int, batch: int, crf: bool = True
) -> dict[str, float]:
    """Seconds of each stage, for one image."""
    seconds = dict.fromkeys(STAGES, 0.0)

    def clocked(stage: str, work: Callable, *arguments: object):
        start = time.perf_counter()
        result = work(*arguments)
        if image.is_cuda:
            torch.cuda.synchronize()
        seconds[stage] += time.perf_counter() - start
        return result

    config, size = model.config, tuple(image.shape[1:])
    found = clocked("Edge Boxes", edge_boxes, image.cpu(), EdgeBoxesConfig())
    boxes = select_boxes(found.boxes, size, replace(InferenceConfig(), num_proposals=proposals))
    canvas = ScoreCanvas(config.num_classes, size, device=image.device)
    for start in range(0, len(boxes), batch):
        part = boxes[start : start + batch]
        crops = clocked("crops", cut_crops, image, part, config.input_size)
        scores = clocked("network", model, crops)
        scores = clocked("pasting", scores.contiguous)
        for box, crop_scores in zip(part, scores):
            clocked("pasting", canvas.paste, box, crop_scores)
    probabilities = clocked("labels", canvas.scores.softmax, 0)
    clocked("labels", probabilities.argmax, 0)
    if crf:
        clocked("CRF", dense_crf, image, probabilities, CRFConfig())
    return seconds


def best_of(rounds: int, *case: object, **options: object) -> dict[str, float]:
    """The least of every stage over the rounds, after one that warms up."""
    stages(*case, **options)
    best = dict.fromkeys(STAGES, math.inf)
    for _ in range(rounds):
        for stage, value in stages(*case, **options).items():
            best[stage] = min(best[stage], value)
    return best


def scaling(image: Tensor, batch: int, device: torch.device) -> dict[str, list[dict]]:
    """How the time grows with image size and proposals (tiny network) and with width (full)."""
    tiny = make_network("tiny", device, "float32")
    by_size, by_proposals, by_width = [], [], []
    for factor in (0.5, 1.0, 2.0, 3.0):
        size = [round(side * factor) for side in SIZE]
        larger = F.interpolate(image[None].float(), size, mode="bilinear")[0].byte().to(device)
        seconds = best_of(2, tiny, larger, 50, batch, crf=False)
        by_size.append({"size": size, "seconds": rounded(seconds)})
    for count in (10, 25, 50, 100, 200):
        seconds = best_of(2, tiny, image.to(device), count, batch, crf=False)
        by_proposals.append({"proposals": count, "seconds": rounded(seconds)})
    crops = natural_crops(batch, 224).to(device)
    for factor in (0.25, 0.5, 0.75, 1.0):
        config = ModelConfig()
        widths = tuple(int(width * factor) for width in config.widths)
        narrow = replace(config, widths=widths, fc_width=int(config.fc_width * factor))
        model = DeconvNet(narrow).to(device).eval()
        fast = prepare_for_inference(model)
        taken = min(timed(fast, crops, batch) for _ in range(2))
        parameters = sum(p.numel() for p in model.parameters())
        by_width.append(
            {
                "factor": factor,
                "parameters": parameters,
                "seconds_a_crop": round(taken / batch, 4),
            }
        )
    return {"image": by_size, "proposals": by_proposals, "width": by_width}


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """The stages that took time, in seconds to a tenth of a millisecond."""
    return {stage: round(value, 4) for stage, value in seconds.items() if value}


def peak_memory(name: str, proposals: int, batch: int, device: torch.device) -> dict:
    """By how much one image raises the peak memory of this process, the network being loaded."""
    model = make_network(name, device, dtype_name(choose_precision("auto", device)))
    image = photograph(*SIZE).to(device)
    stages(model, image, batch, batch, crf=False)  # buffers that every further batch uses again
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stages(model, image, proposals, batch, crf=False)
    return {"network": name, "proposals": proposals, "peak_mebibytes": peak_mebibytes(device)}


def in_a_fresh_process(name: str, proposals: int, batch: int) -> dict:
    """:func:`peak_memory` in a process of its own, whose peak is hence its own."""
    command = [sys.executable, __file__, "--peak", name, "--proposals", str(proposals)]
    answer = subprocess.run(
        [*command, "--batch", str(batch)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    return json.loads(answer.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
