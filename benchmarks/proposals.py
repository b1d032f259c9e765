"""How many objects Edge Boxes finds on a data set, by edge map and number of boxes.

    python benchmarks/proposals.py --data data/VOCdevkit/VOC2012 --edges gradient --json

Objects are the annotated boxes that are not marked difficult. Recall is the share of them that some
box covers with the given IoU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from deconvnet.evaluation import provenance, record
from deconvnet.folders import open_dataset
from deconvnet.proposals import compute_proposals, recall

COUNTS = (10, 50, 500, 2000)
OVERLAPS = (0.5, 0.7)


def main() -> None:
    """Measures each edge map that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset-name", help="how the record calls the data (the folder's name)")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument(
        "--edges", nargs="+", default=["gradient"], help="gradient, or OpenCV's model.yml.gz"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="record the results here")
    options = parser.parse_args()

    dataset = open_dataset(options.data, options.split, limit=options.limit)
    objects = [
        torch.tensor([a.box for a in dataset.annotations(i) if not a.difficult]).view(-1, 4)
        for i in range(len(dataset))
    ]
    measured = {}
    for edges in options.edges:
        started = time.process_time()
        model = None if edges == "gradient" else edges
        proposals = compute_proposals(dataset, model_path=model, progress=not options.json)
        measured[Path(edges).name] = {
            "cpu_seconds_an_image": round((time.process_time() - started) / len(dataset), 3),
            "recall": [
                {
                    "iou": iou,
                    "boxes": count,
                    "share": round(recall(proposals, objects, iou, count), 4),
                }
                for iou in OVERLAPS
                for count in COUNTS
            ],
        }
    facts = {
        "dataset": options.dataset_name or options.data.resolve().name,
        "split": options.split,
        "images": len(dataset),
        "objects": sum(map(len, objects)),
        "edges": measured,
    }
    if options.out is not None:
        record(options.out, **facts)
    if options.json:
        print(json.dumps({**facts, **provenance()}))
        return
    print("edges            IoU " + "".join(f"{count:>8}" for count in COUNTS) + "  boxes")
    for name, found in measured.items():
        for iou in OVERLAPS:
            shares = [row["share"] for row in found["recall"] if row["iou"] == iou]
            print(f"{name:16} {iou:.1f} " + "".join(f"{share:8.3f}" for share in shares))


if __name__ == "__main__":
    main()
