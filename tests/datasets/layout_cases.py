"""The layouts that labeling tools and hubs write, each with the same images and boxes.

A case says where the files go; what is in them is the same for all: ``SCENES``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import CLASSES, HEIGHT, SCENES, STEMS, WIDTH
from .tool_cases import each, exported

SPLITS = {"train": STEMS[:2], "valid": STEMS[2:3], "test": STEMS[3:]}


def picture(path: Path, stem: str) -> None:
    """An image whose content tells the stem, in the format of its suffix."""
    pixels = np.full((HEIGHT, WIDTH, 3), 40 + 20 * STEMS.index(stem), np.uint8)
    for name, x1, y1, x2, y2 in SCENES[stem]:
        pixels[y1:y2, x1:x2] = (220, 60, 60) if name == "ball" else (60, 60, 220)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def xml(stem: str, file_name: str = "") -> str:
    """An annotation, counted from 1; some tools write decimals."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}.00</xmin><ymin>{y1 + 1}.00</ymin>"
        f"<xmax>{x2}.00</xmax><ymax>{y2}.00</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in SCENES[stem]
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><filename>{file_name or f'{stem}.jpg'}</filename>{size}{objects}</annotation>"


def lines(stem: str) -> str:
    """Labels of YOLO."""
    return "".join(
        f"{CLASSES.index(name)} {(x1 + x2) / 2 / WIDTH} {(y1 + y2) / 2 / HEIGHT} {(x2 - x1) / WIDTH} {(y2 - y1) / HEIGHT}\n"
        for name, x1, y1, x2, y2 in SCENES[stem]
    )


def rows(stems: tuple[str, ...]) -> str:
    """Rows of a table, an image without objects with empty columns."""
    table = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for stem in stems:
        file = f"{stem}.jpg"
        table += [f"{file},{WIDTH},{HEIGHT},{label},{x1},{y1},{x2},{y2}" for label, x1, y1, x2, y2 in SCENES[stem]]
        table += [f"{file},{WIDTH},{HEIGHT},,,,,"] if not SCENES[stem] else []
    return "\n".join(table) + "\n"


