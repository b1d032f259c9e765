"""The VOC format: against torchvision's and Pillow's readers, hand-written files and bad ones."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from deconvnet import voc
from deconvnet.files import write_atomically
from deconvnet.voc import VOID, Annotation, VOCDataset

NAMES = ("background", "cat", "potted plant")
ANNOTATIONS = [Annotation(1, (1.0, 2.0, 5.0, 7.0)), Annotation(2, (0.0, 0.0, 3.0, 3.0), True)]


def random_mask(seed: int, height: int = 12, width: int = 16, classes: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, classes + 1, (height, width), generator=generator)
    mask[mask == classes] = VOID
    return mask.to(torch.uint8)


def random_image(seed: int, height: int = 12, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of three images, the last without instance masks and annotations."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations"):
        (root / folder).mkdir(parents=True)
    for seed, name in enumerate(("a", "b", "c")):
        voc.write_image(root / "JPEGImages" / f"{name}.jpg", random_image(seed))
        voc.write_label_map(root / "SegmentationClass" / f"{name}.png", random_mask(seed))
        if name != "c":
            voc.write_label_map(root / "SegmentationObject" / f"{name}.png", random_mask(seed + 9))
            voc.write_annotations(
                root / "Annotations" / f"{name}.xml", ANNOTATIONS, (12, 16), NAMES
            )
    voc.write_split(root, "train", ["b", "a"])
    voc.write_split(root, "val", ["c"])
    (root / "classes.txt").write_text("background\ncat\npotted plant\n\n")
    return root


class TestColours:
    def test_official_values(self):
        colours = voc.palette()
        assert colours.dtype == torch.uint8 and colours.shape == (256, 3)
        official = {
            0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128),
            7: (128, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128), 16: (0, 64, 0),
            20: (0, 64, 128), 255: (224, 224, 192),
        }  # fmt: skip
        assert {label: tuple(colours[label].tolist()) for label in official} == official

    def test_all_different(self):
        assert len(torch.unique(voc.palette(), dim=0)) == 256

    def test_shorter_is_a_prefix(self):
        assert torch.equal(voc.palette(21), voc.palette()[:21])

    @pytest.mark.parametrize("n", [0, 257, -1])
    def test_bad_length(self, n):
        with pytest.raises(ValueError, match=f"got {n}"):
            voc.palette(n)

    def test_colourise_is_what_pillow_shows(self, tmp_path):
        labels = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
        voc.write_label_map(tmp_path / "m.png", labels)
        shown = np.array(Image.open(tmp_path / "m.png").convert("RGB"))
        assert np.array_equal(voc.colourise(labels).permute(1, 2, 0).numpy(), shown)

    @pytest.mark.parametrize("labels", [torch.zeros(4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)])
    def test_colourise_refuses(self, labels):
        with pytest.raises(ValueError, match=r"uint8 \[H, W\]"):
            voc.colourise(labels)

    def test_class_names(self):
        assert len(set(voc.CLASS_NAMES)) == 21
        assert [voc.CLASS_NAMES[i] for i in (0, 8, 12, 15, 20)] == [
            "background", "cat", "dog", "person", "tvmonitor",
        ]  # fmt: skip


class TestImages:
    def test_lossless_round_trip(self, tmp_path):
        image = random_image(0)
        voc.write_image(tmp_path / "i.png", image)
        assert torch.equal(voc.read_image(tmp_path / "i.png"), image)
        assert np.array_equal(np.array(Image.open(tmp_path / "i.png")), image.permute(1, 2, 0))

    def test_jpeg_is_close(self, tmp_path):
        image = torch.linspace(0, 255, 64).to(torch.uint8).expand(3, 48, 64)
        voc.write_image(tmp_path / "i.jpg", image)
        difference = voc.read_image(tmp_path / "i.jpg").int() - image.int()
        assert difference.abs().max() < 12

    def test_result_is_contiguous_and_writable(self, tmp_path):
        voc.write_image(tmp_path / "i.png", random_image(0))
        image = voc.read_image(tmp_path / "i.png")
        assert image.is_contiguous()
        image += 1

    def test_exif_orientation_is_applied(self, tmp_path):
        pixels = np.zeros((4, 8, 3), np.uint8)
        pixels[0] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: the stored top row is the right column
        Image.fromarray(pixels).save(tmp_path / "i.png", exif=exif)
        image = voc.read_image(tmp_path / "i.png")
        assert image.shape == (3, 8, 4)
        assert image[:, :, -1].min() == 255 and image[:, :, :-1].max() == 0

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
    def test_other_modes_become_rgb(self, tmp_path, mode):
        Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(tmp_path / "i.png")
        image = voc.read_image(tmp_path / "i.png")
        assert image.shape == (3, 4, 5) and image.min() == 255

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing.jpg"):
            voc.read_image(tmp_path / "nothing.jpg")

    def test_not_an_image(self, tmp_path):
        (tmp_path / "text.jpg").write_text("hello")
        with pytest.raises(ValueError, match="text.jpg: expected an image"):
            voc.read_image(tmp_path / "text.jpg")

    @pytest.mark.parametrize("suffix", ["jpg", "png"])
    def test_truncated(self, tmp_path, suffix):
        path = tmp_path / f"i.{suffix}"
        voc.write_image(path, random_image(0, 64, 64))
        path.write_bytes(path.read_bytes()[:900])
        with pytest.raises(ValueError, match=f"i.{suffix}: expected an image"):
            voc.read_image(path)

    def test_too_many_pixels(self, tmp_path, monkeypatch):
        voc.write_image(tmp_path / "huge.png", random_image(0))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        with pytest.raises(ValueError, match="huge.png: expected an image file, got Image size"):
            voc.read_image(tmp_path / "huge.png")

    def test_of_colours_of_sixteen_bits_the_upper_eight_are_read(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 1 << 16, (5, 4, 3), np.uint16)
        cv2.imwrite(str(tmp_path / "deep.png"), pixels[..., ::-1])
        expected = (pixels >> 8).astype(np.uint8).transpose(2, 0, 1)
        assert voc.read_image(tmp_path / "deep.png").numpy().tolist() == expected.tolist()

    def test_grey_of_sixteen_bits_is_refused(self, tmp_path):
        Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
        with pytest.raises(ValueError, match="deep.png: expected 8 bits"):
            voc.read_image(tmp_path / "deep.png")

    @pytest.mark.parametrize(
        "image", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8)]
    )
    def test_write_refuses_other_tensors(self, tmp_path, image):
        with pytest.raises(ValueError, match=r"uint8 \[3, H, W\]"):
            voc.write_image(tmp_path / "i.png", image)
        assert not list(tmp_path.iterdir())

    def test_write_refuses_unknown_suffix(self, tmp_path):
        with pytest.raises(ValueError, match="i.xyz: expected an image suffix"):
            voc.write_image(tmp_path / "i.xyz", random_image(0))


class TestLabelMaps:
    @settings(max_examples=30)
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
    def test_round_trip(self, tmp_path_factory, height, width, seed):
        path = tmp_path_factory.getbasetemp() / "round-trip.png"
        generator = torch.Generator().manual_seed(seed)
        size = (height, width)
        labels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        voc.write_label_map(path, labels)
        assert torch.equal(voc.read_label_map(path), labels)
        with Image.open(path) as image:
            assert image.mode == "P" and np.array_equal(np.array(image), labels)

    def test_greyscale_holds_labels(self, tmp_path):
        labels = random_mask(3)
        Image.fromarray(labels.numpy()).save(tmp_path / "grey.png")
        assert torch.equal(voc.read_label_map(tmp_path / "grey.png", num_classes=3), labels)

    @pytest.mark.parametrize(("bits", "stored"), [(2, [0, 1, 2, 3]), (4, [0, 1, 9, 15])])
    def test_greyscale_of_few_bits_holds_labels(self, tmp_path, bits, stored):
        """A PNG by hand: Pillow writes none of these, and reads them as 0 to 255."""
        row = sum(value << bits * (3 - i) for i, value in enumerate(stored))
        header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
        data = zlib.compress(b"\0" + row.to_bytes(4 * bits // 8, "big"))
        png = b"\x89PNG\r\n\x1a\n"
        for name, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
            png += struct.pack(">I", len(content)) + name + content
            png += struct.pack(">I", zlib.crc32(name + content))
        (tmp_path / "m.png").write_bytes(png)
        assert voc.read_label_map(tmp_path / "m.png").tolist() == [stored]

    def test_colours_are_not_labels(self, tmp_path):
        voc.write_image(tmp_path / "rgb.png", voc.colourise(random_mask(3)))
        with pytest.raises(ValueError, match="rgb.png: expected a palette"):
            voc.read_label_map(tmp_path / "rgb.png")

    def test_label_out_of_range(self, tmp_path):
        voc.write_label_map(tmp_path / "m.png", torch.tensor([[0, 20, 21, 255]]).byte())
        voc.read_label_map(tmp_path / "m.png", num_classes=22)
        with pytest.raises(ValueError, match=r"m.png: expected labels below 21.*got 21"):
            voc.read_label_map(tmp_path / "m.png", num_classes=21)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="m.png"):
            voc.read_label_map(tmp_path / "m.png")

    def test_lossy_suffix(self, tmp_path):
        with pytest.raises(ValueError, match=r"m.jpg.*\.png"):
            voc.write_label_map(tmp_path / "m.jpg", random_mask(0))

    def test_write_refuses_int64(self, tmp_path):
        with pytest.raises(ValueError, match="torch.int64"):
            voc.write_label_map(tmp_path / "m.png", random_mask(0).long())


class TestAtomicWriting:
    def test_failure_leaves_the_old_file_alone(self, tmp_path, monkeypatch):
        path = tmp_path / "file"
        write_atomically(path, b"old")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_missing_folders_are_made(self, tmp_path):
        write_atomically(tmp_path / "new" / "deep" / "file", b"data")
        assert (tmp_path / "new" / "deep" / "file").read_bytes() == b"data"


BY_HAND = """<annotation>
  <object><name>person</name><difficult>1</difficult>
    <bndbox><xmax>30</xmax><xmin>11</xmin><ymax>40</ymax><ymin>1</ymin></bndbox>
    <part><name>head</name>
      <bndbox><xmin>12</xmin><ymin>2</ymin><xmax>13</xmax><ymax>3</ymax></bndbox></part>
  </object>
  <object><name>cat</name>
    <bndbox><xmin>5.5</xmin><ymin>6</ymin><xmax>5.5</xmax><ymax>6</ymax></bndbox></object>
