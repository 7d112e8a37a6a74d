"""Detect objects with a file of ``detpipe export``, without detpipe: numpy, Pillow and onnxruntime are all it needs.

python examples/onnx_predict.py model.onnx photo.jpg [photo2.jpg ...]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, *photos: str, least: float = 0.5) -> None:
    """Print what is found in each photo, and draw nothing: a line an object."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    names = json.loads(metadata["class_names"])
    inputs = [value.name for value in session.get_inputs()]
    if inputs != ["images"]:
        sys.exit(f"{model} needs {' and '.join(inputs)}: give it boxes [1, P, 4] in pixels of the photo as well")
    for photo in photos:
        image = ImageOps.exif_transpose(Image.open(photo))
        if image.mode[0] in "IF":
            sys.exit(f"{photo} has more than 8 bits a pixel, which Pillow would cut off: convert it to 8 bits")
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))[None]  # [1, 3, h, w] uint8
        found = session.run(["boxes", "scores", "labels", "count"], {"images": pixels})
        boxes, scores, labels, count = map(np.asarray, found)
        for box, score, label in zip(boxes[0, : count[0]], scores[0], labels[0], strict=False):  # best first
            if score >= least:
                print(f"{photo}: {names[label - 1]} {score:.3f} at {[round(float(side), 1) for side in box]}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
