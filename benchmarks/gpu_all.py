"""Every benchmark and every check that needs a GPU, in one go.

    python benchmarks/gpu_all.py

Records go to ``results/`` with ``-gpu`` in their names; the figures of a CPU stay. What fails is
listed at the end, and the rest runs all the same. Without a GPU nothing runs: the list is printed,
and the exit code is 3. ``--list`` prints it anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from deconvnet.deployment import prepare_for_inference
from deconvnet.evaluation import read_log
from deconvnet.hardware import gathered, join_processes
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.training import StageConfig, train
from deconvnet.weights import load_model, pretrained

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = 3


@dataclass(frozen=True)
class Check:
    """One command, and what it is for."""

    name: str
    purpose: str
    arguments: tuple[str, ...]  # after ``python``
    gpus: int = 1  # that it needs
    module: str | None = None  # that must be importable besides the package's own


def checks() -> list[Check]:
    """All of them, the quick ones first."""

    def benchmark(name: str, purpose: str, *options: str, module: str | None = None) -> Check:
        out = f"results/{name}-gpu.json"
        arguments = (f"benchmarks/{name}.py", *options, "--out", out)
        return Check(name, purpose, arguments, module=module)

    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return [
        Check(
            "tests",
            "the tests that skip without CUDA, and all others on a machine that has it",
            ("-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"),
        ),
        Check(
            "scaled gradients",
            "float16 with its loss scaled: the weights move and stay finite",
            ("benchmarks/gpu_all.py", "--only-check", "float16"),
        ),
        Check(
            "prepared on a GPU",
            "the prepared network's scores on the GPU are the plain ones' on the CPU",
            ("benchmarks/gpu_all.py", "--only-check", "prepared"),
        ),
        Check(
            "two GPUs",
            "NCCL and SyncBatchNorm: two processes give the losses of one",
            (*two, "benchmarks/gpu_all.py", "--only-check", "nccl"),
            gpus=2,
        ),
        benchmark(
            "unpooling",
            "ours by Triton, PyTorch's, and by torch.compile",
            # with few crops the launch of a kernel takes longer than its work
            *("--compile", "--crops", "64"),
        ),
        benchmark(
            "network", "50 crops through the full network", *("--batch", "50", "--rounds", "5")
        ),
        benchmark("pipeline", "photograph to label map, stage by stage", "--batch", "50"),
        benchmark("training", "crops a second at batch 64, share of peak, the data path"),
        benchmark("crf", "the CRF beside pydensecrf", module="pydensecrf"),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs everything, or says why not.

    Returns:
        0 if all went well, 1 if something failed, 3 without a GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--only-check", choices=list(CHECKS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only_check:
        torch.backends.cudnn.allow_tf32 = False  # float32 is to have 24 bits
        CHECKS[options.only_check]()
        return 0
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.list or not gpus:
        for check in checks():
            print(f"{check.name}: {check.purpose}\n    python {' '.join(check.arguments)}")
        if not options.list:
            print("\nno CUDA GPU was found: nothing of this ran", file=sys.stderr)
        return 0 if options.list else NO_GPU
    outcomes = {check.name: run(check, gpus) for check in checks()}
    print()
    for name, outcome in outcomes.items():
        print(f"{name:20} {outcome}")
    return int("failed" in outcomes.values())


def run(check: Check, gpus: int) -> str:
    """Runs one command; returns how that went."""
    if gpus < check.gpus:
        return f"skipped: needs {check.gpus} GPUs, found {gpus}"
    if check.module and importlib.util.find_spec(check.module) is None:
        return f"skipped: needs {check.module} (pip install 'deconvnet[benchmark]')"
    print(f"--- {check.name}: {check.purpose}", flush=True)
    done = subprocess.run([sys.executable, *check.arguments], cwd=ROOT)
    return "failed" if done.returncode else "done"


# --- the checks that are no benchmarks --------------------------------------------------------


def check_float16() -> None:
    """Ten updates in float16, whose small gradients need the loss scaled."""
    torch.manual_seed(0)
    model = DeconvNet(ModelConfig.tiny(5))
    before = model.score.weight.clone()
    stage = StageConfig.small(iterations=10)
    with tempfile.TemporaryDirectory() as folder:
        trained = train(model, Squares(), replace(stage, precision="float16"), folder)
    after = trained.score.weight.cpu()
    assert after.isfinite().all() and not torch.equal(after, before), "the weights did not move"


def check_prepared() -> None:
    """The prepared network on the GPU against the plain one on the CPU."""
    model = load_model(pretrained("shapes-deconvnet")).eval()
    crops = torch.stack([Squares()[i][0] for i in range(16)])
    with torch.inference_mode():
        expected = model(crops)
        _, switches = model.encoder(model.normalise(crops))
        fast = prepare_for_inference(model.cuda())
        pooled, own = fast.encoder(fast.normalise(crops.cuda()))
        # A rounding may move a switch, and with it a few scores: both unpool by the same ones.
        drawn = fast.fc6_deconv(fast.fc7(fast.fc6(pooled[-1])))
        scores = fast.score(fast.decoder(drawn, [s.cuda() for s in switches])).cpu()
        kept = (fast(crops.cuda()).cpu().argmax(1) == expected.argmax(1)).float().mean()
    error = float((scores - expected).abs().max() / expected.abs().max())
    moved = max(float((a != b.cpu()).float().mean()) for a, b in zip(switches, own))
    print(f"largest relative difference {error:.1e}, switches moved {moved:.1e}, labels {kept:.3%}")
    assert error < 1e-3, error
    assert moved < 1e-3, moved
    assert kept > 0.999, kept


def check_nccl() -> None:
    """The losses of two processes with NCCL and SyncBatchNorm against those of one."""
    rank, processes = join_processes()
    stage = replace(StageConfig.small(iterations=5), precision="float32", log_every=1)
    # a CPU has no SyncBatchNorm: there the check is of the check itself
    config = replace(ModelConfig.tiny(5), batch_norm=torch.cuda.is_available())
    folder = Path(tempfile.gettempdir()) / f"deconvnet-nccl-{os.environ.get('MASTER_PORT')}"

    def losses(processes: int) -> torch.Tensor:
        torch.manual_seed(0)
        settings = replace(stage, micro_batch=stage.batch_size // processes)
        run_dir = folder / str(processes)
        train(DeconvNet(config), Squares(), settings, run_dir, resume=False, progress=False)
        return torch.tensor([row["loss"] for row in read_log(run_dir / "log.csv")])

    assert gathered(rank) == list(range(processes))
    together = losses(processes)
    dist.destroy_process_group()
    if rank == 0:
        os.environ["WORLD_SIZE"] = "1"
        alone = losses(1)
        print("together", together.tolist(), "alone", alone.tolist())
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


class Squares(torch.utils.data.Dataset):
    """Crops with a square of one of four classes on noise."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(image uint8 [3, 64, 64], labels uint8 [64, 64])``."""
        index = key[0] if isinstance(key, tuple) else key
        generator = torch.Generator().manual_seed(index)
        labels = torch.zeros(64, 64, dtype=torch.uint8)
        labels[16:48, 16:48] = 1 + index % 4
        noise = torch.randint(0, 50, (3, 64, 64), generator=generator, dtype=torch.uint8)
        return noise + 50 * labels, labels


CHECKS = {"float16": check_float16, "prepared": check_prepared, "nccl": check_nccl}


if __name__ == "__main__":
    sys.exit(main())
