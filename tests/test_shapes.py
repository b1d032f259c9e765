"""The embedded data set: geometry against arithmetic, masks against loops, files against seeds."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deconvnet import cli, shapes, voc
from deconvnet.shapes import (
    CLASS_NAMES,
    OUTLINES,
    ShapesConfig,
    draw_shape,
    make_scene,
    scene_seed,
    write_shapes,
)
from deconvnet.voc import VOID, VOCDataset

SMALL = ShapesConfig(min_side=48, max_side=64, min_extent=12, max_objects=4, clutter=3)


@pytest.fixture(scope="module")
def scenes() -> list[voc.Sample]:
    return [make_scene(seed=(11, index)) for index in range(120)]


def area(polygon: np.ndarray) -> float:
    """The shoelace formula."""
    x, y = polygon.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def perimeter(polygon: np.ndarray) -> float:
    return np.linalg.norm(polygon - np.roll(polygon, 1, axis=0), axis=1).sum()


class TestDrawing:
    @pytest.mark.parametrize("name", ["disc", "ring", "square", "frame", "triangle", "star"])
    @pytest.mark.parametrize("radius", [9.3, 60.0])
    def test_covered_area(self, name, radius):
        outline = OUTLINES[name](np.random.default_rng(0))
        angle = 0.7
        cos, sin = radius * np.cos(angle), radius * np.sin(angle)
        cover, _ = draw_shape(outline, np.array([[cos, -sin, 80.2], [sin, cos, 70.9]]))
        expected = radius**2 * (sum(map(area, outline.solids)) - sum(map(area, outline.holes)))
        length = radius * sum(map(perimeter, [*outline.solids, *outline.holes]))
        # The outline may be off by a sixth of a pixel.
        assert cover.sum() == pytest.approx(expected, abs=length / 6)

    @settings(max_examples=20)
    @given(st.floats(-30, 30), st.floats(-30, 30))
    def test_lies_where_the_transform_says(self, x, y):
        cover, corner = draw_shape(
            OUTLINES["disc"](np.random.default_rng(0)), np.array([[8.0, 0, x], [0, 8.0, y]])
        )
        rows, columns = np.indices(cover.shape)
        centre_x = (cover * (columns + 0.5)).sum() / cover.sum() + corner[0]
        centre_y = (cover * (rows + 0.5)).sum() / cover.sum() + corner[1]
        assert (centre_x, centre_y) == pytest.approx((x, y), abs=0.1)

    @pytest.mark.parametrize("name", OUTLINES)
    def test_fits_the_unit_circle(self, name):
        for seed in range(10):
            outline = OUTLINES[name](np.random.default_rng(seed))
            reach = max(np.linalg.norm(polygon, axis=1).max() for polygon in outline.solids)
            assert 0.9 < reach < 1.1

    @pytest.mark.parametrize("name", OUTLINES)
    def test_nothing_is_cut_off(self, name):
        cover, _ = draw_shape(
            OUTLINES[name](np.random.default_rng(1)), np.array([[20.0, 0, 5], [0, 20.0, 5]])
        )
        border = np.concatenate([cover[0], cover[-1], cover[:, 0], cover[:, -1]])
        assert border.max() == 0 and cover.max() == 1

    @pytest.mark.parametrize("name", ["ring", "frame", "key"])
    def test_holes(self, name):
        outline = OUTLINES[name](np.random.default_rng(1))
        cover, corner = draw_shape(outline, np.array([[40.0, 0, 50], [0, 40.0, 50]]))
        x, y = (outline.holes[0].mean(axis=0) * 40 + 50 - corner).astype(int)
        assert cover[y, x] == 0


class TestRim:
    @settings(max_examples=40)
    @given(arrays(np.uint8, (7, 9), elements=st.integers(0, 2)), st.integers(0, 2))
    def test_equals_a_loop(self, on_top, rim):
        result = shapes._with_rim(on_top, rim)
        for y, x in np.ndindex(on_top.shape):
            window = on_top[max(y - rim, 0) : y + rim + 1, max(x - rim, 0) : x + rim + 1]
            expected = on_top[y, x] if (window == on_top[y, x]).all() else VOID
            assert result[y, x] == expected


class TestScenes:
    def test_is_a_valid_sample(self, scenes):
        for scene in scenes:
            assert scene.image.dtype == torch.uint8 and scene.image.shape[0] == 3
            height, width = scene.labels.shape
            assert scene.image.shape[1:] == scene.objects.shape == (height, width)
            assert 144 <= height <= 208 and 144 <= width <= 208
            numbers = set(scene.objects.unique().tolist()) - {0, VOID}
            assert numbers == set(range(1, len(scene.annotations) + 1))

    def test_masks_agree(self, scenes):
        for scene in scenes:
            assert torch.equal(scene.labels == VOID, scene.objects == VOID)
            assert torch.equal(scene.labels == 0, scene.objects == 0)
            for number, item in enumerate(scene.annotations, start=1):
                assert (scene.labels[scene.objects == number] == item.label).all()

    def test_boxes_are_tight(self, scenes):
        for scene in scenes:
            for number, item in enumerate(scene.annotations, start=1):
                x0, y0, x1, y1 = map(int, item.box)
                mine = scene.objects == number
                assert mine.sum() == mine[y0:y1, x0:x1].sum() >= 8
                # The outermost pixels may belong to the rim, but not to the background.
                mine |= scene.objects == VOID
                box = mine[y0:y1, x0:x1]
                assert box[0].any() and box[-1].any() and box[:, 0].any() and box[:, -1].any()

    def test_void_parts_all_neighbours(self, scenes):
        for scene in scenes:
            objects = scene.objects.int()
            for a, b in ((objects[1:], objects[:-1]), (objects[:, 1:], objects[:, :-1])):
                touching = (a != b) & (a != VOID) & (b != VOID)
                assert not touching.any()

    def test_every_class_and_widely_different_sizes(self, scenes):
        items = [item for scene in scenes for item in scene.annotations]
        assert {item.label for item in items} == set(range(1, 13))
        sides = [max(item.box[2] - item.box[0], item.box[3] - item.box[1]) for item in items]
        assert min(sides) < 20 and max(sides) > 0.75 * 208
        assert any(item.difficult for item in items)
        assert 0.5 < np.mean([(scene.labels == 0).float().mean() for scene in scenes]) < 0.85

    def test_colour_does_not_tell_the_class(self, scenes):
        colours, labels = [], []
        for scene in scenes:
            for number, item in enumerate(scene.annotations, start=1):
                colours.append(scene.image[:, scene.objects == number].float().mean(dim=1))
                labels.append(item.label)
        colours, labels = torch.stack(colours), torch.tensor(labels)
        distances = torch.cdist(colours, colours).fill_diagonal_(torch.inf)
        agreement = (labels[distances.argmin(dim=1)] == labels).float().mean()
        assert agreement < 0.16  # chance is 1/12; four standard deviations above it

    def test_same_seed_same_scene(self):
        first, second, other = (make_scene(SMALL, seed=seed) for seed in (5, 5, 6))
        assert torch.equal(first.image, second.image)
        assert torch.equal(first.objects, second.objects)
        assert first.annotations == second.annotations
        assert first.image.shape != other.image.shape or not torch.equal(first.image, other.image)

    def test_seeds_of_a_data_set_differ(self):
        seeds = {scene_seed(s, split, i) for s in (0, 1) for split in ("a", "b") for i in (0, 1)}
        assert len(seeds) == 8

    @pytest.mark.parametrize(("threshold", "difficult"), [(0.0, False), (1.5, True)])
    def test_difficult_is_a_matter_of_visibility(self, threshold, difficult):
        config = dataclasses.replace(SMALL, difficult_below=threshold)
        scene = make_scene(config, seed=3)
        assert scene.annotations
        assert all(item.difficult is difficult for item in scene.annotations)

    def test_without_rim_there_is_no_void(self):
        assert not (make_scene(dataclasses.replace(SMALL, rim=0), seed=1).labels == VOID).any()

    def test_hidden_shapes_stay_out(self):
        config = dataclasses.replace(SMALL, min_visible=0.999, max_objects=8, max_extent=0.5)
        count = [len(make_scene(config, seed=seed).annotations) for seed in range(5)]
        relaxed = dataclasses.replace(config, min_visible=0.0)
        assert sum(count) < sum(
            len(make_scene(relaxed, seed=seed).annotations) for seed in range(5)
        )

    def test_negative_seed(self):
        with pytest.raises(ValueError, match="non-negative"):
            make_scene(SMALL, seed=-1)

    @pytest.mark.parametrize(
        "change",
        [
            {"min_side": 16}, {"min_side": 300}, {"min_objects": 0}, {"max_objects": 1},
            {"max_objects": 255}, {"min_extent": 1.0}, {"max_extent": 0.05}, {"min_stretch": 0.0},
            {"camouflage": 1.5}, {"clutter": -1}, {"max_noise": -0.1}, {"min_quality": 96},
        ],
    )  # fmt: skip
    def test_bad_configuration(self, change):
        (field,) = change
        with pytest.raises(ValueError, match=f"expected .*{field}.*{field}={change[field]}"):
            ShapesConfig(**change)


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    return write_shapes(root, 26, 6, seed=4, config=SMALL, workers=1, progress=False)


class TestFiles:
    def test_reads_back_as_made(self, written):
        dataset = VOCDataset(written, "val")
        assert dataset.class_names == CLASS_NAMES and len(dataset) == 6
        for index, sample in enumerate(dataset):
            scene = make_scene(SMALL, scene_seed(4, "val", index), sample.name)
            assert sample.name == scene.name == f"val_{index:06d}"
            assert torch.equal(sample.image, scene.image)
            assert torch.equal(sample.labels, scene.labels)
            assert torch.equal(sample.objects, scene.objects)
            assert sample.annotations == scene.annotations

    def test_layout(self, written):
        files = contents(written)
        assert len(files) == 4 * 32 + 4
        assert {name.split("/")[0] for name in files} == {
            "JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations", "ImageSets",
            "classes.txt", "shapes.json",
        }  # fmt: skip
        assert not set(voc.read_split(written, "train")) & set(voc.read_split(written, "val"))

    def test_processes_do_not_matter(self, written, tmp_path):
        write_shapes(tmp_path, 26, 6, seed=4, config=SMALL, workers=2, progress=False)
        assert contents(tmp_path) == contents(written)

    def test_resumes(self, written, tmp_path, monkeypatch):
        made = []
        original = shapes._make_scene

        def stop_after_three(config, seed, name):
            if len(made) == 3:
                raise KeyboardInterrupt
            made.append(name)
            return original(config, seed, name)

        options = {"seed": 4, "config": SMALL, "workers": 1, "progress": False}
        monkeypatch.setattr(shapes, "_make_scene", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(tmp_path, 26, 6, **options)
        monkeypatch.undo()
        first = tmp_path / "JPEGImages" / f"{made[0]}.jpg"
        os.utime(first, (1, 1))
        (tmp_path / "SegmentationClass" / f"{made[1]}.png").unlink()
        write_shapes(tmp_path, 26, 6, **options)
        assert contents(tmp_path) == contents(written)
        assert first.stat().st_mtime == 1, "a finished scene is not made again"

    def test_a_smaller_set_is_a_part_of_a_larger_one(self, written, tmp_path):
        write_shapes(tmp_path, 2, 1, seed=4, config=SMALL, progress=False)
        larger = contents(written)
        for name, data in contents(tmp_path).items():
            assert larger[name] == data or name.startswith("ImageSets")

    def test_other_seeds_need_another_folder(self, written):
        before = contents(written)
        with pytest.raises(ValueError, match="another seed or configuration"):
            write_shapes(written, 26, 6, seed=5, config=SMALL, progress=False)
        assert contents(written) == before

    def test_the_command_writes_as_many_scenes(self):
        defaults = inspect.signature(write_shapes).parameters
        options = cli.parser().parse_args(["data", "shapes", "root"])
        for name in ("train", "val", "seed"):
            assert getattr(options, name) == defaults[name].default
        # as in the recorded runs
        assert (options.train, options.val) == (2500, 200)

    @pytest.mark.parametrize("change", [{"train": 0}, {"val": 0}, {"seed": -1}, {"workers": 0}])
    def test_bad_arguments(self, tmp_path, change):
        (name,) = change
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            write_shapes(tmp_path / "new", **change)
        assert not (tmp_path / "new").exists()
