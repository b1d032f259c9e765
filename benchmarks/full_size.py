"""The full-size path, proven by a short run: the paper's network, real crops, stopped, resumed.

    python benchmarks/full_size.py --data data/VOCdevkit/VOC2012 \
        --vgg16 data/weights/vgg16_features_fp16.npz

Stage 1 of the recipe ``voc2012`` by the release's solver, in batches that a CPU can bear. Halfway
the run gets the signal of Ctrl-C; then it goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import signal
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch
from network import peak_mebibytes
from torch.utils.data import Dataset

from deconvnet import recipes
from deconvnet.evaluation import read_log, record
from deconvnet.folders import open_dataset
from deconvnet.hardware import choose_precision, default_device
from deconvnet.training import StageConfig


class CtrlC(Dataset):
    """Crops, and the signal of Ctrl-C when so many have been drawn.

    Args:
        crops: What to learn from.
        after: Crops.
    """

    def __init__(self, crops, after: int) -> None:
        self.crops, self.after = crops, after
        self.example_labels = crops.example_labels

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, key):
        self.after -= 1
        if self.after == 0:
            signal.raise_signal(signal.SIGINT)
        return self.crops[key]


def main() -> None:
    """Trains, is stopped, goes on, and records it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset-name", help="how the record calls the data (the folder's name)")
    parser.add_argument("--vgg16", help="ImageNet weights: a file, or vgg16; else from nothing")
    parser.add_argument("--recipe", choices=recipes.RECIPES, default="voc2012")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="crops an update (8; the paper: 64)")
    parser.add_argument("--run", type=Path, default=Path("runs/full-size"))
    parser.add_argument("--out", type=Path, default=Path("results/full-size.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none

    recipe, device = recipes.RECIPES[options.recipe](), default_device()
    data = open_dataset(options.data, "train", decode_cache=True)
    settings = replace(
        StageConfig.release(1),
        iterations=options.updates,
        batch_size=options.batch,
        micro_batch=min(options.batch, 8),
        log_every=1,
        checkpoint_every=options.updates,
    )
    stopped_at = options.updates // 2
    crops = recipes.stage_crops(recipe, "1", data)
    for interrupted in (True, False):
        torch.manual_seed(0)
        model = recipes.make_network(recipe, "1", data.num_classes, options.vgg16)
        drawn = CtrlC(crops, stopped_at * options.batch) if interrupted else crops
        try:
            recipes.train_stage(
                recipe, "1", model, drawn, options.run, settings=settings,
                resume=not interrupted,
            )  # fmt: skip
            assert not interrupted, "Ctrl-C did not stop the run"
        except KeyboardInterrupt:
            state = torch.load(options.run / "checkpoint.pt", weights_only=True)
            stopped_at = state["iteration"]
            print(f"stopped at update {stopped_at}; going on", flush=True)
            del state, model

    log = read_log(options.run / "log.csv")
    losses = [row["loss"] for row in log]
    part = max(len(losses) // 10, 1)
    first, last = statistics.mean(losses[:part]), statistics.mean(losses[-part:])
    seconds = log[-1]["seconds"] / len(log)
    print(f"loss {first:.2f} to {last:.2f}, {seconds:.2f} s an update")
    record(
        options.out,
        dataset=options.dataset_name or options.data.resolve().name,
        recipe=options.recipe,
        stage="1",
        parameters=sum(p.numel() for p in model.parameters()),
        settings=asdict(settings),
        precision=str(choose_precision(settings.precision, device)).removeprefix("torch."),
        seed=settings.seed,
        stopped_and_resumed_at=stopped_at,
        loss_of_first_tenth=round(first, 4),
        loss_of_last_tenth=round(last, 4),
        seconds_an_update=round(seconds, 3),
        peak_memory_gigabytes=round(peak_mebibytes(device) / 2**10, 2),
        checkpoint_gigabytes=round((options.run / "checkpoint.pt").stat().st_size / 2**30, 2),
        losses=[round(loss, 4) for loss in losses],
    )


if __name__ == "__main__":
    main()
