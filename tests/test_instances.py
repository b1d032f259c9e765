"""Instance-wise crops against hand-drawn cases, OpenCV-free references and invariants."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from deconvnet.instances import (
    InstanceConfig,
    Stage1Dataset,
    Stage2Dataset,
    StreamSampler,
    WholeImageDataset,
    WindowDataset,
    balanced_indices,
    crop_and_resize,
    expand_box,
    isolate_object,
    object_mask,
    pixel_box,
    square_box,
)
from deconvnet.proposals import Proposals
from deconvnet.voc import VOID, Annotation, Sample


class FakeDataset:
    """What the crop datasets ask of a VOCDataset, in memory."""

    root, split = "memory", "train"

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def image(self, index: int) -> Tensor:
        return self.samples[index].image

    def labels(self, index: int) -> Tensor:
        return self.samples[index].labels

    def annotations(self, index: int) -> tuple[Annotation, ...]:
        return self.samples[index].annotations


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def two_squares(objects: bool = True) -> Sample:
    """A 20 x 30 image: two overlapping squares of class 3, one of class 5, a void row."""
    labels = torch.zeros(20, 30, dtype=torch.uint8)
    instances = torch.zeros(20, 30, dtype=torch.uint8)
    annotations = []
    for k, (label, (x0, y0, x1, y1)) in enumerate(
        [(3, (2, 2, 10, 10)), (3, (8, 6, 16, 14)), (5, (20, 4, 28, 12))]
    ):
        labels[y0:y1, x0:x1] = label
        instances[y0:y1, x0:x1] = k + 1
        annotations.append(Annotation(label, (x0, y0, x1, y1)))
    labels[19], instances[19] = VOID, VOID
    return Sample("two", noise(20, 30), labels, instances if objects else None, tuple(annotations))


def dataset() -> FakeDataset:
    first = two_squares()
    difficult = Annotation(7, (0.0, 0.0, 5.0, 5.0), True)
    second = Sample(
        "b",
        noise(25, 18, 1),
        torch.full((25, 18), 7, dtype=torch.uint8),
        None,
        (difficult, Annotation(7, (4.0, 4.0, 12.0, 20.0))),
    )
    empty = Sample("c", noise(9, 9, 2), torch.zeros(9, 9, dtype=torch.uint8), None, ())
    return FakeDataset([first, second, empty])


SMALL = InstanceConfig(resize=18, crop=16)


# ------------------------------------------------------------------------------------- boxes


def test_expand_box_by_hand() -> None:
    assert expand_box((10, 20, 20, 40), 1.2).tolist() == pytest.approx([9, 18, 21, 42])


def test_square_box_by_hand() -> None:
    boxes = square_box(torch.tensor([[0.0, 0, 10, 4], [3, 0, 5, 10]]))
    assert boxes.tolist() == [[0, -3, 10, 7], [-1, 0, 9, 10]]


coordinates = st.floats(-500, 500, width=32)
sides = st.floats(1, 300, width=32)


@given(x=coordinates, y=coordinates, w=sides, h=sides, factor=st.floats(0.5, 3))
def test_boxes_keep_their_centre(x: float, y: float, w: float, h: float, factor: float) -> None:
    box = torch.tensor([x, y, x + w, y + h])
    for changed, size in (
        (expand_box(box, factor), (w * factor, h * factor)),
        (square_box(box), (max(w, h), max(w, h))),
    ):
        centre = (changed[:2] + changed[2:]) / 2
        assert torch.allclose(centre, (box[:2] + box[2:]) / 2, atol=1e-3)
        assert torch.allclose(changed[2:] - changed[:2], torch.tensor(size), atol=1e-2)


def test_expanding_and_squaring_commute() -> None:
    box = torch.tensor([3.0, 5, 40, 17])
    assert torch.allclose(square_box(expand_box(box, 1.2)), expand_box(square_box(box), 1.2))


def test_pixel_box_rounds_and_keeps_a_pixel() -> None:
    assert pixel_box((0.4, 0.5, 2.6, 7.2)) == (0, 1, 3, 7)
    assert pixel_box((-1.5, 3.1, -1.2, 3.2)) == (-1, 3, 0, 4)


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5), (0, 5, 5, 5), (3, 0, 2, 5), (0, 0, float("nan"), 5),
            (0, 0, float("inf"), 5), (0, 0, 5)]
)  # fmt: skip
def test_pixel_box_refuses_what_is_no_box(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="box must"):
        pixel_box(box)


# ------------------------------------------------------------------------------------- crops


def reference_crop(image: Tensor, labels: Tensor, box: tuple[int, int, int, int]):
    """The box pixel by pixel, without resizing."""
    x0, y0, x1, y1 = box
    pixels = torch.zeros(3, y1 - y0, x1 - x0, dtype=torch.uint8)
    target = torch.full((y1 - y0, x1 - x0), VOID, dtype=torch.uint8)
    for y in range(max(y0, 0), min(y1, image.shape[1])):
        for x in range(max(x0, 0), min(x1, image.shape[2])):
            pixels[:, y - y0, x - x0] = image[:, y, x]
            target[y - y0, x - x0] = labels[y, x]
    return pixels, target


@settings(max_examples=40, deadline=None)
@given(x=st.integers(-25, 25), y=st.integers(-25, 25), side=st.integers(1, 30))
def test_crop_at_native_size_equals_the_loop(x: int, y: int, side: int) -> None:
    image, labels = noise(13, 17), noise(13, 17, 1)[0]
    box = (x, y, x + side, y + side)
    expected = reference_crop(image, labels, box)
    for got, want in zip(crop_and_resize(image, labels, box, side), expected):
        assert torch.equal(got, want)


@settings(max_examples=40, deadline=None)
@given(x=st.integers(-9, 15), y=st.integers(-9, 11), w=st.integers(1, 25), h=st.integers(1, 25),
       size=st.integers(1, 40))  # fmt: skip
def test_resized_labels_are_those_of_the_pixel_under_each_centre(
    x: int, y: int, w: int, h: int, size: int
) -> None:
    image, labels = noise(13, 17), noise(13, 17, 1)[0]
    _, cut = reference_crop(image, labels, (x, y, x + w, y + h))
    rows = [int((i + 0.5) * h / size + 1e-9) for i in range(size)]
    columns = [int((i + 0.5) * w / size + 1e-9) for i in range(size)]
    _, target = crop_and_resize(image, labels, (x, y, x + w, y + h), size)
    assert torch.equal(target, cut[rows][:, columns])


def test_enlarged_pixels_equal_pillows() -> None:
    image = noise(12, 16)
    pixels, _ = crop_and_resize(image, None, (2, 1, 12, 9), 40)
    cut = Image.fromarray(image[:, 1:9, 2:12].permute(1, 2, 0).contiguous().numpy())
    reference = np.asarray(cut.resize((40, 40), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(pixels.numpy().astype(int) - reference).max() <= 2


def test_strong_shrinking_averages_instead_of_aliasing() -> None:
    stripes = torch.zeros(3, 120, 120, dtype=torch.uint8)
    stripes[:, :, ::2] = 200
    pixels, _ = crop_and_resize(stripes, None, (0, 0, 120, 120), 12)
    assert ((pixels.int() - 100).abs() <= 1).all()


def test_pixels_and_labels_stay_aligned() -> None:
    labels = torch.zeros(60, 80, dtype=torch.uint8)
    labels[20:40, 30:60] = 200
    image = labels.expand(3, -1, -1).contiguous()
    pixels, target = crop_and_resize(image, labels, (10.3, 5.2, 70.9, 55.7), 100)
    disagree = ((pixels[0] > 100) != (target == 200)) & (target != VOID)
    assert disagree.float().mean() < 0.005


def test_crop_does_not_depend_on_memory_layout() -> None:
    image = noise(12, 16)
    strided = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    first, _ = crop_and_resize(image, None, (-2, 1, 12, 9), 20)
    second, _ = crop_and_resize(strided, None, (-2, 1, 12, 9), 20)
    assert torch.equal(first, second)


def test_crop_errors() -> None:
    image, labels = noise(5, 6), torch.zeros(5, 6, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        crop_and_resize(image[0], labels, (0, 0, 2, 2), 4)
    with pytest.raises(ValueError, match=r"\[3, H, W\], got \[3, 0, 6\]"):
        crop_and_resize(image[:, :0], None, (0, 0, 2, 2), 4)
    with pytest.raises(ValueError, match=r"labels must have the image's size \[5, 6\]"):
        crop_and_resize(image, labels[1:], (0, 0, 2, 2), 4)
    with pytest.raises(TypeError, match="image must be uint8, got torch.float32"):
        crop_and_resize(image.float(), labels, (0, 0, 2, 2), 4)
    with pytest.raises(TypeError, match="labels must be uint8, got torch.int64"):
        crop_and_resize(image, labels.long(), (0, 0, 2, 2), 4)
    with pytest.raises(ValueError, match="size must be at least 1"):
        crop_and_resize(image, labels, (0, 0, 2, 2), 0)


# ----------------------------------------------------------------------------------- objects


def test_object_mask_tells_instances_of_one_class_apart() -> None:
    sample = two_squares()
    for k in range(3):
        assert torch.equal(object_mask(sample, k), sample.objects == k + 1)


def test_without_object_map_the_mask_is_the_class_in_the_box() -> None:
    sample = two_squares(objects=False)
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[2:10, 2:10] = True  # with the corner of the other square of the class
    assert torch.equal(object_mask(sample, 0), expected)


def test_an_object_map_that_misses_the_object_is_not_trusted() -> None:
    sample = two_squares()
    sample.objects[sample.objects == 1] = 0
    assert object_mask(sample, 0).sum() == 8 * 8


def test_isolate_object_makes_all_else_background_and_keeps_void() -> None:
    sample = two_squares()
    labels = isolate_object(sample, 1)
    assert (labels[sample.objects == 2] == 3).all()
    assert (labels[19] == VOID).all()
    assert (labels[(sample.objects != 2) & (sample.labels != VOID)] == 0).all()


def test_object_mask_names_the_sample_without_such_an_object() -> None:
    with pytest.raises(IndexError, match="two has 3 annotated objects"):
        object_mask(two_squares(), 3)
    with pytest.raises(IndexError):
        object_mask(two_squares(), -1)


# ---------------------------------------------------------------------------------- datasets


def test_config_presets() -> None:
    assert InstanceConfig.paper() == InstanceConfig()
    assert InstanceConfig.release().square
    tiny = InstanceConfig.tiny()
    assert tiny.crop == 64 and tiny.resize / tiny.crop == pytest.approx(250 / 224, rel=0.01)


@pytest.mark.parametrize(
    ("field", "value"), [("context", 0.0), ("context", float("nan")), ("crop", 251), ("crop", 0),
                         ("min_overlap", 0.0), ("min_overlap", 1.1), ("seed", -1)]
)  # fmt: skip
def test_config_refuses_values_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        InstanceConfig(**{field: value})


def test_stage1_examples_are_the_objects_that_are_not_difficult() -> None:
    examples = Stage1Dataset(dataset(), SMALL)
    assert examples.example_labels.tolist() == [3, 3, 5, 7]
    assert examples.examples.tolist() == [[0, 0], [0, 1], [0, 2], [1, 1]]


def test_stage1_centres_one_object() -> None:
    config = InstanceConfig(context=2.0, resize=32, crop=32)
    image, labels = Stage1Dataset(dataset(), config, train=False)[2]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    # The box is 8 px wide; twice that makes 16 px, so the object fills the middle half.
    expected = torch.zeros(32, 32, dtype=torch.uint8)
    expected[8:24, 8:24] = 5
    expected[:, 28:] = VOID  # the enlarged box runs from x = 16 to 32, the image ends at 30
    assert torch.equal(labels, expected)
    assert (image[:, :, 29:] == 0).all() and (image[:, :, :24] > 0).all()


def test_release_convention_squares_the_box() -> None:
    samples = dataset()
    square = Stage1Dataset(samples, InstanceConfig(square=True, resize=40, crop=40), train=False)
    _, labels = square[3]  # 8 x 16 px: a square is 16 * 1.2 px wide, the image begins at x = 0
    columns = (labels == 7).any(dim=0).nonzero().flatten()
    assert 16 <= len(columns) <= 18  # 8 of 19.2 px
    paper = Stage1Dataset(samples, InstanceConfig(resize=40, crop=40), train=False)
    assert len((paper[3][1] == 7).any(dim=0).nonzero()) > 30


def stage2(**changes) -> Stage2Dataset:
    samples = dataset()
    proposals = [
        Proposals(torch.tensor([[2.0, 2, 10, 10], [0, 0, 30, 20], [9, 6, 16, 14], [20, 4, 28, 9]]),
                  torch.tensor([4.0, 3, 2, 1])),
        Proposals(torch.tensor([[0.0, 0, 5, 5], [4, 4, 12, 19]]), torch.tensor([2.0, 1])),
        Proposals(torch.zeros(0, 4), torch.zeros(0)),
    ]  # fmt: skip
    return Stage2Dataset(samples, proposals, SMALL, **changes)


def plain_iou(a: list[float], b: tuple[float, ...]) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (area - w * h)


def test_stage2_takes_proposals_that_overlap_an_object() -> None:
    examples = stage2()
    # Whole-image and difficult-only proposals fall out; each takes its best object's class.
    assert examples.boxes[:2].tolist() == [[2, 2, 10, 10], [9, 6, 16, 14]]
    assert examples.boxes[2:].tolist() == [[20, 4, 28, 9], [4, 4, 12, 19]]
    assert examples.images.tolist() == [0, 0, 0, 1]
    assert examples.example_labels.tolist() == [3, 3, 5, 7]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.sampled_from([0.1, 0.3, 0.5]))
def test_stage2_selection_equals_the_plain_loop(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (40, 2), generator=generator).float()
    boxes = torch.cat([corners, corners + torch.randint(1, 14, (40, 2), generator=generator)], 1)
    sample = two_squares()
    expected = []
    for box in boxes.tolist():
        overlaps = [plain_iou(box, a.box) for a in sample.annotations]
        if max(overlaps) >= threshold:
            expected.append((box, sample.annotations[overlaps.index(max(overlaps))].label))
    proposals = [Proposals(boxes, torch.zeros(40))]
    config = InstanceConfig(resize=18, crop=16, min_overlap=threshold)
    if not expected:
        with pytest.raises(ValueError, match="no proposal reaches"):
            Stage2Dataset(FakeDataset([sample]), proposals, config)
        return
    examples = Stage2Dataset(FakeDataset([sample]), proposals, config)
    assert list(zip(examples.boxes.tolist(), examples.example_labels.tolist())) == expected


def test_stage2_keeps_all_classes() -> None:
    samples = dataset()
    box = torch.tensor([[2.0, 2, 28, 14]])
    config = InstanceConfig(context=1.0, resize=32, crop=32, min_overlap=0.1)
    proposals = [Proposals(box, torch.ones(1))] + 2 * [Proposals(torch.zeros(0, 4), torch.zeros(0))]
    _, labels = Stage2Dataset(samples, proposals, config, train=False)[0]
    assert labels.unique().tolist() == [0, 3, 5]


def test_whole_image_and_its_class() -> None:
    first, second, empty = dataset().samples
    both = Sample("d", first.image, first.labels, None,
                  (Annotation(3, (0, 0, 9, 9)), Annotation(7, (0, 0, 9, 9))))  # fmt: skip
    samples = FakeDataset([first, second, empty, both, second])
    config = InstanceConfig(resize=30, crop=30)
    examples = WholeImageDataset(samples, config, train=False)
    assert examples.example_labels.tolist() == [5, 7, 0, 3, 7]  # of 3 and 7, 3 is the rarer
    _, labels = examples[0]
    assert labels.unique().tolist() == [0, 3, 5, VOID]
    square = WholeImageDataset(samples, InstanceConfig(resize=30, crop=30, square=True), False)
    assert (square[0][1][:5] == VOID).all() and torch.equal(square[0][1][5:25], first.labels)


def test_window_at_native_scale() -> None:
    samples = dataset()
    examples = WindowDataset(samples, InstanceConfig(resize=18, crop=12, flip=False))
    first = samples[0]
    places = set()
    for draw in range(60):
        image, labels = examples[0, draw]
        matches = [
            (x, y) for y in range(9) for x in range(19)
            if torch.equal(first.image[:, y : y + 12, x : x + 12], image)
        ]  # fmt: skip
        assert len(matches) == 1
        x, y = matches[0]
        assert torch.equal(first.labels[y : y + 12, x : x + 12], labels)
        places.add((x, y))
    assert len(places) > 30
    image, labels = examples[2, 0]  # a 9 x 9 image in a 12 x 12 window
    assert (labels != VOID).sum() == 81 and (image[:, labels == VOID] == 0).all()


# -------------------------------------------------------------------- determinism, DataLoader


def test_augmentation_depends_on_seed_example_and_draw_only() -> None:
    for make in (
        lambda c: Stage1Dataset(dataset(), c),
        lambda c: WholeImageDataset(dataset(), c),
        lambda c: WindowDataset(dataset(), c),
    ):
        examples = make(SMALL)
        crops = [examples[0, draw][0] for draw in range(20)]
        again = make(SMALL)
        for draw in reversed(range(20)):
            assert torch.equal(again[0, draw][0], crops[draw])
        assert len({c.numpy().tobytes() for c in crops}) > 5
        assert torch.equal(examples[1][0], examples[1, 0][0])
        other = make(InstanceConfig(resize=18, crop=16, seed=1))
        assert any(not torch.equal(other[0, d][0], crops[d]) for d in range(20))


def test_training_crops_are_windows_of_the_resized_box_possibly_mirrored() -> None:
    samples = dataset()
    whole, _ = Stage1Dataset(samples, InstanceConfig(resize=18, crop=18), train=False)[0]
    windows = {}
    for y in range(3):
        for x in range(3):
            window = whole[:, y : y + 16, x : x + 16]
            windows[window.numpy().tobytes()] = (x, y, False)
            windows[window.flip(-1).contiguous().numpy().tobytes()] = (x, y, True)
    examples = Stage1Dataset(samples, SMALL)
    seen = {windows[examples[0, d][0].contiguous().numpy().tobytes()] for d in range(150)}
    assert len(seen) == 18
    centre, _ = Stage1Dataset(samples, SMALL, train=False)[0, 5]
    assert windows[centre.contiguous().numpy().tobytes()] == (1, 1, False)


def test_flip_can_be_left_out_and_mirrors_labels_alike() -> None:
    plain = Stage1Dataset(dataset(), InstanceConfig(resize=16, crop=16, flip=False))
    flipped = Stage1Dataset(dataset(), InstanceConfig(resize=16, crop=16))
    mirrored = 0
    for draw in range(20):
        (image, labels), (image2, labels2) = plain[1, draw], flipped[1, draw]
        if torch.equal(image, image2):
            assert torch.equal(labels, labels2)
        else:
            mirrored += 1
            assert torch.equal(image.flip(-1), image2) and torch.equal(labels.flip(-1), labels2)
    assert 3 <= mirrored <= 17


def test_examples_outside_the_dataset() -> None:
    examples = Stage1Dataset(dataset(), SMALL)
    for index in (4, -1):
        with pytest.raises(IndexError, match=r"outside 0\.\.3"):
            examples[index]


def test_datasets_without_examples() -> None:
    empty = FakeDataset([dataset()[2]])
    with pytest.raises(ValueError, match="annotated objects"):
        Stage1Dataset(empty)
    with pytest.raises(ValueError, match="one entry an image"):
        Stage2Dataset(empty, [])
    with pytest.raises(ValueError, match="no proposal reaches"):
        Stage2Dataset(empty, [Proposals(torch.zeros(1, 4), torch.zeros(1))])
    with pytest.raises(ValueError, match="no images"):
        WholeImageDataset(FakeDataset([]))


def test_workers_see_the_same_stream() -> None:
    examples = Stage1Dataset(dataset(), SMALL)
    batches = [
        list(DataLoader(examples, batch_size=4, num_workers=workers,
                        sampler=StreamSampler(len(examples), seed=3, length=16)))
        for workers in (0, 2)
    ]  # fmt: skip
    assert len(batches[0]) == 4 and batches[0][0][0].shape == (4, 3, 16, 16)
    for (image, labels), (image2, labels2) in zip(*batches):
        assert torch.equal(image, image2) and torch.equal(labels, labels2)
    assert len(pickle.loads(pickle.dumps(examples))) == 4


# ----------------------------------------------------------------------- balance and sampler


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_balanced_indices_bring_every_class_to_the_largest(labels: list[int], seed: int) -> None:
    classes = torch.tensor(labels)
    indices = balanced_indices(classes, seed)
    assert torch.equal(indices, balanced_indices(classes, seed))
    assert set(classes[indices].bincount().tolist()) - {0} == {max(classes.bincount()).item()}
    repeats = indices.bincount(minlength=len(labels))
    assert repeats.min() >= 1
    for c in set(labels):
        mine = repeats[classes == c]
        assert mine.max() - mine.min() <= 1
    unchanged = balanced_indices(classes, seed, power=0)
    assert sorted(unchanged.tolist()) == list(range(len(labels)))


def test_balanced_indices_by_square_root() -> None:
    labels = torch.tensor([0] * 64 + [1] * 4)
    assert labels[balanced_indices(labels, power=0.5)].bincount().tolist() == [64, 16]


def test_balance_errors() -> None:
    with pytest.raises(ValueError, match="example_labels must have shape"):
        balanced_indices(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="power"):
        balanced_indices(torch.zeros(3, dtype=torch.int64), power=2)


@settings(deadline=None)
@given(n=st.integers(1, 12), world=st.integers(1, 4), start=st.integers(0, 40),
       seed=st.integers(0, 5))  # fmt: skip
def test_ranks_together_see_one_stream_from_any_start(
    n: int, world: int, start: int, seed: int
) -> None:
    stream = list(StreamSampler(n, seed, length=40 + 5 * world))
    assert [position for _, position in stream] == list(range(len(stream)))
    for epoch in range(len(stream) // n):
        assert sorted(i for i, _ in stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    ranks = [list(StreamSampler(n, seed, r, world, start, length=5)) for r in range(world)]
    merged = [key for step in zip(*ranks) for key in step]
    assert merged == stream[start : start + 5 * world]


def test_stream_of_given_indices() -> None:
    keys = list(StreamSampler(10, length=6, indices=torch.tensor([4, 4, 7])))
    for epoch in (keys[:3], keys[3:]):
        assert sorted(i for i, _ in epoch) == [4, 4, 7]


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [i for i, _ in StreamSampler(30, seed, start=30 * epoch, length=30)]

    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_endless_sampler_has_no_length() -> None:
    sampler = StreamSampler(3)
    with pytest.raises(TypeError, match="endless"):
        len(sampler)
    assert len(StreamSampler(3, length=7)) == 7
    keys = iter(sampler)
    assert len([next(keys) for _ in range(100)]) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "num_examples"),
        ({"num_examples": 3, "rank": 2, "world_size": 2}, "rank"),
        ({"num_examples": 3, "start": -1}, "start"),
        ({"num_examples": 3, "length": -1}, "length"),
        ({"num_examples": 3, "seed": -1}, "seed"),
        ({"num_examples": 3, "indices": torch.tensor([3])}, r"indices .* 0\.\.2"),
        ({"num_examples": 3, "indices": torch.zeros(0, dtype=torch.int64)}, "indices"),
    ],
)
def test_sampler_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamSampler(**arguments)
