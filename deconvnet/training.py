"""Two-stage training: a plain loop that can be killed at any moment and goes on as if never.

Everything random in a step follows from the seed and the step's number, and a checkpoint
holds all else, so a resumed run on the CPU equals the uninterrupted one bit for bit.

Sources: Noh, Hong, Han, ICCV 2015, section 4; the authors' release,
``training/001_stage_1/solver.prototxt`` and ``training/002_stage_2/solver.prototxt``.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from deconvnet.deployment import matrix_products
from deconvnet.files import atomic_write, sole_use
from deconvnet.hardware import (
    PRECISIONS,
    autocast,
    choose_precision,
    default_device,
    join_processes,
    message_device,
)
from deconvnet.instances import StreamSampler
from deconvnet.supervision import coarse_labels
from deconvnet.voc import VOID

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
LOG_COLUMNS = ("iteration", "seconds", "loss", "rate", "images_per_s", "validation")


@dataclass(frozen=True)
class StageConfig:
    """How one stage is trained.

    Rates, schedule, batch and length are stage 1's in the release's ``solver.prototxt``, where the
    comment doesn't say otherwise; how often is validated, saved and logged is ours.
    """

    iterations: int = 20_000  # updates of the weights
    batch_size: int = 64  # crops per update, over all processes
    micro_batch: int = 8  # crops per forward pass; gradients of the rest accumulate
    optimizer: str = "sgd"  # "sgd" with momentum, or "adamw" (a departure from the paper)
    learning_rate: float = 0.01  # of weights; biases learn at twice the rate
    encoder_rate: float = 1.0  # factor on the encoder's rate; 1 in the paper
    bias_rate: float = 2.0  # factor on the rate of biases (the release's) and batch norm (ours)
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0005  # on weights; not on biases, nor (ours) on batch norm
    schedule: str = "step"  # "step", "plateau" (the paper's), "poly" or "constant"
    step_size: int = 9_000  # iterations between drops of "step"
    drop: float = 0.1  # factor of one drop, for "step" and "plateau"
    patience: int = 3  # validations without progress before "plateau" drops
    warmup: int = 0  # iterations of linear warm-up; none in the paper
    frozen_blocks: int = 0  # encoder blocks left as they were loaded; none in the paper
    minutes: float | None = None  # stop after so much training time, whatever the iterations
    precision: str = "auto"  # see deconvnet.hardware.choose_precision
    validate_every: int = 1_000  # iterations between validations; the release: 500
    checkpoint_every: int = 500  # iterations between checkpoints
    log_every: int = 20  # iterations between rows of log.csv
    deep_supervision: float = 0.0  # weight of a DeeplySupervised network's inner losses; ours
    recompute: bool = False  # save memory: blocks run again for their gradients
    workers: int = 0  # processes that prepare crops
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("step", "plateau", "poly", "constant")),
            ("precision", PRECISIONS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}")
        for field in ("iterations", "batch_size", "micro_batch", "step_size", "patience",
                      "validate_every", "checkpoint_every", "log_every"):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("warmup", "frozen_blocks", "workers", "seed"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for field in ("encoder_rate", "bias_rate", "weight_decay", "deep_supervision"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")
        if not 0 < self.drop <= 1:
            raise ValueError(f"drop must be above 0 and at most 1, got {self.drop}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, or None; got {self.minutes}")
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch, got {self.batch_size} "
                f"and {self.micro_batch}"
            )

    @classmethod
    def paper(cls, stage: int = 1) -> StageConfig:
        """The paper's way: the rate drops when validation stalls."""
        return replace(cls.release(stage), schedule="plateau")

    @classmethod
    def release(cls, stage: int = 1) -> StageConfig:
        """The release's way: the rate drops every 9,000 (stage 1) or 10,000 iterations."""
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {stage}")
        return cls() if stage == 1 else cls(iterations=40_000, step_size=10_000)

    @classmethod
    def small(cls, minutes: float | None = None, iterations: int = 1_000) -> StageConfig:
        """Minutes on a CPU: AdamW with warm-up, which starts a deep decoder far sooner."""
        return cls(
            iterations=iterations,
            batch_size=32,
            micro_batch=32,
            optimizer="adamw",
            learning_rate=1e-3,
            bias_rate=1.0,
            weight_decay=0.01,
            schedule="poly",
            warmup=50,
            minutes=minutes,
            validate_every=500,
            checkpoint_every=200,
        )