</annotation>"""

coordinate = st.one_of(st.integers(0, 500).map(float), st.floats(0, 500, width=32))
annotation = st.builds(
    lambda label, x, y, w, h, difficult: Annotation(label, (x, y, x + w, y + h), difficult),
    st.integers(1, 20), coordinate, coordinate,
    st.integers(1, 200), st.integers(1, 200), st.booleans(),
)  # fmt: skip


class TestAnnotations:
    def test_by_hand(self, tmp_path):
        (tmp_path / "a.xml").write_text(BY_HAND)
        assert voc.read_annotations(tmp_path / "a.xml") == [
            Annotation(15, (10.0, 0.0, 30.0, 40.0), True),
            Annotation(8, (4.5, 5.0, 5.5, 6.0), False),
        ]

    def test_numbers_of_arrays_and_tensors(self, tmp_path):
        for box in (np.array([2.5, 3, 4.25, 5]), torch.tensor([2.5, 3, 4.25, 5]).unbind()):
            voc.write_annotations(tmp_path / "a.xml", [Annotation(8, tuple(box))], (10, 20))
            assert voc.read_annotations(tmp_path / "a.xml")[0].box == (2.5, 3, 4.25, 5)

    @settings(max_examples=50)
    @given(st.lists(annotation, max_size=5))
    def test_round_trip(self, tmp_path_factory, annotations):
        path = tmp_path_factory.getbasetemp() / "round-trip.xml"
        voc.write_annotations(path, annotations, (10, 20))
        read = voc.read_annotations(path)
        assert [(a.label, a.difficult) for a in read] == [
            (a.label, a.difficult) for a in annotations
        ]
        boxes = torch.tensor([a.box for a in read], dtype=torch.float64)
        expected = torch.tensor([a.box for a in annotations], dtype=torch.float64)
        torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-9)

    def test_whole_coordinates_are_written_as_voc_does(self, tmp_path):
        voc.write_annotations(tmp_path / "a.xml", [Annotation(8, (0.0, 1.0, 2.0, 3.0))], (10, 20))
        text = (tmp_path / "a.xml").read_text()
        for line in (
            "<filename>a.jpg</filename>", "<width>20</width>", "<height>10</height>",
            "<name>cat</name>", "<xmin>1</xmin>", "<ymin>2</ymin>", "<xmax>2</xmax>",
            "<ymax>3</ymax>", "<difficult>0</difficult>",
        ):  # fmt: skip
            assert line in text

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("not xml", "expected VOC annotation XML"),
            ("", "expected VOC annotation XML"),
            (BY_HAND.replace("cat", "unicorn"), "got 'unicorn'"),
            (BY_HAND.replace("cat", "background"), "got 'background'"),
            (BY_HAND.replace("<xmin>5.5</xmin>", ""), "four numbers"),
            (BY_HAND.replace("<xmin>5.5</xmin>", "<xmin>left</xmin>"), "four numbers"),
            (BY_HAND.replace("<xmin>5.5</xmin>", "<xmin>nan</xmin>"), "xmin ≤ xmax"),
            (BY_HAND.replace("<xmin>5.5</xmin>", "<xmin>9</xmin>"), "xmin ≤ xmax"),
            ('<!DOCTYPE a [<!ENTITY b "cat">]><annotation>&b;</annotation>', "EntitiesForbidden"),
        ],
    )
    def test_bad_files(self, tmp_path, text, message):
        (tmp_path / "bad.xml").write_text(text)
        with pytest.raises(ValueError, match=f"(?s)bad.xml.*{message}"):
            voc.read_annotations(tmp_path / "bad.xml")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="a.xml"):
            voc.read_annotations(tmp_path / "a.xml")

    @pytest.mark.parametrize("label", [0, 21, VOID])
    def test_write_refuses_labels_of_no_object(self, tmp_path, label):
        with pytest.raises(ValueError, match=f"got {label}"):
            voc.write_annotations(tmp_path / "a.xml", [Annotation(label, (0, 0, 1, 1))], (9, 9))


class TestSplits:
    def test_order_is_kept(self, root):
        assert voc.read_split(root, "train") == ["b", "a"]

    def test_missing_names_the_others(self, root):
        with pytest.raises(FileNotFoundError, match=r"test.txt: no such split.*'train', 'val'"):
            voc.read_split(root, "test")

    def test_empty(self, root):
        voc.write_split(root, "spaced", ["my photo", "b"])
        assert voc.read_split(root, "spaced") == ["my photo", "b"]
        voc.write_split(root, "empty", [])
        with pytest.raises(ValueError, match="empty.txt: expected image names"):
            voc.read_split(root, "empty")

    @pytest.mark.parametrize("name", ["../secret", "folder/a", ".hidden", "folder\\a"])
    def test_names_stay_inside_the_folder(self, root, name):
        voc.write_split(root, "bad", ["a", name])
        with pytest.raises(ValueError, match="plain image names"):
            voc.read_split(root, "bad")


class TestDataset:
    def test_equals_torchvision(self, root):
        torchvision = pytest.importorskip("torchvision")
        folder = str(root.parent.parent)
        masks = torchvision.datasets.VOCSegmentation(folder, "2012", "train")
        dataset = VOCDataset(root, "train")
        assert len(dataset) == len(masks) == 2
        for sample, (image, mask) in zip(dataset, masks, strict=True):
            assert np.array_equal(sample.image.permute(1, 2, 0), np.array(image))
            assert np.array_equal(sample.labels, np.array(mask))

    def test_sample(self, root):
        dataset = VOCDataset(root, "train")
        assert dataset.class_names == NAMES and dataset.num_classes == 3
        sample = dataset[0]
        assert sample.name == "b"
        assert torch.equal(sample.labels, random_mask(1))
        assert torch.equal(sample.objects, random_mask(10))
        assert sample.annotations == tuple(ANNOTATIONS)

    def test_parts_equal_the_whole(self, root):
        dataset = VOCDataset(root, "train")
        sample = dataset[1]
        assert torch.equal(dataset.image(1), sample.image)
        assert torch.equal(dataset.labels(1), sample.labels)
        assert torch.equal(dataset.objects(1), sample.objects)
        assert dataset.annotations(1) == sample.annotations

    def test_without_instances(self, root):
        sample = VOCDataset(root, "val")[0]
        assert sample.objects is None and sample.annotations == ()

    def test_names_default_to_voc(self, root):
        (root / "classes.txt").unlink()
        assert VOCDataset(root, "val").class_names == voc.CLASS_NAMES

    def test_augmented_masks_are_preferred(self, root):
        (root / "SegmentationClassAug").mkdir()
        voc.write_label_map(root / "SegmentationClassAug" / "c.png", random_mask(7))
        assert torch.equal(VOCDataset(root, "val")[0].labels, random_mask(7))
        plain = VOCDataset(root, "val", masks="SegmentationClass")
        assert torch.equal(plain[0].labels, random_mask(2))

    def test_cache_needs_the_files_no_more(self, root):
        read = list(VOCDataset(root, "train"))
        cached = VOCDataset(root, "train", decode_cache=True)
        shutil.rmtree(root)
        for index, sample in enumerate(read):
            assert torch.equal(cached[index].image, sample.image)
            assert torch.equal(cached.image(index), sample.image)
            assert torch.equal(cached.labels(index), sample.labels)
            assert torch.equal(cached.objects(index), sample.objects)
            assert cached.annotations(index) == sample.annotations

    def test_a_process_that_is_not_forked_reads_the_files(self, root):
        """Sent to it, each tensor of the cache would hold a file open: a thousand are too many."""
        cached = VOCDataset(root, "train", decode_cache=True)
        sent = pickle.loads(pickle.dumps(cached))
        assert torch.equal(sent[0].image, cached[0].image)
        shutil.rmtree(root)
        assert cached[0].name == "b"
        with pytest.raises(FileNotFoundError):
            sent[0]

    def test_data_loader(self, root):
        loader = DataLoader(VOCDataset(root, "train"), batch_size=None, num_workers=1)
        assert [sample.name for sample in loader] == ["b", "a"]

    def test_end(self, root):
        with pytest.raises(IndexError):
            VOCDataset(root, "val")[1]

    def test_a_test_set_has_no_masks(self, root):
        """VOC's own has none; labels are missed when they are asked for."""
        shutil.rmtree(root / "SegmentationClass")
        dataset = VOCDataset(root, "train")
        assert dataset.image(0).shape == (3, 12, 16)
        assert VOCDataset(root, "train", max_side=8).image(0).shape == (3, 6, 8)
        assert dataset.annotations(0) == tuple(ANNOTATIONS)
        with pytest.raises(FileNotFoundError, match="SegmentationClass/b.png"):
            dataset.labels(0)
        with pytest.raises(FileNotFoundError, match="SegmentationClass/b.png"):
            VOCDataset(root, "train", decode_cache=True)

    def test_sizes_must_agree(self, root):
        voc.write_label_map(root / "SegmentationObject" / "b.png", random_mask(0, 12, 15))
        with pytest.raises(ValueError, match=r"(?s)Object/b.png.*JPEGImages/b.jpg.*12, 16.*12, 15"):
            VOCDataset(root, "train")[0]

    def test_labels_must_be_classes(self, root):
        voc.write_label_map(root / "SegmentationClass" / "b.png", random_mask(0, classes=9))
        with pytest.raises(ValueError, match=r"b.png: expected labels below 3"):
            VOCDataset(root, "train")[0]

    def test_missing_mask(self, root):
        (root / "SegmentationClass" / "b.png").unlink()
        with pytest.raises(FileNotFoundError, match="SegmentationClass/b.png"):
            VOCDataset(root, "train")[0]

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            VOCDataset(tmp_path / "nowhere")

    def test_missing_masks(self, root):
        with pytest.raises(FileNotFoundError, match="SegmentationClassAug"):
            VOCDataset(root, masks="SegmentationClassAug")

    def test_unknown_masks(self, root):
        with pytest.raises(ValueError, match="got 'SegmentationObject'"):
            VOCDataset(root, masks="SegmentationObject")

    @pytest.mark.parametrize(
        "text",
        [
            "background\n", "background\ncat\ncat\n", "background\n# cats\ncat\n",
            "background\ncat #ff0\n", "background\ncat #gg0000\n", "background\nM\xe4use\n",
        ],
    )  # fmt: skip
    def test_bad_class_names(self, root, text):
        (root / "classes.txt").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="classes.txt: expected"):
            VOCDataset(root)

    @pytest.mark.skipif(
        "DECONVNET_VOC" not in os.environ, reason="DECONVNET_VOC names no VOC2012 folder"
    )
    def test_real_data(self):
        dataset = VOCDataset(os.environ["DECONVNET_VOC"], "val")
        assert dataset.class_names == voc.CLASS_NAMES
        for index in range(0, len(dataset), max(len(dataset) // 20, 1)):
            sample = dataset[index]
            height, width = sample.labels.shape
            for item in sample.annotations:
                x0, y0, x1, y1 = item.box
                assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
                inside = sample.labels[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1]
                assert (inside == item.label).any()


class TestDownloads:
    def test_convert_sbd(self, root, tmp_path):
        savemat = pytest.importorskip("scipy.io").savemat
        sbd = tmp_path / "sbd"
        (sbd / "cls").mkdir(parents=True)
        added = random_mask(5) % 3
        for name in ("a", "c", "d"):
            savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": added.numpy()}})
        voc.convert_sbd(sbd, root)
        masks = root / "SegmentationClassAug"
        assert torch.equal(voc.read_label_map(masks / "d.png"), added)
        assert torch.equal(voc.read_label_map(masks / "a.png"), random_mask(0)), "VOC's own wins"
        assert voc.read_split(root, "train_aug") == ["a", "b", "d"]

    def test_convert_without_sbd(self, root, tmp_path):
        pytest.importorskip("scipy")
        with pytest.raises(FileNotFoundError, match="cls"):
            voc.convert_sbd(tmp_path, root)

    def test_sbd_needs_voc(self, tmp_path):
        pytest.importorskip("torchvision")
        with pytest.raises(FileNotFoundError, match="download_voc2012"):
            voc.download_sbd(tmp_path)

    def test_voc_is_asked_of_torchvision(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("torchvision.datasets")
        calls = []
        monkeypatch.setattr(datasets, "VOCSegmentation", lambda *a, **k: calls.append((a, k)))
        assert voc.download_voc2012(tmp_path) == tmp_path / "VOCdevkit" / "VOC2012"
        options = {"year": "2012", "image_set": "trainval", "download": True}
        assert calls == [((str(tmp_path),), options)]

    def test_sbd_is_downloaded_once(self, root, tmp_path, monkeypatch):
        savemat = pytest.importorskip("scipy.io").savemat
        datasets = pytest.importorskip("torchvision.datasets")
        calls = []

        def download(folder, **_):
            calls.append(folder)
            (Path(folder) / "cls").mkdir(parents=True)
            mask = random_mask(5).numpy() % 3
            savemat(Path(folder) / "cls" / "d.mat", {"GTcls": {"Segmentation": mask}})
            (Path(folder) / "val.txt").touch()

        monkeypatch.setattr(datasets, "SBDataset", download)
        for _ in range(2):
            assert voc.download_sbd(tmp_path) == root
        assert calls == [str(tmp_path / "sbd")]
        assert voc.read_split(root, "train_aug") == ["a", "b", "d"]
