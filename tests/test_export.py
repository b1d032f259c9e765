"""The ONNX files compute what PyTorch does, and the committed one is up to date."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deconvnet import export
from deconvnet.activations import LEVELS, decoder_activations
from deconvnet.export import STAGES, export_onnx
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.shapes import make_scene
from deconvnet.weights import load_model, pretrained, save_model

COMMITTED = Path(__file__).resolve().parents[1] / "book" / "live" / "shapes-deconvnet.onnx"
NAMES = ("onnx", "onnxscript", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NAMES),
    reason="needs onnx, onnxscript and onnxruntime",
)


def small(**options) -> DeconvNet:
    torch.manual_seed(0)
    sizes = {"widths": (4, 4, 6, 6, 8), "encoder_depths": (1,) * 5, "decoder_depths": (1,) * 5}
    model = DeconvNet(ModelConfig(num_classes=3, fc_width=8, input_size=32, **sizes, **options))
    with torch.no_grad():
        for _ in range(2):  # statistics that are not zero and one
            model(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    return model.eval()


def session_of(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def expected(model: DeconvNet, images: torch.Tensor, use_switches: bool) -> dict[str, np.ndarray]:
    maps = decoder_activations(model, images, use_switches)
    last = {name.split("_")[0]: value for name, value in maps.items()}  # deconv5_2 after deconv5_1
    return {"scores": last["score"].numpy(), **{name: last[name].numpy() for name in STAGES}}


def assert_equal(session, model: DeconvNet, images: torch.Tensor, tolerance: float) -> None:
    names = [output.name for output in session.get_outputs()]
    for use_switches in (True, False):
        inputs = {"images": images.numpy(), "use_switches": np.array(use_switches)}
        found = dict(zip(names, session.run(None, inputs)))
        for name, value in expected(model, images, use_switches).items():
            np.testing.assert_allclose(found[name], value, atol=tolerance, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def committed():
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    return session_of(COMMITTED)


def test_the_committed_file_is_what_the_shipped_weights_give(committed) -> None:
    images = torch.stack(
        [
            torch.nn.functional.interpolate(make_scene(seed=s).image[None].float(), (64, 64))[0]
            for s in range(2)
        ]
    ).byte()
    model = load_model(pretrained("shapes-deconvnet"))
    assert_equal(committed, model, images, tolerance=1e-3)
    switched = model(images)
    assert (switched - decoder_activations(model, images, False)["score"]).abs().max() > 0.1


def test_the_committed_file_knows_its_classes_and_no_machine(committed) -> None:
    facts = committed.get_modelmeta().custom_metadata_map
    assert json.loads(facts["input_size"]) == 64
    names = load_model(pretrained("shapes-deconvnet")).metadata["class_names"]
    assert json.loads(facts["class_names"]) == names
    assert [output.name for output in committed.get_outputs()] == ["scores", *STAGES]
    assert COMMITTED.stat().st_size < 3e6
    content = COMMITTED.read_bytes()
    for trace in (b"site-packages", b".py", str(Path(__file__).parent).encode()):
        assert trace not in content


@needs_onnx
def test_another_network_in_any_batch_and_in_half_precision_where_that_is_exact(
    tmp_path: Path,
) -> None:
    import onnx

    save_model(small(), tmp_path / "network.safetensors", dtype=torch.float16)
    path = tmp_path / "deep" / "network.onnx"
    export.main([str(tmp_path / "network.safetensors"), str(path)])
    model, session = load_model(tmp_path / "network.safetensors"), session_of(path)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 3):
        shape = (count, 3, 32, 32)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        assert_equal(session, model, images, tolerance=1e-5)
    tensors = onnx.load(path).graph.initializer
    large = [t for t in tensors if len(t.dims) == 4 and np.prod(t.dims) > 64]
    assert len(large) >= 10
    assert {t.data_type for t in large} == {onnx.TensorProto.FLOAT16}


@needs_onnx
def test_without_stages_and_without_switches(tmp_path: Path) -> None:
    model = small(use_switches=False, batch_norm=False)  # its weights need all 32 bits
    session = session_of(export_onnx(model, tmp_path / "network.onnx", stages=False))
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == ["scores"]
    images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    (scores,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(scores, model(images).detach().numpy(), atol=1e-5)


def test_stages_follow_the_decoder() -> None:
    assert list(STAGES) == ["fc7", "fc6-deconv", *(f"deconv{level}" for level in LEVELS)]


def test_what_cannot_be_exported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "network.onnx"
    if all(importlib.util.find_spec(name) for name in NAMES):
        with pytest.raises(TypeError, match="must be a DeconvNet, got FCN8s"):
            export_onnx(FCN8s(FCNConfig.tiny()), path)
        with pytest.raises(ValueError, match="in training mode"):
            export_onnx(small().train(), path)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="onnx and onnxscript.*pip install onnx onnxscript"):
        export_onnx(small(), path)
    assert not path.exists()