class TrainingDiverged(RuntimeError):
    """The loss became infinite or not a number."""


def train(
    model: nn.Module,
    dataset: Dataset,
    stage: StageConfig,
    run_dir: str | Path,
    *,
    indices: Tensor | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = True,
    about: Mapping[str, object] | None = None,
) -> nn.Module:
    """Trains a model on one stage's crops.

    Under ``torchrun`` every process takes its share of each batch. Every update seeds PyTorch's
    generator anew, so that a run which was interrupted goes on as if it had not been.

    Args:
        model: Maps ``uint8 [N, 3, S, S]`` to scores ``[N, C, S, S]``; trained in place.
        dataset: Gives ``(image uint8 [3, S, S], labels uint8 [S, S])`` for ``(index, draw)``,
            such as :class:`deconvnet.instances.Stage1Dataset`.
        stage: Solver settings.
        run_dir: Receives ``checkpoint.pt`` and ``log.csv``.
        indices: The examples to draw from, repeats included
            (:func:`deconvnet.instances.balanced_indices`); all by default.
        validate: Called every ``stage.validate_every`` iterations; returns a figure to
            minimise, which is logged and steers ``schedule="plateau"``.
        device: Where to train; CUDA where there is one by default.
        resume: Go on from ``run_dir``'s checkpoint if there is one; False forgets it.
        progress: Show a progress bar.
        about: What else must be equal for a checkpoint to be gone on from, such as the data's
            name; strings and numbers.

    Returns:
        The trained model, on ``device``, channels-last and in training mode: call ``eval()``
        before it segments.

    Raises:
        TrainingDiverged: The loss is not finite; the last good checkpoint stays.
        ValueError: The checkpoint belongs to other settings or data, or is damaged; another
            process trains in ``run_dir``; the data set is empty; the batch cannot be shared among
            the processes; ``schedule="plateau"`` has no ``validate``, or the network fewer blocks
            than are to be frozen.
        KeyboardInterrupt: After Ctrl-C, once the update under way is done and saved; a second
            Ctrl-C does not wait.
    """
    run = _Run(model, dataset, stage, Path(run_dir), indices, validate, device, about)
    try:
        with run.sole_use_of_folder():
            run.remove_leftovers()
            if resume:
                run.load()
            elif run.rank == 0:
                run.checkpoint.unlink(missing_ok=True)
            run.loop(progress)
    finally:
        for parameter in run.frozen_parameters:  # another training may want them
            parameter.requires_grad_(True)
        run.restore_norms()
    return model


