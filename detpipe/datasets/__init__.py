"""Annotated images from files to batches.

``COCO | VOC | Demo``  --load-->  packed `Annotations`  --`DetectionDataset`-->  image and target  --loaders-->  batches

Every fault of the data is an error that names file, record and field before the first training step, or a counted skip.
"""

from detpipe.datasets.coco import COCO, COCOFiles, load_coco
from detpipe.datasets.datamodule import DetectionData, Loader
from detpipe.datasets.dataset import DetectionDataset
from detpipe.datasets.decode import image_size, read_image
from detpipe.datasets.demo import Demo, DemoScenes, write_demo
from detpipe.datasets.transforms import Augment
from detpipe.datasets.voc import VOC, VOCFormat, load_voc

__all__ = [
    "COCO",
    "VOC",
    "Augment",
    "COCOFiles",
    "Demo",
    "DemoScenes",
    "DetectionData",
    "DetectionDataset",
    "Loader",
    "VOCFormat",
    "image_size",
    "load_coco",
    "load_voc",
    "read_image",
    "write_demo",
]
