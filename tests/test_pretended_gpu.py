"""On a GPU that is only pretended, everything runs, and gives the CPU's figures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from pretended_gpu import OnGPU, pretended_gpu

from deconvnet import densecrf, recipes
from deconvnet.aggregation import ScoreCanvas
from deconvnet.crf import (
    METHODS,
    NORMALIZATIONS,
    CRFConfig,
    gibbs_energy,
    mean_field,
    pairwise_kernels,
    unary_from_probabilities,
)
from deconvnet.evaluation import evaluate, read_log
from deconvnet.hardware import choose_precision, default_device
from deconvnet.inference import InferenceConfig, Predictor
from deconvnet.proposals import edge_boxes
from deconvnet.shapes import make_scene
from deconvnet.training import reestimate_batch_norm, train
from deconvnet.voc import VOCDataset
from deconvnet.weights import load_model, pretrained

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real one")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with pretended_gpu() as device:
        yield device


def test_the_pretence_refuses_what_a_gpu_refuses(gpu: torch.device) -> None:
    there, here = torch.ones(2, device=gpu), torch.ones(2)
    assert default_device() == gpu == (2 * there).device
    assert choose_precision("auto", gpu) == torch.bfloat16
    assert here.to(gpu).is_cuda and not there.cpu().is_cuda
    assert there.sum().item() == 2
    for mixture in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: there.numpy(),
        lambda: np.asarray(there),
        lambda: here[there.long()],
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mixture()
    layer = torch.nn.Linear(2, 1).to(gpu)
    with pytest.raises(RuntimeError, match="same device"):
        layer(here)
    layer(there).sum().backward()
    assert layer.weight.grad.is_cuda
    assert isinstance(copy.deepcopy(layer).weight, OnGPU)


@pytest.mark.parametrize("convention", ["paper", "release"])
@pytest.mark.parametrize("prepare", [True, False])
def test_predictor(gpu: torch.device, convention: str, prepare: bool) -> None:
    scene = make_scene(seed=1).image
    boxes = edge_boxes(scene)
    config = InferenceConfig(convention=convention, num_proposals=5, precision="float32")
    found = {}
    for device in ("cpu", gpu):
        networks = [load_model(pretrained(f"shapes-{n}"), device) for n in ("deconvnet", "fcn")]
        crf = CRFConfig(iterations=2)
        predict = Predictor(*networks, config, crf=crf, device=device, prepare=prepare)
        found[device] = predict(scene, boxes)
    assert found[gpu].probabilities.is_cuda and not found[gpu].labels.is_cuda
    there, here = found[gpu].probabilities.cpu(), found["cpu"].probabilities
    torch.testing.assert_close(there, here, rtol=0, atol=0.01)
    assert (found[gpu].labels == found["cpu"].labels).float().mean() > 0.999


def test_boxes_of_a_few_pixels(gpu: torch.device) -> None:
    """Which no GPU shrinks a score map to: it runs out of shared memory."""
    interpolate = torch.nn.functional.interpolate

    def with_little_memory(x: torch.Tensor, size: tuple[int, int], **options) -> torch.Tensor:
        if x.is_cuda and x.shape[-1] > 64 * min(size):
            raise RuntimeError("Too much shared memory required")
        return interpolate(x, size, **options)

    scores = torch.randn(3, 224, 224)
    canvases = [ScoreCanvas(3, (40, 50), device=device) for device in ("cpu", gpu)]
    with mock.patch("deconvnet.aggregation.F.interpolate", with_little_memory):
        for canvas in canvases:
            for box in ((0, 0, 40, 30), (5, 5, 6, 25), (7, 9, 9, 11)):
                canvas.paste(box, scores.to(canvas.scores.device))
        with pytest.raises(RuntimeError, match="shared memory"):
            torch.nn.functional.interpolate(scores[None].to(gpu), (1, 20))
    assert torch.equal(canvases[0].scores, canvases[1].scores.cpu())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_crf(gpu: torch.device, method: str, normalization: str) -> None:
    image = make_scene(seed=1).image[:, :24, :32]
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(5, 24, 32, generator=generator).softmax(0)
    found = []
    for device in ("cpu", gpu):
        unary = unary_from_probabilities(probabilities.to(device))
        kernels = pairwise_kernels(image.to(device), CRFConfig(normalization=normalization), method)
        beliefs = mean_field(unary, kernels, 5)
        found.append((beliefs.cpu(), gibbs_energy(beliefs.argmax(0), unary, kernels)))
    (expected, energy), (beliefs, energy_there) = found
    torch.testing.assert_close(beliefs, expected, rtol=0, atol=1e-3)
    assert float(energy_there) == pytest.approx(float(energy), rel=1e-4)


def test_densecrf(gpu: torch.device) -> None:
    image = make_scene(seed=1).image[:, :24, :32].permute(1, 2, 0).numpy()
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), 24 * 32).T.reshape(5, 24, 32)
    found = []
    for device in ("cpu", gpu):
        crf = densecrf.DenseCRF2D(32, 24, 5, device=device)
        crf.setUnaryEnergy(densecrf.unary_from_softmax(probabilities.astype(np.float32)))
        crf.addPairwiseGaussian(3, 3)
        crf.addPairwiseBilateral(20, 3, image, 5)
        found.append(crf.inference(5))
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


@pytest.mark.parametrize("capability", [(9, 0), (7, 0)])  # bfloat16; float16, its loss scaled
def test_training_and_evaluation(
    capability: tuple[int, int], shapes_root: Path, tmp_path: Path
) -> None:
    recipe = recipes.tiny()
    dataset = VOCDataset(shapes_root, "train")
    crops = recipes.stage_crops(recipe, "1", dataset)
    settings = replace(
        recipe.stage1, iterations=3, minutes=None, batch_size=4, micro_batch=2, log_every=1
    )

    def learn(device: torch.device | str, precision: str) -> tuple[list[float | None], float]:
        torch.manual_seed(0)
        model = recipes.make_network(recipe, "1", dataset.num_classes)
        stage, folder = replace(settings, precision=precision), tmp_path / str(device)
        for _ in range(2):  # the second time there is a checkpoint to go on from
            train(model, crops, stage, folder, device=device, progress=False)
        reestimate_batch_norm(model, crops, 4, progress=False)
        predict = Predictor(model, edge_boxes=None, crf=None, device=device)
        scores = evaluate(
            lambda _, sample: {"deconvnet": predict(sample.image).labels},
            dataset,
            limit=2,
            progress=False,
        )
        losses = [row["loss"] for row in read_log(folder / "log.csv")]
        return losses, scores["deconvnet"].overall.pixel_accuracy()

    expected, accuracy = learn("cpu", "float32")
    with pretended_gpu(capability) as gpu:
        losses, accuracy_there = learn(gpu, "auto")
    # A GPU's autocast leaves the CPU's arithmetic alone, so these were float32's as well.
    assert losses == pytest.approx(expected, rel=1e-3)
    assert accuracy_there == pytest.approx(accuracy, abs=0.01)