class _Run:
    """The state of one training run: everything that a checkpoint holds."""

    def __init__(
        self, model, dataset, stage, run_dir, indices, validate, device, about=None
    ) -> None:
        self.rank, self.world_size = join_processes()
        share = stage.micro_batch * self.world_size
        if stage.batch_size % share:
            raise ValueError(
                f"batch_size {stage.batch_size} must be a multiple of micro_batch x processes "
                f"= {stage.micro_batch} x {self.world_size}"
            )
        if len(dataset) == 0:
            raise ValueError("the dataset has no examples to train on")
        if stage.schedule == "plateau" and validate is None:
            raise ValueError('schedule="plateau" needs the validate argument')
        self.accumulate = stage.batch_size // share
        self.stage, self.dataset, self.indices = stage, dataset, indices
        self.validate, self.run_dir = validate, run_dir
        drawn = b"" if indices is None else torch.as_tensor(indices).cpu().numpy().tobytes()
        which = hashlib.sha256(drawn).hexdigest()[:16]
        self.about = {**(about or {}), "examples": len(dataset), "indices": which}
        self.device = torch.device(device) if device else default_device()
        self.model = model.to(self.device, memory_format=torch.channels_last)
        before = {p for p in model.parameters() if p.requires_grad}
        self.frozen = freeze_blocks(model, stage.frozen_blocks)
        self.frozen_parameters = [p for p in before if not p.requires_grad]
        self.optimizer = make_optimizer(model, stage)
        self.precision = choose_precision(stage.precision, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == torch.float16
        )
        self.iteration, self.seconds, self.row_bytes = 0, 0.0, 0
        self.plateau = Plateau(stage.drop, stage.patience)
        self.norms: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, what was there

    # --- the loop -----------------------------------------------------------------------------

    def loop(self, progress: bool) -> None:
        stage, network = self.stage, self.distributed_model()
        bar = tqdm(
            total=stage.iterations,
            initial=self.iteration,
            unit="it",
            dynamic_ncols=True,
            disable=not progress or self.rank > 0,
        )
        self.train_mode()
        saving = recomputed(self.model) if stage.recompute else nullcontext()
        faster, interrupt = matrix_products(self.model), deferred_interrupt()
        with bar, saving, faster, self.batches() as batches, interrupt as interrupted:
            clock = time.perf_counter()
            while self.progress() < 1:
                self.set_seed()
                rate = self.set_rate()
                loss = self.update(network, [next(batches) for _ in range(self.accumulate)])
                self.iteration += 1
                now = time.perf_counter()
                self.seconds, clock = self.seconds + now - clock, now
                if stage.minutes is not None:
                    self.seconds = self.shared(self.seconds)
                last, stopping = self.progress() >= 1, self.any_process(interrupted())
                score = None
                if self.validate and (self.iteration % stage.validate_every == 0 or last):
                    score = self.run_validation()
                    # Not the one at the end: a run that is made longer would have one more.
                    if self.iteration % stage.validate_every == 0:
                        self.plateau.update(score)
                    clock = time.perf_counter()  # validation is not training time
                if self.iteration % stage.log_every == 0 or last or score is not None:
                    value = self.checked(loss)
                    speed = self.iteration * stage.batch_size / max(self.seconds, 1e-9)
                    bar.set_postfix(loss=f"{value:.3f}", lr=f"{rate:.1e}", imgs=f"{speed:.1f}/s")
                    self.log(value, rate, speed, score)
                bar.update(1)
                if self.iteration % stage.checkpoint_every == 0 or last or stopping:
                    self.checked(loss)
                    self.save()
                if stopping:
                    raise KeyboardInterrupt
            if self.any_process(interrupted()):  # during the last validation or the last save
                raise KeyboardInterrupt

    def update(self, network: nn.Module, micro_batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One update of the weights; returns the mean loss over the whole batch's pixels."""
        valid = sum((labels != VOID).sum() for _, labels in micro_batches)
        valid = valid.to(self.device, non_blocking=True)  # the last update may still be under way
        if self.world_size > 1:
            dist.all_reduce(valid)
        pixels = valid.clamp(min=1)
        total = torch.zeros((), device=self.device)
        for i, (images, labels) in enumerate(micro_batches):
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True).long()
            # Gradients cross processes once per update, with the last micro-batch.
            last = i == len(micro_batches) - 1
            waiting = nullcontext() if last or self.world_size == 1 else network.no_sync()
            with waiting:
                with autocast(self.device, self.precision):
                    scores = network(images)
                loss = self.loss(scores, labels) / pixels
                # DDP averages over processes where the batch's mean needs their sum.
                self.scaler.scale(loss * self.world_size).backward()
            total += loss.detach()
        if self.world_size > 1:
            dist.all_reduce(total)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def loss(self, scores: Tensor | list[Tensor], labels: Tensor) -> Tensor:
        """The summed loss of the scores, and of what a deeply supervised network adds to them."""
        if isinstance(scores, Tensor):
            return pixel_loss(scores.float(), labels)
        total = pixel_loss(scores[0].float(), labels)
        for coarse in scores[1:]:
            target = coarse_labels(labels, coarse.shape[-1])
            pixels = labels.numel() / target.numel()  # that each coarse one stands for
            total += self.stage.deep_supervision * pixels * pixel_loss(coarse.float(), target)
        return total

    @contextmanager
    def batches(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        stage = self.stage
        sampler = StreamSampler(
            len(self.dataset),
            seed=stage.seed,
            rank=self.rank,
            world_size=self.world_size,
            start=self.iteration * stage.batch_size,
            indices=self.indices,
        )
        # A loader draws its workers' seed from the global generator; ours leaves that alone.
        loader = DataLoader(
            self.dataset,
            batch_size=stage.micro_batch,
            sampler=sampler,
            num_workers=stage.workers,
            worker_init_fn=prepare_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(stage.seed),
        )
        batches = iter(loader)
        try:
            yield batches
        finally:
            # An error's traceback may be kept (Jupyter does), and its frames hold the iterator,
            # torch's own frames too: forgetting ours would not end the workers.
            if stage.workers:
                batches._shutdown_workers()

    def progress(self) -> float:
        """How much of the stage is done, from 0 to 1, by iterations or by time."""
        done = self.iteration / self.stage.iterations
        if self.stage.minutes is not None:
            done = max(done, self.seconds / 60 / self.stage.minutes)
        return done

    def set_seed(self) -> None:
        """Seeds dropout from the seed, the step and the process, so that no state is needed."""
        sequence = np.random.SeedSequence((self.stage.seed, self.iteration, self.rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def shared(self, value: float) -> float:
        """Returns the first process's value, so that all of them decide alike."""
        if self.world_size == 1:
            return value
        message = torch.tensor(value, dtype=torch.float64, device=message_device(self.device))
        dist.broadcast(message, src=0)
        return message.item()

    def any_process(self, answer: bool) -> bool:
        """Whether any process says yes, so that all of them stop after the same update."""
        if self.world_size == 1:
            return answer
        votes = torch.tensor(int(answer), device=message_device(self.device))
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def set_rate(self) -> float:
        rate = self.stage.learning_rate * schedule_factor(
            self.stage, self.iteration, self.progress(), self.plateau.factor
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        return rate

    def train_mode(self) -> None:
        self.model.train()
        for module in self.frozen:  # frozen blocks keep their batch statistics too
            module.eval()

    def distributed_model(self) -> nn.Module:
        if self.world_size == 1:
            return self.model
        network = self.model
        if self.device.type == "cuda":
            self.norms = [
                (parent, name, child)
                for parent in network.modules()
                for name, child in parent.named_children()
                if isinstance(child, NORMS)
            ]
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return nn.parallel.DistributedDataParallel(network)

    def restore_norms(self) -> None:
        """Puts back the norms that synchronised ones replaced: these work in one process too.

        Parameters and statistics are shared by both, so what was learned is theirs.
        """
        for parent, name, norm in self.norms:
            norm.train(getattr(parent, name).training)
            setattr(parent, name, norm)

    def run_validation(self) -> float:
        self.model.eval()
        with torch.no_grad():
            score = self.shared(float(self.validate(self.model)))
        self.train_mode()
        return score

    def checked(self, loss: Tensor) -> float:
        """Returns the loss as a number, or says why training cannot go on."""
        value = float(loss)
        if not math.isfinite(value):
            self.diverged(f"the loss is {value}")
        return value

    def diverged(self, what: str) -> None:
        kept = self.checkpoint if self.checkpoint.exists() else "none was written yet"
        raise TrainingDiverged(
            f"{what} at iteration {self.iteration}; lower learning_rate or lengthen warmup. "
            f"The last good checkpoint: {kept}"
        )

    # --- files --------------------------------------------------------------------------------

    @contextmanager
    def sole_use_of_folder(self) -> Iterator[None]:
        """Keeps other runs out of the folder. Where the first process is refused, all stop."""
        with ExitStack() as stack:
            refusal = None
            if self.rank == 0:  # it alone writes
                try:
                    stack.enter_context(sole_use(self.run_dir))
                except (OSError, ValueError) as error:
                    refusal = error
            if self.any_process(refusal is not None):
                raise refusal or ValueError(f"{self.run_dir}: refused to the first process")
            yield

    @property
    def checkpoint(self) -> Path:
        return self.run_dir / "checkpoint.pt"

    def log(self, loss: float, rate: float, speed: float, score: float | None) -> None:
        if self.rank > 0:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "log.csv"
        if not path.exists():  # or somebody has removed it
            self.row_bytes = 0
        # After a kill the log may run ahead of the checkpoint: cut it back to where we are.
        with open(path, "r+" if path.exists() else "w+", newline="") as file:
            file.truncate(self.row_bytes)
            file.seek(self.row_bytes)
            rows = csv.writer(file)
            if self.row_bytes == 0:
                rows.writerow(LOG_COLUMNS)
            rows.writerow(
                [
                    self.iteration,
                    f"{self.seconds:.1f}",
                    f"{loss:.6g}",
                    f"{rate:.6g}",
                    f"{speed:.1f}",
                    "" if score is None else f"{score:.6g}",
                ]
            )
            self.row_bytes = file.tell()

    def save(self) -> None:
        weights = self.model.state_dict()
        # A finite loss may still have had gradients that were not.
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            self.diverged("the weights are not finite")
        if self.rank == 0:
            state = {
                "stage": asdict(self.stage),
                "about": self.about,
                "model": weights,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "plateau": vars(self.plateau),
                "iteration": self.iteration,
                "seconds": self.seconds,
                "row_bytes": self.row_bytes,
            }
            with atomic_write(self.checkpoint) as temporary:
                try:
                    torch.save(state, temporary)
                except RuntimeError as error:  # torch's names neither the file nor the disk
                    reason = str(error).partition("\n")[0]  # without the trace of its C++
                    raise OSError(
                        f"{self.checkpoint}: could not be written in full; is there room on the "
                        f"disk? (torch: {reason})"
                    ) from error
        if self.world_size > 1:
            dist.barrier()  # nobody leaves before the checkpoint is there to be read

    def remove_leftovers(self) -> None:
        """Removes what runs that were killed while they saved have left: a whole model each."""
        if self.rank == 0:  # the only one that saves
            # The command line writes the trained weights into the same folder.
            for name in (self.checkpoint.name, "weights.safetensors"):
                for path in self.run_dir.glob(f".{name}.*"):
                    path.unlink(missing_ok=True)

    def load(self) -> None:
        if self.checkpoint.exists():
            self.restore(self.read())
        if self.shared(self.iteration) != self.iteration:
            raise ValueError(f"{self.run_dir}: must be one folder that all processes share")

    def read(self) -> dict:
        """Returns the checkpoint, if it is whole and this run's."""
        instead = "use another run_dir, or resume=False (--restart) to start anew"
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            settings = state["stage"]
        except Exception as error:  # zip, pickle and torch each have their own
            raise ValueError(
                f"{self.checkpoint}: not a whole checkpoint ({type(error).__name__}); {instead}"
            ) from error
        # A run may be made longer or logged otherwise; all else would no longer be one run.
        free = {
            "iterations", "minutes", "workers", "log_every", "checkpoint_every", "recompute",
        }  # fmt: skip
        about = state.get("about", {})
        written, own = settings | about, asdict(self.stage) | self.about
        # Those of an older version don't say which examples they have learned from.
        free |= {"examples", "indices"} - about.keys()
        for field in own | about:
            if field not in free and written.get(field) != own.get(field):
                raise ValueError(
                    f"{self.checkpoint}: was written with {field}={written.get(field)!r}, this "
                    f"run has {own.get(field)!r}; {instead}"
                )
        own = self.model.state_dict()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state["model"].items()}:
            raise ValueError(f"{self.checkpoint}: holds another network than this run's; {instead}")
        return state

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where it was written without float16
            self.scaler.load_state_dict(state["scaler"])
        vars(self.plateau).update(state["plateau"])
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        log = self.run_dir / "log.csv"
        size = log.stat().st_size if log.exists() else 0
        self.row_bytes = min(state["row_bytes"], size)
        # A run that is done already writes no row, so `log` would never cut these off.
        if self.rank == 0 and size > self.row_bytes:
            os.truncate(log, self.row_bytes)


def trained_so_far(run_dir: str | Path) -> tuple[int, float]:
    """Updates and seconds of training that the checkpoint in a run's folder stands for.

    The log may end a few updates earlier, if the run was interrupted.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """
    path = Path(run_dir) / "checkpoint.pt"
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state["iteration"], state["seconds"]


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Lets the encoder's and decoder's blocks forget what happened inside them.

    Each block keeps only its input, and runs a second time when its gradients are wanted: the
    same gradients for a third more arithmetic and a fraction of the memory. (Called activation
    or gradient checkpointing elsewhere; here a checkpoint is a file.)

    Args:
        model: With ``encoder.blocks``, and perhaps ``decoder.blocks``, changed while inside.
    """
    coders = (getattr(model, name, None) for name in ("encoder", "decoder"))
    blocks = [block for coder in coders if coder is not None for block in coder.blocks]

    def twice(block: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not (block.training and torch.is_grad_enabled()):
                return once(x)
            contexts = lambda: (nullcontext(), unchanged_statistics(block))  # noqa: E731
            return checkpoint(once, x, use_reentrant=False, context_fn=contexts)

        once = block.forward
        return forward

    for block in blocks:
        block.forward = twice(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again


@contextmanager
def unchanged_statistics(block: nn.Module) -> Iterator[None]:
    """Keeps batch norm from counting the same batch into its running averages twice."""
    with batch_norm_momentum(block, 0.0) as norms:  # the share of this batch in the averages
        try:
            yield
        finally:
            for norm in norms:
                norm.num_batches_tracked -= 1


@contextmanager
def batch_norm_momentum(model: nn.Module, momentum: float | None) -> Iterator[list[nn.Module]]:
    """Gives a network's batch norms another momentum while inside.

    Args:
        model: The network.
        momentum: The share of a batch in the running averages; None averages over all batches.

    Yields:
        The batch norms.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    before = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = momentum
        yield norms
    finally:
        for norm, own in zip(norms, before):
            norm.momentum = own


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C back, since half an update could not be resumed; a second one acts at once.

    Yields:
        A function that tells whether Ctrl-C was pressed.
    """
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread receives signals
        return
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield lambda: False  # as in a script's `command &`: Ctrl-C is meant for others
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def prepare_worker(worker: int) -> None:
    """Makes a loader's process single threaded, and leaves Ctrl-C to the main process."""
    cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- the pieces -------------------------------------------------------------------------------


def pixel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy summed over all pixels that are not void.

    Args:
        scores: ``float [N, C, H, W]``.
        labels: ``int64 [N, H, W]``; 255 is ignored.
    """
    return F.cross_entropy(scores, labels, ignore_index=VOID, reduction="sum")


def schedule_factor(stage: StageConfig, iteration: int, progress: float, plateau: float) -> float:
    """Returns the factor on the base learning rate.

    Args:
        stage: Solver settings.
        iteration: Updates done so far.
        progress: Share of the stage done, 0 to 1.
        plateau: The drops of ``"plateau"`` so far, multiplied.
    """
    factor = {
        "constant": 1.0,
        "step": stage.drop ** (iteration // stage.step_size),
        "plateau": plateau,
        "poly": (1 - min(progress, 1.0)) ** 0.9,
    }[stage.schedule]
    return factor * min(1.0, (iteration + 1) / (stage.warmup + 1))


class Plateau:
    """Lowers the rate when a validation figure stops falling, as the paper does."""

    def __init__(self, drop: float, patience: int) -> None:
        self.drop, self.patience = drop, patience
        self.factor, self.best, self.stalled = 1.0, math.inf, 0

    def update(self, score: float) -> None:
        """Takes one validation figure (lower is better)."""
        if score < self.best:
            self.best, self.stalled = score, 0
            return
        self.stalled += 1
        if self.stalled >= self.patience:
            self.factor, self.stalled = self.factor * self.drop, 0


def make_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.Optimizer:
    """Builds the optimiser with two kinds of parameters.

    Weights decay and learn at the base rate; biases and batch norm do not decay and learn at
    ``stage.bias_rate`` times it. For weights and biases that is the release's rule (``blobs_lr``
    and ``weight_decay`` in ``stage_1_train.prototxt``). For batch norm it is ours: its layers name
    no rates there, so by Caffe's defaults scale and shift learn at the base rate, and decay.
    The encoder's rate may be scaled by ``stage.encoder_rate``.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    encoder = set(model.encoder.parameters()) if hasattr(model, "encoder") else set()
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = parameter in encoder, parameter.ndim > 1
            groups.setdefault(key, []).append(parameter)
    settings = [
        {
            "params": parameters,
            "weight_decay": stage.weight_decay if is_weight else 0.0,
            "rate": (stage.encoder_rate if is_encoder else 1.0)
            * (1.0 if is_weight else stage.bias_rate),
        }
        for (is_encoder, is_weight), parameters in groups.items()
    ]
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=stage.learning_rate)
    return torch.optim.SGD(settings, lr=stage.learning_rate, momentum=stage.momentum)


def freeze_blocks(model: nn.Module, count: int) -> list[nn.Module]:
    """Stops the gradients of the encoder's first ``count`` blocks and returns those blocks."""
    if count == 0:
        return []
    if count > len(model.encoder.blocks):
        raise ValueError(f"frozen_blocks is {count}, the encoder has {len(model.encoder.blocks)}")
    blocks = list(model.encoder.blocks[:count])
    for block in blocks:
        block.requires_grad_(False)
    return blocks


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    dataset: Dataset,
    crops: int = 501 * 28,
    batch: int = 28,
    seed: int = 0,
    indices: Tensor | None = None,
    workers: int = 0,
    progress: bool = False,
    frozen_blocks: int = 0,
) -> None:
    """Replaces the running averages of batch norm by averages over many training crops.

    The release does so after training, over 501 batches of 28 crops, before it folds batch
    norm into the convolutions. Crops follow from the seed alone, so that the same network gets
    the same statistics again, in every process.

    Args:
        model: The trained network; its statistics are replaced in place.
        dataset: The training crops.
        crops: How many crops to average over.
        batch: Crops per forward pass.
        seed: Seeds the choice of crops.
        indices: The examples to draw from, as in :func:`train`; all by default.
        workers: Processes that prepare crops.
        progress: Show a progress bar.
        frozen_blocks: The encoder's first blocks, which were trained with the statistics that
            they have and keep them.
    """
    length = max(crops // batch, 1) * batch
    sampler = StreamSampler(len(dataset), seed=seed, length=length, indices=indices)
    loader = DataLoader(
        dataset, batch, sampler=sampler, num_workers=workers, worker_init_fn=prepare_worker
    )
    device = next(model.parameters()).device
    was_training = model.training
    left_alone = set(model.encoder.blocks[:frozen_blocks].modules() if frozen_blocks else ())
    before = {name: statistic.clone() for name, statistic in model.named_buffers()}
    model.eval()  # without dropout, as at inference
    try:
        with batch_norm_momentum(model, None) as norms:
            for norm in norms:
                if norm not in left_alone:
                    norm.reset_running_stats()
                    norm.train()
            for images, _ in tqdm(loader, "batch norm", unit="batch", disable=not progress):
                model(images.to(device))
    except BaseException:  # Ctrl-C too: averages of a few crops would be worse than none
        model.load_state_dict(before, strict=False)
        raise
    finally:
        model.train(was_training)


@torch.no_grad()
def crop_loss(model: nn.Module, dataset: Dataset, crops: int = 256, batch: int = 32) -> float:
    """Returns the mean loss per valid pixel over crops spread evenly over a validation dataset.

    Args:
        model: Maps ``uint8 [N, 3, S, S]`` to scores ``[N, C, S, S]``, in evaluation mode.
        dataset: The crops, by image: the first ones alone would be those of a few images.
        crops: At most so many of them.
        batch: Crops per forward pass.

    Raises:
        ValueError: All pixels of these crops are void.
    """
    device = next(model.parameters()).device
    total, valid = 0.0, 0
    count = min(crops, len(dataset))
    sampler = [i * len(dataset) // count for i in range(count)]
    for images, labels in DataLoader(dataset, batch_size=batch, sampler=sampler):
        labels = labels.to(device).long()
        total += pixel_loss(model(images.to(device)).float(), labels).item()
        valid += int((labels != VOID).sum())
    if valid == 0:  # 0 would be a perfect score, which no later one could beat
        raise ValueError(
            f"dataset must have crops with pixels that are not void ({VOID}), found none in "
            f"{count} of its {len(dataset)} crops"
        )
    return total / valid
