from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from deconvnet.crf import CRFConfig, dense_crf, mean_field, pairwise_kernels
from deconvnet.crf_tuning import GRID, CRFLayer, search_crf
from deconvnet.metrics import ConfusionMatrix
from deconvnet.shapes import CLASS_NAMES, ShapesConfig, make_scene
from deconvnet.voc import VOID

START = CRFConfig(bilateral_sigma_rgb=10.0, iterations=3)


def example(number: int):
    """A scene of the embedded data set, and a coarse, noisy opinion of its true labels."""
    scene = make_scene(ShapesConfig(min_side=64, max_side=72), seed=(17, number))
    known = F.one_hot(scene.labels.long() % VOID, len(CLASS_NAMES)).permute(2, 0, 1).float()
    size = scene.labels.shape
    coarse = F.adaptive_avg_pool2d(known, [side // 6 for side in size])
    scores = 5 * F.interpolate(coarse[None], size, mode="bilinear")[0]
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(number))
    return scene.image, (scores + noise).softmax(dim=0), scene.labels


@pytest.fixture(scope="module")
def examples():
    return [example(number) for number in range(4)]


def mean_iou(examples, config):
    confusion = ConfusionMatrix(len(CLASS_NAMES))
    for image, probabilities, labels in examples:
        if config is not None:
            probabilities = dense_crf(image, probabilities, config, "lattice")
        confusion.update(probabilities.argmax(dim=0).byte(), labels)
    return float(confusion.mean_iou())


def test_the_search_finds_the_best_of_its_grid(examples):
    grid = {"bilateral_weight": (0.0, 5.0), "gaussian_weight": (0.5, 3.0)}
    found = search_crf(examples[:2], grid, START, "lattice", progress=False)
    expected = [
        replace(START, bilateral_weight=b, gaussian_weight=g)
        for b in (0.0, 5.0)
        for g in (0.5, 3.0)
    ]
    assert [config for config, _ in found.tried] == expected
    for config, score in found.tried:
        assert score == pytest.approx(mean_iou(examples[:2], config))
    assert found.mean_iou == max(score for _, score in found.tried)
    assert (found.best, found.mean_iou) in found.tried
    assert found.without_crf == pytest.approx(mean_iou(examples[:2], None))
    assert found.mean_iou > found.without_crf + 0.05


def test_the_search_shows_its_progress_if_asked(examples, capsys):
    arguments = examples[:1], {"gaussian_weight": (1.0, 2.0)}, START, "lattice"
    search_crf(*arguments, progress=False)
    assert capsys.readouterr().err == ""
    search_crf(*arguments)
    assert "2/2" in capsys.readouterr().err


def test_the_default_grid_holds_the_default_setting():
    default = vars(CRFConfig())
    assert all(default[name] in values for name, values in GRID.items())


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"sigma": (1.0,)}, "'sigma', which is not a field of CRFConfig"),
        ({"gaussian_weight": ()}, "no value for 'gaussian_weight'"),
        ({"gaussian_sigma": (0.0,)}, "gaussian_sigma must be positive"),
    ],
)
def test_a_bad_grid_is_refused(examples, grid, message):
    with pytest.raises(ValueError, match=message):
        search_crf(examples, grid, progress=False)


def test_a_search_over_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        search_crf([], progress=False)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_gradients_reach_unaries_and_weights(method):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 4), generator=generator, dtype=torch.uint8)
    unary = torch.rand(3, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    config = CRFConfig(bilateral_sigma_rgb=80.0, bilateral_sigma=3.0)

    def refine(unary, weights):
        kernels = pairwise_kernels(image, config, method, torch.float64, weights)
        return mean_field(unary, kernels, 3)

    assert torch.autograd.gradcheck(refine, (unary, weights))


def test_the_layer_equals_the_function(examples):
    image, probabilities, _ = examples[0]
    layer = CRFLayer(START, "lattice")
    torch.testing.assert_close(
        layer(image, probabilities), dense_crf(image, probabilities, START, "lattice")
    )
    assert layer.config.bilateral_weight == pytest.approx(START.bilateral_weight)


def test_the_layer_stays_exact_under_autocast(examples):
    image, probabilities, _ = examples[0]
    layer = CRFLayer(START)
    expected = layer(image, probabilities)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(image, probabilities)
    assert torch.equal(found, expected)


def test_it_learns_the_weights_on_the_embedded_data(examples):
    layer = CRFLayer(replace(START, gaussian_weight=0.1, bilateral_weight=0.1), "lattice")
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.3)

    def loss_of(part):
        losses = [
            F.nll_loss(layer(i, p).log()[None], t.long()[None], ignore_index=VOID)
            for i, p, t in part
        ]
        return torch.stack(losses).mean()

    before = loss_of(examples[2:]).item()
    for _ in range(12):
        optimiser.zero_grad()
        loss_of(examples[:2]).backward()
        optimiser.step()
    assert layer.weights.min() > 0.2  # both kernels help
    assert loss_of(examples[2:]).item() < 0.8 * before  # on scenes that it has not seen
    assert mean_iou(examples[2:], layer.config) > mean_iou(examples[2:], None) + 0.05


def test_weights_that_cannot_be_learned_are_refused():
    with pytest.raises(ValueError, match=r"weights must be positive to be learned, got \[0.0"):
        CRFLayer(CRFConfig(gaussian_weight=0))
