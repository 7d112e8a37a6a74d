"""The same images and boxes as labeling tools and hubs export them in formats of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable

from .scenes import HEIGHT, SCENES, WIDTH


def exported(tool: str, stems: Iterable[str]) -> str:
    """The file in which a tool holds all images."""
    scenes = [(stem, [(n, x1, y1, x2 - x1, y2 - y1) for n, x1, y1, x2, y2 in SCENES[stem]]) for stem in stems]
    if tool == "CreateML":
        return json.dumps(
            [
                {
                    "image": f"{stem}.jpg",
                    "annotations": [
                        {"label": n, "coordinates": {"x": x + w / 2, "y": y + h / 2, "width": w, "height": h}}
                        for n, x, y, w, h in boxes
                    ],
                }
                for stem, boxes in scenes
            ]
        )
    if tool == "VIA":
        return json.dumps(
            {
                "_via_img_metadata": {
                    f"{stem}.jpg9": {
                        "filename": f"{stem}.jpg",
                        "size": 9,
                        "regions": [
                            {
                                "shape_attributes": {"name": "rect", "x": x, "y": y, "width": w, "height": h},
                                "region_attributes": {"kind": n},
                            }
                            for n, x, y, w, h in boxes
                        ],
                    }
                    for stem, boxes in scenes
                }
            }
        )
    if tool == "VIA table":
        lines = ["filename,file_size,region_count,region_shape_attributes,region_attributes"]
        for stem, boxes in scenes:
            lines += [f"{stem}.jpg,9,0,{{}},{{}}"] if not boxes else []
            for n, x, y, w, h in boxes:
                shape = json.dumps({"name": "rect", "x": x, "y": y, "width": w, "height": h}).replace('"', '""')
                lines.append(f'{stem}.jpg,9,1,"{shape}","{{""kind"": ""{n}""}}"')
        return "\n".join(lines)
    if tool.startswith("Label Studio"):
        sides = {"original_width": WIDTH, "original_height": HEIGHT}
        found = [
            (
                stem,
                [
                    {
                        "x": 100 * x / WIDTH,
                        "y": 100 * y / HEIGHT,
                        "width": 100 * w / WIDTH,
                        "height": 100 * h / HEIGHT,
                        "rotation": 0,
                        "rectanglelabels": [n],
                    }
                    for n, x, y, w, h in boxes
                ],
            )
            for stem, boxes in scenes
        ]
        if tool == "Label Studio MIN":
            names = [f"/data/upload/2/{stem.replace(' ', '%20')}.jpg" for stem, _ in found]
            tasks = [
                {"image": name, "id": 7, "label": [one | sides for one in boxes]}
                for name, (_, boxes) in zip(names, found, strict=True)
            ]
        else:
            tasks = [
                {
                    "id": 7,
                    "data": {"image": f"/data/local-files/?d=sub/{stem}.jpg"},
                    "annotations": [
                        {"was_cancelled": True, "result": []},
                        {"result": [{"type": "rectanglelabels", "value": one, **sides} for one in boxes]},
                    ],
                }
                for stem, boxes in found
            ]
        return json.dumps(tasks)
    if tool == "Hugging Face":
        return "".join(
            json.dumps(
                {
                    "file_name": f"{stem}.jpg",
                    "objects": {"bbox": [box for _, *box in boxes], "categories": [n for n, *_ in boxes]},
                }
            )
            + "\n"
            for stem, boxes in scenes
        )
    images = "".join(
        f'<image id="{k}" name="{stem}.jpg" width="{WIDTH}" height="{HEIGHT}">'
        + "".join(
            f'<box label="{n}" xtl="{x}" ytl="{y}" xbr="{x + w}.00" ybr="{y + h}.00" occluded="0" z_order="0"></box>'
            for n, x, y, w, h in boxes
        )
        + "</image>"
        for k, (stem, boxes) in enumerate(scenes)
    )
    return f"<?xml version='1.0'?><annotations><version>1.1</version>{images}</annotations>"


def alone(tool: str, stem: str) -> str:
    """The file in which a tool holds one image."""
    boxes, size = SCENES[stem], (HEIGHT, WIDTH)
    if tool == "KITTI":
        lines = [f"{n} 0.00 0 -1.6 {x1}.00 {y1} {x2} {y2} 1.7 0.5 1.1 2 1.5 8.4 0.01\n" for n, x1, y1, x2, y2 in boxes]
        return "".join([*lines, "DontCare -1 -1 -10 1 1 9 9 -1 -1 -1 -1000 -1000 -1000 -10\n"])
    if tool == "Supervisely":
        return json.dumps(
            {
                "size": dict(zip(("height", "width"), size, strict=True)),
                "objects": [
                    {
                        "classTitle": n,
                        "geometryType": "rectangle",
                        "points": {"exterior": [[x2 - 1, y2 - 1], [x1, y1]], "interior": []},
                    }
                    for n, x1, y1, x2, y2 in boxes
                ],
            }
        )
    shapes = [{"label": n, "points": [[x1, y1], [x2, y2]], "shape_type": "rectangle"} for n, x1, y1, x2, y2 in boxes]
    return json.dumps({"shapes": shapes, "imagePath": f"..\\x\\{stem}.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH})


def each(tool: str, name: str, splits: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """The files of a tool that writes one an image."""
    return {name.format(split=split, stem=stem): alone(tool, stem) for split, stems in splits.items() for stem in stems}
