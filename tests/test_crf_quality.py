"""How near the lattice comes to exact sums, by the benchmark's own measures."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from deconvnet.crf import NORMALIZATIONS, dense_crf
from deconvnet.shapes import ShapesConfig, make_scene

PATH = Path(__file__).parents[1] / "benchmarks" / "crf.py"
spec = importlib.util.spec_from_file_location("benchmarks_crf", PATH)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

every_setting = pytest.mark.parametrize("setting", benchmark.SETTINGS)
every_normalization = pytest.mark.parametrize("normalization", NORMALIZATIONS)


@pytest.fixture(scope="module")
def scene():
    image = make_scene(ShapesConfig(min_side=48, max_side=48), seed=(9, 0)).image
    whole = benchmark.network_like_probabilities(21, 375, 500)
    return image, whole[:, 60:108, 300:348].contiguous()


@pytest.fixture(scope="module")
def photograph():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    whole = benchmark.network_like_probabilities(21, 375, 500)
    image = benchmark.photograph("chelsea", 375, 500)
    return image[:, 60:108, 300:348].contiguous(), whole[:, 60:108, 300:348].contiguous()


@every_setting
@every_normalization
def test_messages_of_a_scene_against_exact_sums(scene, setting, normalization):
    config = replace(benchmark.SETTINGS[setting], normalization=normalization)
    for kernel, off, most in (("gaussian", 0.002, 0.002), ("bilateral", 0.1, 0.12)):
        exact = benchmark.exact_message(*scene, config, kernel)
        slope, error = benchmark.against(benchmark.our_message(*scene, config, kernel), exact)
        assert abs(slope - 1) < (off if normalization == "none" else off / 4)
        assert error < most


@every_setting
@every_normalization
def test_labels_of_a_scene_against_exact_mean_field(scene, setting, normalization):
    config = replace(benchmark.SETTINGS[setting], normalization=normalization)
    exact = dense_crf(*scene, config, "exact").argmax(dim=0)
    assert benchmark.same_labels(dense_crf(*scene, config), exact) == 100  # few pixels: exact
    agreement = benchmark.same_labels(dense_crf(*scene, config, "lattice"), exact)
    # Unnormalised, hundreds of neighbours tip the balance together, or not.
    assert agreement >= (95 if normalization == "none" else 99)
    changed = benchmark.same_labels(scene[1], exact)
    assert changed < 99


@every_setting
@every_normalization
def test_messages_are_at_least_as_exact_as_pydensecrfs(photograph, setting, normalization):
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed")
    config = replace(benchmark.SETTINGS[setting], normalization=normalization)
    for kernel in ("gaussian", "bilateral"):
        exact = benchmark.exact_message(*photograph, config, kernel)
        ours, theirs = (
            benchmark.against(message(*photograph, config, kernel), exact)[1]
            for message in (benchmark.our_message, benchmark.their_message)
        )
        assert ours < theirs
