"""Annotated images from files to batches.

``COCO | VOC | YOLO | CSVBoxes | Shards``  --load-->  packed `Annotations`  --`DetectionDataset`-->  image and target  -->  batches

``ImageFolder``  --load-->  packed `LabeledImages`  --`LabeledImageDataset`-->  view and label  --loaders-->  batches

Every fault of the data is an error that names file, record and field before the first training step, or a counted skip.
"""

from detpipe.datasets.augment.augmentation import Augment
from detpipe.datasets.augment.settings import (
    Combine,
    CopyPaste,
    Degrade,
    MixUp,
    Mosaic,
    Photometric,
    SafeCrop,
    Transform,
)
from detpipe.datasets.classification import ClassificationData, Views
from detpipe.datasets.datamodule import DetectionData, Loader
from detpipe.datasets.dataset import DetectionDataset
from detpipe.datasets.decode import image_size, read_image
from detpipe.datasets.formats.coco import COCO, COCOFiles, load_coco
from detpipe.datasets.formats.csv import CSVBoxes, CSVFormat, load_csv
from detpipe.datasets.formats.voc import VOC, VOCFormat, load_voc
from detpipe.datasets.formats.yolo import YOLO, load_yolo
from detpipe.datasets.image_folder import ImageFolder
from detpipe.datasets.resize import Resize
from detpipe.datasets.sampling import Sampling
from detpipe.datasets.shards.dataset import Shards
from detpipe.types import PixelType

__all__ = [
    "COCO",
    "VOC",
    "YOLO",
    "Augment",
    "COCOFiles",
    "CSVBoxes",
    "CSVFormat",
    "ClassificationData",
    "Combine",
    "CopyPaste",
    "Degrade",
    "DetectionData",
    "DetectionDataset",
    "ImageFolder",
    "Loader",
    "MixUp",
    "Mosaic",
    "Photometric",
    "PixelType",
    "Resize",
    "SafeCrop",
    "Sampling",
    "Shards",
    "Transform",
    "VOCFormat",
    "Views",
    "image_size",
    "load_coco",
    "load_csv",
    "load_voc",
    "load_yolo",
    "read_image",
]
