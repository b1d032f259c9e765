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

from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.inference import InferenceConfig, Prediction, Predictor
from deconvnet.model import DeconvNet, ModelConfig, deconvnet_tiny, deconvnet_vgg16
from deconvnet.weights import load_model, load_vgg16, save_model

__version__ = version("deconvnet")

__all__ = [
    "DeconvNet",
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
    "save_model",
]
