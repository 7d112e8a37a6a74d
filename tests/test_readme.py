"""What the README shows is run as it is written there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_head_in_torchvision_detector_trains_and_infers():
    [code] = [block for block in blocks("python") if "FasterRCNN" in block]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    losses, detections = names["losses"], names["detections"]
    assert {"loss_classifier", "loss_box_reg", "loss_objectness"} <= set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert set(detections[0]) == {"boxes", "scores", "labels"}
    statements = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(statements) <= 10


def test_operator_in_a_plain_module():
    [code] = blocks("python", (ROOT / "docs/roi_pooling.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(code, "roi_pooling.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    names["logits"].sum().backward()
    assert names["boxes"][0].grad is not None
    module = code[code.index("class ") : code.index("boxes = ")]
    assert len([line for line in module.splitlines() if line.strip()]) <= 10


def test_attention_in_a_network_of_others():
    [code] = blocks("python", (ROOT / "docs/attention.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(code, "attention.md", "exec"), names)
    added = [name for name, _ in names["network"].named_modules() if name.endswith(".attention")]
    assert added == [f"layer{stage}.{block}.attention" for stage, count in ((3, 6), (4, 3)) for block in range(count)]


def test_a_spatial_transformer_in_a_plain_network():
    [code] = blocks("python", (ROOT / "docs/spatial_transformer.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(code, "spatial_transformer.md", "exec"), names)
    assert names["logits"].shape == (4, 10)
    assert names["seen"].output.shape == (4, 3, 32, 32)
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    assert torch.equal(names["outline"], corners.expand(4, 4, 2))  # the identity
    names["logits"].sum().backward()
    assert names["transformer"].localization.choose.theta.bias.grad.abs().sum() > 0
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_a_head_that_looks_again():
    [code] = blocks("python", (ROOT / "docs/glimpses.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(code, "glimpses.md", "exec"), names)
    assert {"loss_classifier", "loss_box_reg", "loss_policy", "glimpse_return"} <= set(names["losses"])
    assert all(one["glimpses"].shape == (len(one["scores"]), 1, 4, 2) for one in names["found"])
    assert names["other"].glimpses.length == 3


@pytest.mark.parametrize("marker", ["the main job", "the tests"])
def test_continuous_integration_finds_its_commands(marker):
    found = re.findall(rf"^<!-- {marker} -->\n```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    assert "pip install" in found[0]


PAGES = [*(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]


@pytest.mark.parametrize("page", ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in PAGES)])
def test_files_and_pages_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"(?<![\w/.-])(?:configs|tools|docs|benchmarks|examples|tests|detpipe)/[\w./-]*\.(?:py|yaml|md|png)", text
        )
    )
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    missing += [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing
