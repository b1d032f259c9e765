"""Data sets of plain folders: what is read, how objects are found, and what bad ones are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deconvnet import folders, voc
from deconvnet.cli import main
from deconvnet.folders import MIN_OBJECT, FolderDataset, find_objects, open_dataset
from deconvnet.voc import VOID, VOCDataset, palette, read_label_map
from deconvnet.weights import load_model, pretrained

CLASSES = "background\npebble #e69f00\nwet leaf #0072B2\ntwig\n\nshell #cc79a7\n"
NAMES = ("background", "pebble", "wet leaf", "twig", "shell")
SIZE = 72, 96


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo of the beach: grey sand, and rectangles in four colours, one or two of them."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(SIZE, np.uint8)
    for left in (4, 52)[: 1 + seed % 2]:
        top, height, width = rng.integers(4, 20), rng.integers(24, 40), rng.integers(20, 36)
        labels[top : top + height, left : left + width] = rng.integers(1, 5)
    colours = np.array(
        [(150, 150, 150), (220, 60, 60), (60, 200, 80), (40, 60, 220), (240, 240, 90)]
    )
    noise = rng.normal(0, 12, (*SIZE, 3))
    return (colours[labels] + noise).clip(0, 255).astype(np.uint8), labels


@pytest.fixture
def beach(tmp_path: Path) -> Path:
    """Ten photos in two formats, their masks in two modes, five classes."""
    root = tmp_path / "beach"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text(CLASSES)
    for seed in range(10):
        photo, labels = scene(seed)
        suffix = ("jpg", "png")[seed % 2]
        Image.fromarray(photo).save(root / "images" / f"walk {seed}.{suffix}", quality=95)
        mask = Image.fromarray(labels)
        if seed % 3 == 0:
            mask.putpalette(palette().numpy().tobytes())
        mask.save(root / "masks" / f"walk {seed}.png")
    return root


class TestReading:
    def test_everything_is_read(self, beach: Path):
        dataset = open_dataset(beach, "all", decode_cache=True)
        assert isinstance(dataset, FolderDataset) and len(dataset) == 10
        (beach / "images" / "Thumbs.db").write_bytes(b"Windows was here")
        assert FolderDataset(beach, "all").names == dataset.names
        assert dataset.class_names == NAMES and dataset.num_classes == 5
        assert dataset.colours.tolist() == [
            [0, 0, 0], [0xE6, 0x9F, 0], [0, 0x72, 0xB2], palette()[3].tolist(), [0xCC, 0x79, 0xA7],
        ]  # fmt: skip
        for sample in dataset:
            photo, labels = scene(int(sample.name.split()[1]))
            assert torch.equal(sample.labels, torch.from_numpy(labels))
            difference = sample.image.permute(1, 2, 0).float() - torch.from_numpy(photo).float()
            assert difference.abs().mean() < 12  # JPEG; another photo differs by far more
            present = {int(c) for c in np.unique(labels)} - {0}
            assert {a.label for a in sample.annotations} == present

    def test_a_sample_is_read_and_searched_once(self, beach: Path, monkeypatch):
        calls = []

        def counted(function):
            return lambda *arguments: calls.append(function) or function(*arguments)

        monkeypatch.setattr(voc, "read_label_map", counted(read_label_map))
        monkeypatch.setattr(folders, "find_objects", counted(find_objects))
        dataset = FolderDataset(beach, "all")
        sample = dataset[1]
        assert calls == [read_label_map, find_objects]
        assert dataset.mask_folder == "masks"
        assert torch.equal(dataset.objects(1), sample.objects)
        assert dataset.annotations(1) == sample.annotations

    def test_the_halves_are_disjoint_and_stay(self, beach: Path):
        train, val = (FolderDataset(beach, split).names for split in ("train", "val"))
        assert len(val) == 2 and sorted(train + val) == FolderDataset(beach, "all").names
        Image.fromarray(scene(10)[0]).save(beach / "images" / "walk 10.png")
        Image.fromarray(scene(10)[1]).save(beach / "masks" / "walk 10.png")
        moved = set(FolderDataset(beach, "val").names) ^ set(val)
        assert len(moved) <= 2

    def test_split_files_decide(self, beach: Path):
        (beach / "val.txt").write_text("walk 3.png\nwalk 1\n\n")
        assert FolderDataset(beach, "val").names == ["walk 3", "walk 1"]
        assert FolderDataset(beach, "val", limit=1).names == ["walk 3"]

    @pytest.mark.parametrize(("listed", "other"), [("val", "train"), ("train", "val")])
    def test_one_split_file_leaves_the_rest_to_the_other(self, beach: Path, listed, other):
        (beach / f"{listed}.txt").write_text("walk 3\nwalk 1\n")
        everything = FolderDataset(beach, "all").names
        rest = FolderDataset(beach, other).names
        assert rest == [name for name in everything if name not in ("walk 1", "walk 3")]
        (beach / f"{listed}.txt").write_text("\n".join(everything))
        with pytest.raises(ValueError, match=f"{listed}.txt: expected it to leave images"):
            FolderDataset(beach, other)

    def test_names_may_have_dots(self, beach: Path):
        for folder, suffix in (("images", "jpg"), ("masks", "png")):
            (beach / folder / f"walk 0.{suffix}").rename(beach / folder / f"walk.0.{suffix}")
        for listed in ("walk.0", "walk.0.jpg"):
            (beach / "val.txt").write_text(listed)
            assert FolderDataset(beach, "val").names == ["walk.0"]

    def test_large_photographs_are_learned_from_at_the_size_of_use(self, beach: Path):
        whole, small = (FolderDataset(beach, "all", max_side=side)[1] for side in (None, 48))
        assert small.image.shape == (3, 36, 48) and small.labels.shape == (36, 48)
        assert small.objects.shape == (36, 48)
        (before, *_), (after, *_) = whole.annotations, small.annotations
        assert after.box == tuple(edge / 2 for edge in before.box)
        shares = [[(s.labels == c).float().mean() for c in range(5)] for s in (whole, small)]
        np.testing.assert_allclose(*shares, atol=0.02)
        assert FolderDataset(beach, "all", max_side=48).image(1).shape == (3, 36, 48)
        assert FolderDataset(beach, "all", max_side=96)[1].image.shape == (3, *SIZE)
        tiny = FolderDataset(beach, "all", max_side=8)[1]
        assert all(annotation.difficult for annotation in tiny.annotations)

    def test_vocs_layout_is_still_read(self, shapes_root: Path):
        dataset = open_dataset(shapes_root, "val")
        assert type(dataset) is VOCDataset
        assert torch.equal(dataset.colours, palette(dataset.num_classes))


class Comparisons(TorchFunctionMode):
    """Counts the masks that are made by comparing a whole map."""

    maps = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.maps += isinstance(result, Tensor) and result.dtype == torch.bool and result.ndim == 2
        return result


class TestObjects:
    def test_regions_of_a_class_are_objects(self):
        labels = torch.zeros(40, 60, dtype=torch.uint8)
        labels[2:12, 3:23] = 1
        labels[12:22, 23:33] = 1  # touches at a corner
        labels[30:40, 40:60] = 1
        labels[30:40, 20:40] = 4  # another class beside it
        labels[0, :] = VOID
        labels[25:27, 3:8] = 2  # too small
        objects, annotations = find_objects(labels)
        assert [(a.label, a.box) for a in annotations] == [
            (1, (3.0, 2.0, 33.0, 22.0)),
            (1, (40.0, 30.0, 60.0, 40.0)),
            (4, (20.0, 30.0, 40.0, 40.0)),
        ]
        for number, annotation in enumerate(annotations, start=1):
            assert (labels[objects == number] == annotation.label).all()
        assert (objects == 1).sum() == 300 and (objects == VOID).sum() == 60
        assert MIN_OBJECT > 10 and objects[25:27, 3:8].sum() == 0

    def test_drawn_objects_tell_neighbours_apart(self, beach: Path):
        name = "walk 1"
        labels = np.zeros(SIZE, np.uint8)
        labels[10:50, 10:70] = 3
        drawn = np.zeros(SIZE, np.uint8)
        drawn[10:50, 10:40], drawn[10:50, 40:70] = 7, 9
        (beach / "objects").mkdir()
        Image.fromarray(labels).save(beach / "masks" / f"{name}.png")
        Image.fromarray(drawn).save(beach / "objects" / f"{name}.png")
        (beach / "train.txt").write_text(name)
        (sample,) = FolderDataset(beach)
        assert {a.box for a in sample.annotations} == {(10, 10, 40, 50), (40, 10, 70, 50)}
        Image.fromarray(drawn[:-1]).save(beach / "objects" / f"{name}.png")
        with pytest.raises(ValueError, match=r"objects.walk 1\.png: expected the size of"):
            FolderDataset(beach, decode_cache=True)

    def test_specks_cost_little(self):
        """A mask for each of them would take some gigabytes."""
        labels = torch.zeros(600, 600, dtype=torch.uint8)
        labels[::4, ::4] = 1
        labels[100:120, 100:120] = 1
        with Comparisons() as comparisons:
            objects, annotations = find_objects(labels)
        assert len(annotations) == 1 and annotations[0].box == (100, 100, 121, 121)
        assert comparisons.maps <= 10  # of 22,000 regions

    def test_nothing_is_no_object(self):
        objects, annotations = find_objects(torch.zeros(8, 8, dtype=torch.uint8))
        assert annotations == () and not objects.any()

    def test_the_largest_stay(self):
        labels = torch.zeros(9 * 20, 9 * 20, dtype=torch.uint8)
        for y in range(0, 180, 9):
            for x in range(0, 180, 9):
                labels[y : y + 8, x : x + 8] = 1
        labels[171:179, 162:180] = 1
        objects, annotations = find_objects(labels)
        assert len(annotations) == 254 and annotations[0].box == (162, 171, 180, 179)
        assert int(objects.max()) == 254


class TestBadFolders:
    def test_masks_of_0_and_255(self, beach: Path):
        """As painting programs write them: 255 is void here."""
        for path in (beach / "masks").iterdir():
            Image.fromarray(np.uint8(255 * (np.array(Image.open(path)) > 0))).save(path)
        with pytest.raises(ValueError, match="masks: expected pixels of some class in split 'val'"):
            FolderDataset(beach, "val").check_classes()

    def test_no_data_set(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="expected a data set, with a folder images"):
            open_dataset(tmp_path)

    @pytest.mark.parametrize(
        ("break_it", "error", "message"),
        [
            (lambda r: (r / "classes.txt").unlink(), FileNotFoundError, r"classes\.txt: expected"),
            (lambda r: (r / "classes.txt").write_text("a\na\n"), ValueError, "different class"),
            (lambda r: (r / "masks" / "walk 4.png").unlink(), FileNotFoundError, r"walk 4\.png: "),
            (
                lambda r: (r / "masks" / "walk 4.png").rename(r / "masks" / "Walk 4_mask.PNG"),
                FileNotFoundError,
                r"walk 4\.png: expected the mask of .*; there is Walk 4_mask\.PNG",
            ),
            (lambda r: (r / "all.txt").write_text("walk 2\nwalk 2.jpg"), ValueError, "2. 2 times"),
            (
                lambda r: Image.new("L", SIZE[::-1]).save(r / "masks" / "walk 4.png", "JPEG"),
                ValueError,
                r"walk 4\.png: expected a PNG; JPEG changes values",
            ),
            (
                lambda r: Image.new("L", (4, 4)).save(r / "images" / "walk 4.tif"),
                ValueError,
                r"walk 4\.tif: expected one image of this name, but there is .*walk 4\.jpg",
            ),
            (lambda r: (r / "all.txt").write_text("walk 99"), ValueError, "got 'walk 99'"),
            (lambda r: (r / "all.txt").write_text("\n"), ValueError, "got an empty file"),
            (
                lambda r: Image.new("L", SIZE[::-1], 5).save(r / "masks" / "walk 4.png"),
                ValueError,
                r"walk 4\.png: expected labels below 5 or 255 \(void\), got 5",
            ),
            (
                lambda r: Image.new("L", (4, 4)).save(r / "masks" / "walk 4.png"),
                ValueError,
                r"masks.walk 4\.png: expected the size of .*images.walk 4\.jpg, \[72, 96\]",
            ),
            (
                lambda r: Image.new("RGB", SIZE[::-1]).save(r / "masks" / "walk 4.png"),
                ValueError,
                "expected a palette or 8-bit greyscale image",
            ),
            (
                lambda r: (r / "images" / "walk 4.jpg").write_bytes(b"\xff\xd8\xff"),
                ValueError,
                r"walk 4\.jpg: expected an image file",
            ),
        ],
    )  # fmt: skip
    def test_the_file_is_named(self, beach: Path, break_it, error, message):
        break_it(beach)
        with pytest.raises(error, match=message):
            FolderDataset(beach, "all", decode_cache=True)

    def test_unknown_splits_and_limits(self, beach: Path):
        with pytest.raises(FileNotFoundError, match="no such split; give train, val, all"):
            FolderDataset(beach, "test")
        with pytest.raises(FileNotFoundError, match="no such split"):
            FolderDataset(beach, "classes")
        with pytest.raises(ValueError, match="limit must be at least 1 image, got 0"):
            FolderDataset(beach, limit=0)

    def test_too_few_images(self, beach: Path):
        for path in (beach / "images").iterdir():
            if path.stem != "walk 0":
                path.unlink()
        assert FolderDataset(beach, "val").names == ["walk 0"]
        with pytest.raises(ValueError, match="expected at least 2 images"):
            FolderDataset(beach, "train")
        (beach / "images" / "walk 0.jpg").unlink()
        with pytest.raises(ValueError, match="expected images, got an empty folder"):
            FolderDataset(beach)


def test_fine_tuning_by_command(
    beach: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread
) -> None:
    """From the shipped weights to five other classes, evaluated and used, in four commands."""
    run = tmp_path / "run"
    common = ["--data", str(beach), "--quiet"]
    new = ["--init", "shapes-deconvnet", "--new-classes"]
    stage = ["--stage", "2", "--iterations", "60"]
    assert main(["train", *common, *stage, *new, "--out", str(run)]) == 0
    weights = run / "weights.safetensors"
    model = load_model(weights)
    assert tuple(model.metadata["class_names"]) == NAMES
    assert model.metadata["class_colours"][1] == [0xE6, 0x9F, 0]

    networks = ["--deconvnet", str(weights), "--fcn", "none"]
    out = tmp_path / "result.json"
    evaluation = ["--split", "all", *networks, "--no-crf", "--out", str(out)]
    assert main(["evaluate", *common, *evaluation]) == 0
    methods = json.loads(out.read_text())["methods"]
    assert methods["deconvnet"]["miou"] > 30  # background alone is under 20

    labels = tmp_path / "labels.png"
    photo = beach / "images" / "walk 1.png"
    assert main(["segment", str(photo), "-o", str(labels), *networks]) == 0
    assert set(read_label_map(labels).unique().tolist()) <= set(range(5))
    with Image.open(labels) as image:
        assert image.getpalette()[3:6] == [0xE6, 0x9F, 0]
    assert "background" in capsys.readouterr().out


def test_lists_of_windows_notepad_are_read(beach: Path) -> None:
    """It puts a byte order mark before the first name."""
    for name, text in (("classes.txt", CLASSES), ("train.txt", "walk 3\nwalk 5.png\n")):
        (beach / name).write_text(text, encoding="utf-8-sig")
    dataset = open_dataset(beach, "train")
    assert (dataset.class_names, dataset.names) == (NAMES, ["walk 3", "walk 5"])
    (beach / "ImageSets" / "Segmentation").mkdir(parents=True)
    (beach / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n", encoding="utf-8-sig")
    assert voc.read_split(beach, "val") == ["a"]


def test_fine_tuning_from_the_weights_for_photographs(beach: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "--data", str(beach), "--quiet", "--recipe", "compact", "--stage", "2"]
    start = ["--init", "voc-deconvnet", "--new-classes", "--iterations", "1"]
    assert main([*command, *start, "--out", str(run)]) == 0
    old, new = load_model(pretrained("voc-deconvnet")), load_model(run / "weights.safetensors")
    assert tuple(new.metadata["class_names"]) == NAMES
    assert new.score.out_channels == len(NAMES)
    for name, tensor in old.encoder.state_dict().items():
        assert torch.equal(new.encoder.state_dict()[name], tensor)
    step = new.decoder.blocks[0][0][0].weight - old.decoder.blocks[0][0][0].weight
    assert 0 < step.abs().max() < 0.01
