"""Both ensembles, by hand and by their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deconvnet.ensemble import mean_of_probabilities, product_of_scores


def random_scores(seed: int, classes: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(classes, 3, 5, generator=generator)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), weight=st.floats(0.01, 100))
def test_mean_is_a_probability_map_between_its_parts(seed, weight):
    a, b = random_scores(seed).softmax(0), random_scores(seed + 1).softmax(0)
    mean = mean_of_probabilities(a, b, weights=(weight, 1))
    torch.testing.assert_close(mean.sum(0), torch.ones(3, 5))
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    assert (mean >= low - 1e-6).all() and (mean <= high + 1e-6).all()
    torch.testing.assert_close(mean, (weight * a + b) / (weight + 1))


def test_equal_weights_are_the_default_and_order_does_not_matter():
    maps = [random_scores(i).softmax(0) for i in range(3)]
    expected = torch.stack(maps).mean(0)
    torch.testing.assert_close(mean_of_probabilities(*maps), expected)
    torch.testing.assert_close(mean_of_probabilities(*reversed(maps)), expected)
    torch.testing.assert_close(mean_of_probabilities(maps[0]), maps[0])


def test_a_weight_of_zero_silences_a_map():
    a, b = random_scores(0).softmax(0), random_scores(1).softmax(0)
    torch.testing.assert_close(mean_of_probabilities(a, b, weights=(0, 2)), b)


def test_product_by_hand():
    ours = torch.tensor([2.0, -1.0, 3.0]).view(3, 1, 1)
    theirs = torch.tensor([1.0, 5.0, -4.0]).view(3, 1, 1)
    expected = torch.tensor([2.0, 0.0, 0.0]).softmax(0)
    torch.testing.assert_close(product_of_scores(ours, theirs).flatten(), expected)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_product_needs_both_networks(seed):
    ours, theirs = random_scores(seed), random_scores(seed + 1)
    product = product_of_scores(ours, theirs)
    torch.testing.assert_close(product, product_of_scores(theirs, ours))
    torch.testing.assert_close(product.sum(0), torch.ones(3, 5))
    disputed = (ours <= 0) | (theirs <= 0)
    lowest = product.amin(0).expand_as(product)
    torch.testing.assert_close(product[disputed], lowest[disputed])
    assert (product[~disputed] > 0.999 * lowest[~disputed]).all()


def test_product_is_undecided_where_a_network_likes_nothing():
    nothing = -random_scores(0).abs()
    torch.testing.assert_close(
        product_of_scores(nothing, random_scores(1)), torch.full((4, 3, 5), 0.25)
    )


def test_bad_input_is_named():
    fine = random_scores(0).softmax(0)
    with pytest.raises(ValueError, match="at least one map"):
        mean_of_probabilities()
    with pytest.raises(ValueError, match="one shape"):
        mean_of_probabilities(fine, fine[:, :2])
    with pytest.raises(ValueError, match="one shape"):
        mean_of_probabilities(fine[0], fine[0])
    with pytest.raises(ValueError, match="map 1 is not a probability map"):
        mean_of_probabilities(fine, random_scores(0))
    with pytest.raises(ValueError, match="map 0 is not a probability map"):
        mean_of_probabilities(torch.full((2, 3, 3), float("nan")))
    with pytest.raises(ValueError, match="3 weights for 2 maps"):
        mean_of_probabilities(fine, fine, weights=(1, 1, 1))
    for weights in ((0, 0), (-1, 2), (float("nan"), 1)):
        with pytest.raises(ValueError, match="weights must be finite"):
            mean_of_probabilities(fine, fine, weights=weights)
    with pytest.raises(ValueError, match="one shape"):
        product_of_scores(random_scores(0, 3), random_scores(0, 4))
