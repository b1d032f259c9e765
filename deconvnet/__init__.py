"""Learning Deconvolution Network for Semantic Segmentation (Noh, Hong, Han, ICCV 2015).

One idea, one module; the names below are what most users need.
"""

from importlib.metadata import version

try:
    import cv2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "OpenCV cannot be loaded; a bare Debian or Ubuntu lacks two libraries that it needs: "
        "apt-get install libgl1 libglib2.0-0"
    ) from error

from deconvnet.crf import CRFConfig
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.inference import InferenceConfig, Prediction, Predictor
from deconvnet.model import DeconvNet, ModelConfig, deconvnet_tiny, deconvnet_vgg16
from deconvnet.proposals import EdgeBoxesConfig
from deconvnet.voc import read_image, write_label_map
from deconvnet.weights import load_model, load_vgg16, save_model

__version__ = version("deconvnet")

__all__ = [
    "CRFConfig",
    "DeconvNet",
    "EdgeBoxesConfig",
    "FCN8s",
    "FCNConfig",
    "InferenceConfig",
    "ModelConfig",
    "Prediction",
    "Predictor",
    "deconvnet_tiny",
    "deconvnet_vgg16",
    "load_model",
    "load_vgg16",
    "read_image",
    "save_model",
    "write_label_map",
]