def coco(stems: Iterable[str], name: str = "{}.jpg", first: int = 1, root: str = "") -> str:
    """A file of COCO of some images; ``root`` is a category above all others."""
    categories = [{"id": first + k, "name": one, "supercategory": root or "none"} for k, one in enumerate(CLASSES)]
    categories = [{"id": 0, "name": root, "supercategory": "none"}, *categories] if root else categories
    images = [{"id": k, "file_name": name.format(s), "width": WIDTH, "height": HEIGHT} for k, s in enumerate(stems)]
    boxes = [(k, *box) for k, stem in enumerate(stems) for box in SCENES[stem]]
    annotations = [
        {"id": n, "image_id": image, "category_id": first + CLASSES.index(label), "bbox": [x1, y1, x2 - x1, y2 - y1],
         "iscrowd": 0, "segmentation": []}
        for n, (image, label, x1, y1, x2, y2) in enumerate(boxes)
    ]  # fmt: skip
    parts = {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": annotations}
    return json.dumps(parts)


@dataclass(frozen=True)
class Layout:
    """Where the files of a data set go.

    Args:
        name: of the case.
        layout: as which it is recognized.
        images: of each image, with ``{split}`` and ``{stem}``.
        labels: of each annotation, with the same; empty where the annotations are in ``files``.
        splits: name -> stems, as they are recognized.
        says: what the line says, in which it is told how the data are read.
        files: further files.
    """

    name: str
    layout: str
    images: str
    labels: str
    splits: dict[str, tuple[str, ...]]
    says: str
    files: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def write(self, root: Path) -> Path:
        """Write the data set; returns its root."""
        content: Callable[[str], str] = lines if self.labels.lower().endswith(".txt") else xml
        for split, stems in self.splits.items():
            for stem in stems:
                picture(root / self.images.format(split=split, stem=stem), stem)
                if self.labels:
                    text(root / self.labels.format(split=split, stem=stem), content(stem))
        for name, content_of in self.files.items():
            text(root / name, content_of)
        return root


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


ALL = {"all": STEMS}
TWO = {"train": STEMS[:2], "val": STEMS[2:]}
NAMES = "ball\nbox\n"
LISTED = "".join(f"{stem}\n" for stem in STEMS)

HUB = {f"{split}/_annotations.coco.json": coco(stems, root="things") for split, stems in SPLITS.items()}
OFFICIAL = {f"annotations/instances_{split}.json": coco(stems) for split, stems in SPLITS.items()}
OFFICIAL["annotations/person_keypoints_train.json"] = coco(["a"])  # is not looked at

LAYOUTS = [
    # COCO
    Layout("official", "coco", "{split}/{stem}.jpg", "", SPLITS, "instances_train.json of the images in train (and", OFFICIAL),
    Layout("official, in images", "coco", "images/{split}/{stem}.jpg", "", SPLITS, "images in images/train (and", OFFICIAL),
    Layout("hub", "coco", "{split}/{stem}.jpg", "", SPLITS, "train/_annotations.coco.json of the images in train (and", HUB),
    Layout("hub, in a folder", "coco", "export/{split}/{stem}.jpg", "", SPLITS, "of the images in export/train",
           {f"export/{name}": content for name, content in HUB.items()}),
    Layout("default", "coco", "images/default/{stem}.jpg", "", {"default": STEMS}, "in images/default",
           {"annotations/instances_default.json": coco(STEMS)}),
    Layout("result", "coco", "images/{stem}.jpg", "", {"result": STEMS}, "result.json of the images in images",
           {"result.json": coco(STEMS, "images\\{}.jpg", 0)}),
    Layout("data", "coco", "data/{stem}.jpg", "", {"data": STEMS}, "in data", {"labels.json": coco(STEMS)}),
    Layout("beside", "coco", "train/{stem}.jpg", "", {"train": STEMS}, "in train", {"train/coco.json": coco(STEMS)}),
    Layout("at the top", "coco", "{stem}.jpg", "", {"train": STEMS}, "images in the folder", {"train.json": coco(STEMS)}),
    Layout("names with folders", "coco", "images/train/{stem}.jpg", "", {"train": STEMS}, "train.json",
           {"train.json": coco(STEMS, "/".join(["images", "train", "{}.jpg"]))}),
    Layout("folders that are not there", "coco", "images/{stem}.jpg", "", {"val": STEMS}, "val.json",
           {"val.json": coco(STEMS, "job 7\\images\\{}.jpg")}),
    Layout("images of all splits", "coco", "images/{stem}.jpg", "", SPLITS, "annotations/train.json",
           {f"annotations/{split}.json": coco(stems) for split, stems in SPLITS.items()}),
    Layout("folders of splits", "coco", "{split}/data/{stem}.jpg", "", SPLITS, "train/labels.json",
           {f"{split}/labels.json": coco(stems) for split, stems in SPLITS.items()}),
    Layout("official, images of no split", "coco", "images/{stem}.jpg", "", TWO, "instances_train.json of the images in images", {
        f"annotations/instances_{split}.json": coco(stems) for split, stems in TWO.items()}),
    Layout("annotations in folders of splits", "coco", "{split}/images/{stem}.jpg", "", SPLITS, "images in train/images (and", {
        f"{split}/annotations/instances.json": coco(stems) for split, stems in SPLITS.items()}),
    Layout("annotations three folders further down", "coco", "job/{split}/images/{stem}.jpg", "", TWO, "in job/train/images (and", {
        f"job/{split}/annotations/instances.json": coco(stems) for split, stems in TWO.items()}),
    Layout("names of splits among other words", "coco", "images/{split}/{stem}.jpg", "", TWO, "the images in images/train (and", {
        f"annotations/{split}_annotations.json": coco(stems) for split, stems in TWO.items()}),
    Layout("official, a folder further down", "coco", "set/{split}/{stem}.jpg", "", TWO, "of the images in set/train (and", {
        "set/annotations/person_keypoints_train.json": coco(["a"])} | {
        f"set/annotations/instances_{split}.json": coco(stems) for split, stems in TWO.items()}),
    Layout("images in a folder of any name", "coco", "raw photos/sub/{stem}.jpg", "", {"train": STEMS}, "images in raw photos",
           {"labels/train.json": coco(STEMS, "/".join(["sub", "{}.jpg"]))}),
    Layout("paths of another machine", "coco", "photos/{stem}.jpg", "", {"train": STEMS}, "train.json", {
        "train.json": coco(STEMS, "C:\\Users\\me\\photos\\{}.jpg")}),
    Layout("names without suffixes", "coco", "photos/{stem}.png", "", {"train": STEMS}, "of the images in photos", {
        "train.json": coco(STEMS, "/".join(["", "home", "me", "{}"]))}),
    Layout("addresses in the place of names", "coco", "{split}/{stem}.jpg", "",
           {f"my_{split}": stems for split, stems in TWO.items()}, "annotations/my_train.json of the images in", {
        f"annotations/my_{split}.json": coco(stems, f"http://a.org/my_{split}/{{}}.jpg").replace("file_name", "coco_url")
        for split, stems in TWO.items()}),
    # what tools export in formats of their own
    Layout("CreateML", "coco", "{split}/{stem}.jpg", "", SPLITS, "train/_annotations.createml.json (CreateML) of the", {
        f"{split}/_annotations.createml.json": exported("CreateML", stems) for split, stems in SPLITS.items()}),
    Layout("CVAT", "coco", "images/{stem}.jpg", "", {"images": STEMS}, "annotations.xml (CVAT) of the images in images", {
        "annotations.xml": exported("CVAT", STEMS)}),
    Layout("CVAT, labels.xml", "coco", "data/{stem}.jpg", "", {"data": STEMS}, "labels.xml (CVAT) of the images in data", {
        "labels.xml": exported("CVAT", STEMS)}),
    Layout("CVAT of tasks", "coco", "{split}/images/{stem}.jpg", "", TWO, "train/annotations.xml (CVAT) of the", {
        f"{split}/annotations.xml": exported("CVAT", stems) for split, stems in TWO.items()}),
    Layout("Hugging Face", "coco", "data/{split}/{stem}.jpg", "", TWO, "metadata.jsonl (Hugging Face) of", {
        f"data/{split}/metadata.jsonl": exported("Hugging Face", stems) for split, stems in TWO.items()}),
    Layout("KITTI", "coco", "{split}/image_2/{stem}.png", "", {"training": STEMS}, "training/label_2 (KITTI) of the", each(
        "KITTI", "{split}/label_2/{stem}.txt", {"training": STEMS})),
    Layout("LabelMe", "coco", "{split}/{stem}.jpg", "", SPLITS, "train (LabelMe) of the images in train", each(
        "LabelMe", "{split}/{stem}.json", SPLITS)),
    Layout("LabelMe in a sister folder", "coco", "photos/{stem}.jpg", "", {"labels": STEMS}, "labels (LabelMe) of the images in",
           each("LabelMe", "labels/{stem}.json", {"": STEMS})),
    Layout("Label Studio", "coco", "sub/{stem}.jpg", "", {"project-1": STEMS}, "project-1.json (Label Studio) of the", {
        "project-1.json": exported("Label Studio", STEMS)}),
    Layout("Label Studio, JSON-MIN", "coco", "upload/{stem}.jpg", "", {"my": STEMS}, "my.json (Label Studio) of the", {
        "my.json": exported("Label Studio MIN", STEMS)}),
    Layout("Supervisely", "coco", "ds/{split}/img/{stem}.jpg", "", TWO, "ds/train/ann (Supervisely) of the images in ds/", each(
        "Supervisely", "ds/{split}/ann/{stem}.jpg.json", TWO)),
    Layout("VIA", "coco", "{split}/{stem}.jpg", "", TWO, "train/via_project.json (VIA) of the images in train", {
        f"{split}/via_project.json": exported("VIA", stems) for split, stems in TWO.items()}),
    Layout("VIA table", "coco", "train/{stem}.jpg", "", {"train": STEMS}, "train/via_region_data.csv (VIA) of the images", {
        "train/via_region_data.csv": exported("VIA table", STEMS)}),
    # XML
    Layout("xml beside images in splits", "voc", "{split}/{stem}.jpg", "{split}/{stem}.xml", SPLITS, "train, valid, test"),
    Layout("xml beside images", "voc", "{stem}.jpg", "{stem}.xml", ALL, "XML beside the images in the folder"),
    Layout("xml in a sister folder", "voc", "images/{stem}.png", "annotations/{stem}.xml", ALL, "XML in annotations"),
    Layout("xml in labels", "voc", "data/{stem}.jpg", "labels/{stem}.xml", {"data": STEMS}, "XML in labels"),
    Layout("capitals", "voc", "Images/{stem}.JPG", "Labels/{stem}.XML", ALL, "XML in Labels of the images in Images"),
    Layout("bmp and a list", "voc", "JPEGImages/{stem}.bmp", "Annotations/{stem}.xml", {"train": STEMS}, "lists in ImageSets/Main",
           {"ImageSets/Main/train.txt": LISTED}),
    Layout("a default list", "voc", "JPEGImages/{stem}.jpg", "Annotations/{stem}.xml", {"default": STEMS}, "XML in Annotations",
           {"ImageSets/Main/default.txt": LISTED}),
    Layout("lists with suffixes of other images", "voc", "JPEGImages/{stem}.webp", "Annotations/{stem}.xml", TWO, "lists in",
           {"ImageSets/Main/train.txt": "a.jpg\nb 1.jpg\n",
           "ImageSets/Main/val.txt": "JPEGImages/c.jpg\nC:\\x\\JPEGImages\\d.jpg\n"}),
    Layout("lists of images in folders", "voc", "JPEGImages/sub/{stem}.jpg", "Annotations/sub/{stem}.xml", {"train": STEMS},
           "lists",
           {"ImageSets/Main/train.txt": "".join(f"sub/{stem}\n" for stem in STEMS)}),
    Layout("lists of classes only", "voc", "JPEGImages/{stem}.jpg", "Annotations/{stem}.xml", TWO, "lists in ImageSets/Main", {
        f"ImageSets/Main/{name}_{split}.txt": "".join(
            f"{stem}.jpg {1 if any(one[0] == name for one in SCENES[stem]) else -1}\n" for stem in stems)
        for split, stems in TWO.items() for name in CLASSES}),
    Layout("lists beside other folders", "voc", "images/{stem}.tif", "xml/{stem}.xml", {"val": STEMS}, "XML in xml",
           {"imagesets/val.txt": LISTED}),
    Layout("a folder further down", "voc", "My Set/JPEGImages/{stem}.jpg", "My Set/Annotations/{stem}.xml",
           {"train": STEMS}, "lists in My Set/ImageSets/Main", {"My Set/ImageSets/Main/train.txt": LISTED}),
    Layout("splits in both folders", "voc", "images/{split}/{stem}.jpg", "annotations/{split}/{stem}.xml", TWO,
           "annotations/train"),
    Layout("splits of images only", "voc", "images/{split}/{stem}.jpg", "annotations/{stem}.xml", TWO, "XML in annotations"),
    Layout("splits of annotations only", "voc", "img/{stem}.jpg", "ann/{split}/{stem}.xml", TWO, "XML in ann/train"),
    Layout("folders in splits", "voc", "{split}/images/{stem}.jpg", "{split}/xmls/{stem}.xml", TWO, "train/xmls"),
    Layout("split and word in one name", "voc", "{split}_images/{stem}.jpg", "{split}_annotations/{stem}.xml", TWO,
           "train_annotations"),
    Layout("xml a folder deeper", "voc", "images/{stem}.jpg", "annotations/xmls/{stem}.xml", ALL, "XML in annotations/xmls"),
    Layout("xml in a folder of the images", "voc", "{stem}.jpg", "Bounding boxes/{stem}.xml", ALL, "XML in Bounding boxes"),
    Layout("folders that are no splits", "voc", "Äpfel {split}/{stem}.jpg", "Äpfel {split}/{stem}.xml", ALL, "Äpfel all"),
    Layout("other words for splits", "voc", "{split}/{stem}.jpeg", "{split}/{stem}.xml",
           {"Training": STEMS[:2], "Validation": STEMS[2:]}, "XML beside the images in Training, Validation"),
    Layout("lists beside the folders", "voc", "images/{stem}.jpg", "annotations/{stem}.xml", TWO, "lists in the folder", {
        "train.txt": "a.jpg\nimages/b 1.jpg\n", "val.txt": "c\nd\n", "readme.txt": "a\n", "test notes.txt": "none\n"}),
    Layout("VOCdevkit as it is unpacked", "voc", "VOCdevkit/VOC2012/JPEGImages/{stem}.jpg",
           "VOCdevkit/VOC2012/Annotations/{stem}.xml", {"2012:train": STEMS[:2], "2012:val": STEMS[2:]}, "lists in VOCdevkit/", {
        "VOCdevkit/VOC2012/ImageSets/Main/train.txt": "a\nb 1\n", "VOCdevkit/VOC2012/ImageSets/Main/val.txt": "c\nd\n"}),
    Layout("names in quotes", "voc", "JPEGImages/{stem}.jpg", "Annotations/{stem}.xml", TWO, "lists in ImageSets/Main", {
        "ImageSets/Main/train.txt": 'a\n"b 1"\n', "ImageSets/Main/ball_train.txt": 'a  1\n"b 1"  1\n',
        "ImageSets/Main/val.txt": "c\nd\n"}),
    Layout("lists of images with their annotations", "voc", "images/{stem}.jpg", "annotations/{stem}.xml", TWO, "lists in the", {
        "train.txt": "./images/a.jpg ./annotations/a.xml\n./images/b 1.jpg ./annotations/b 1.xml\n",
        "val.txt": "./images/c.jpg ./annotations/c.xml\n./images/d.jpg ./annotations/d.xml\n"}),
    # YOLO
    Layout("classes.txt", "yolo", "images/{stem}.jpg", "labels/{stem}.txt", ALL, "classes.txt, labels in labels", {
        "classes.txt": NAMES, "notes.json": json.dumps({"categories": [{"id": 1, "name": "box"}, {"id": 0, "name": "ball"}]})}),
    Layout("notes.json", "yolo", "images/{stem}.jpg", "labels/{stem}.txt", ALL, "notes.json",
           {"notes.json": json.dumps({"categories": [{"id": 1, "name": "box"}, {"id": 0, "name": "ball"}]})}),
    Layout("labels after a mark and an empty line", "yolo", "images/{stem}.jpg", "labels/{stem}.txt", ALL, "classes.txt",
           {"classes.txt": NAMES, "labels/a.txt": f"\ufeff\n{lines('a')}"}),
    Layout("labels with capital suffixes", "yolo", "images/{stem}.JPG", "labels/{stem}.TXT", ALL, "labels in labels",
           {"classes.txt": NAMES}),
    Layout("labels beside images", "yolo", "{stem}.png", "{stem}.txt", ALL, "labels beside the images", {"classes.txt": NAMES}),
    Layout("labels beside images called images", "yolo", "Images/{stem}.JPG", "Images/{stem}.txt", ALL,
           "beside the images in Images",
           {"Images/classes.txt": NAMES + "\n"}),
    Layout("capitals of labels", "yolo", "Images/{split}/{stem}.jpg", "Labels/{split}/{stem}.txt", TWO, "Labels/train",
           {"Labels/classes.txt": NAMES}),
    Layout("sister folder of any name", "yolo", "frames of a video/{stem}.jpg", "obj/{stem}.txt", ALL, "labels in obj",
           {"obj.names": NAMES}),
    Layout("hub with darknet labels", "yolo", "{split}/{stem}.jpg", "{split}/{stem}.txt", SPLITS, "labels beside",
           {f"{split}/_darknet.labels": NAMES for split in SPLITS}),
    Layout("lists without a file that names them", "yolo", "images/{stem}.jpg", "labels/{stem}.txt", TWO, "classes.txt", {
        "classes.txt": NAMES, "train.txt": "./images/a.jpg\n./images/b 1.jpg\n", "val.txt": "images/c.jpg\nimages/d.jpg\n"}),
    Layout("a folder of its own", "yolo", "set v1/{split}/images/{stem}.jpg", "set v1/{split}/labels/{stem}.txt", TWO,
           "my.yaml", {"set v1/my.yaml": "train: train/images\nval: val/images\nnames: [ball, box]\n"}),
    Layout("obj.data", "yolo", "obj_train_data/{stem}.jpg", "obj_train_data/{stem}.txt", {"train": STEMS}, "obj.data", {
        "obj.data": "classes = 2\n# made by hand\nnames = data/obj.names\ntrain = data/train.txt\nbackup = backup/\n",
        "obj.names": NAMES, "train.txt": "".join(f"data/obj_train_data/{stem}.jpg\n" for stem in STEMS)}),
    Layout("capitals and suffixes of another machine", "yolo", "Obj_Train_Data/{stem}.png", "Obj_Train_Data/{stem}.txt",
           {"train": STEMS}, "obj.data", {"obj.data": "names = data/OBJ.names\ntrain = data/Train.txt\n", "obj.names": NAMES,
                        "train.txt": "".join(f"data\\obj_train_data\\{stem}.JPG\n" for stem in STEMS)}),
    Layout("yaml of another machine", "yolo", "images/{split}/{stem}.jpg", "labels/{split}/{stem}.txt", {"val": STEMS},
           "dataset.yaml",
           {"dataset.yaml": "path: /somewhere/else\nval: ./images/val/\nnames:\n  '1': box\n  '0': ball\n"}),
    Layout("yaml a folder further down", "yolo", "{split}/images/{stem}.jpg", "{split}/labels/{stem}.txt", SPLITS, "data.yaml", {
        "data.yaml": "train: ../train/images\nvalid: ../valid/images\ntest: ../test/images\nnc: 2\nnames: [ball, box]\n",
        "hyp.yaml": "lr: 0.1\n"}),
    Layout("yaml without splits", "yolo", "images/{split}/{stem}.jpg", "labels/{split}/{stem}.txt", TWO,
           "my.yml, labels in labels/train",
           {"my.yml": "names: {1: box, 0: ball}\n"}),
    Layout("lists with paths of other machines", "yolo", "images/{split}/{stem}.jpg", "labels/{split}/{stem}.txt", TWO,
           "data.yaml", {
        "data.yaml": "path: C:\\data\ntrain: lists/train.txt\nval: /content/lists/val.txt\nnames: [ball, box]\n",
        "lists/train.txt": "D:\\set\\images\\train\\a.jpg\n..\\images\\train\\b 1.jpg\n",
        "lists/val.txt": "/content/set/images/val/c.jpg\n../images/val/d.jpg\n"}),
    Layout("yaml beside the folder of its path", "yolo", "My Set/images/{split}/{stem}.jpg", "My Set/labels/{split}/{stem}.txt",
           TWO, "data.yaml", {"data.yaml": "path: ../datasets/my set\ntrain: images/train\nval: images/val\nnames: [ball, box]\n"}),
    Layout("yaml with a split that is not there", "yolo", "{split}/images/{stem}.jpg", "{split}/labels/{stem}.txt", TWO,
           "data.yaml, without test: ../test/images is not there",
           {"data.yaml": "train: ../train/images\nval: ../val/images\ntest: ../test/images\nnames: [ball, box]\n"}),
    # tables
    Layout("table of ids of images", "csv", "train/{stem}.png", "", {"train": STEMS}, "train.csv", {
        "train.csv": rows(STEMS).replace(".jpg", "").replace("filename", "image_id").replace("xmin", "x_min")}),
    Layout("table with a class of images without boxes", "csv", "{stem}.jpg", "", ALL, "boxes.csv", {
        "boxes.csv": rows(STEMS).replace(f"c.jpg,{WIDTH},{HEIGHT},", f"c.jpg,{WIDTH},{HEIGHT},nothing")}),
    Layout("table of parts of the image", "csv", "train/{stem}.jpg", "", {"train-annotations-bbox": STEMS}, "-bbox.csv", {
        "train-annotations-bbox.csv": "ImageID,LabelName,XMin,XMax,YMin,YMax\nc,,,,,\n" + "".join(
            f"{stem},{label},{x1 / WIDTH},{x2 / WIDTH},{y1 / HEIGHT},{y2 / HEIGHT}\n"
            for stem in STEMS for label, x1, y1, x2, y2 in SCENES[stem])}),
    Layout("table with ids of classes", "csv", "data/{stem}.jpg", "", ALL, "labels/detections.csv", {
        "metadata/classes.csv": "LabelName,DisplayName\n/m/01,ball\n/m/02,box\n",
        "labels/detections.csv": "ImageID,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\nc,,,,,,,\n" + "".join(
            f"{stem},/m/0{1 + (label == 'box')},1,{x1 / WIDTH},{x2 / WIDTH},{y1 / HEIGHT},{y2 / HEIGHT},-1\n"
            for stem in STEMS for label, x1, y1, x2, y2 in SCENES[stem])}),
    Layout("table without names of columns", "csv", "images/{stem}.jpg", "", ALL, "annotations.csv", {
        "classes.csv": "ball,0\nbox,1\n", "annotations.csv": "".join(
            f"images/{stem}.jpg,{x1},{y1},{x2},{y2},{label}\n" for stem in STEMS
            for label, x1, y1, x2, y2 in SCENES[stem] or [("", "", "", "", "")])}),
    Layout("table of makesense.ai", "csv", "{stem}.jpg", "", {"all": ("a", "b 1", "d")}, "labels_my.csv", {
        "labels_my.csv": "".join(f"{label},{x1},{y1},{x2 - x1},{y2 - y1},{stem}.jpg,{WIDTH},{HEIGHT}\n" for stem in STEMS
            for label, x1, y1, x2, y2 in SCENES[stem])}),
    Layout("table of AutoML", "csv", "{stem}.jpg", "", {"TRAIN": ("a", "b 1"), "VALIDATION": ("d",)}, "data.csv", {
        "data.csv": "".join(
            f"{split},gs://bucket/{stem}.jpg,{label},{x1 / WIDTH},{y1 / HEIGHT},,,{x2 / WIDTH},{y2 / HEIGHT},,\n"
            for split, stem in (("TRAIN", "a"), ("TRAIN", "b 1"), ("VALIDATION", "d"))
            for label, x1, y1, x2, y2 in SCENES[stem])}),
    Layout("tables in splits", "csv", "{split}/{stem}.jpg", "", TWO, "train/_annotations.csv", {
        f"{split}/_annotations.csv": rows(stems) for split, stems in TWO.items()}),
    Layout("tables beside a folder of images", "csv", "images/{stem}.jpg", "", TWO, "train_labels.csv", {
        "train_labels.csv": rows(TWO["train"]), "val_labels.csv": rows(TWO["val"])}),
    Layout("table with paths of another machine", "csv", "pictures/{stem}.jpg", "", ALL, "boxes.csv", {
        "boxes.csv": rows(STEMS).replace("a.jpg", "C:\\work\\Pictures\\a.jpg").replace("c.jpg", "/mnt/set/pictures/c.jpg")}),
    Layout("table of another name", "csv", "pictures/{stem}.jpg", "", ALL, "boxes.csv", {
        "boxes.csv": rows(STEMS), "prices.csv": "name,price\nball,1\n"}),
    Layout("tables of splits in folders", "csv", "{split}/{stem}.jpg", "", TWO, "train.csv, val.csv", {
        "train.csv": rows(TWO["train"]), "val.csv": rows(TWO["val"])}),
]  # fmt: skip
