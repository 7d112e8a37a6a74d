"""The direction of imports, and the size of files and functions, read from the syntax trees."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "detpipe"
FILE_LINES, FUNCTION_LINES = 500, 60

PLAIN = ("support", "types", "boxes", "images")
# a part -> the parts that it may import; a part is a module or a folder of detpipe/, and may always import itself
ALLOWED: dict[str, tuple[str, ...]] = {
    "support": (),
    "types": ("support",),
    "boxes": ("support", "types"),
    "images": ("support", "types", "boxes"),
    "matching": PLAIN,
    "nms": ("support", "types", "boxes", "roi_pooling"),
    "conv_gradients": (),
    "winograd": ("conv_gradients",),
    "attention": PLAIN,
    "roi_pooling": (),
    "spatial_transformer": (),
    "superpixels": PLAIN,
    "stages": (*PLAIN, "roi_pooling"),
    "backbones": (*PLAIN, "stages", "attention"),
    "proposals": (*PLAIN, "stages", "matching", "nms", "superpixels"),
    "proposal_files": PLAIN,
    "heads": (*PLAIN, "stages", "roi_pooling", "spatial_transformer", "matching", "nms"),
    "datasets": (*PLAIN, "proposal_files", "superpixels"),
    "demo": (*PLAIN, "datasets"),
    "evaluation": PLAIN,
    "optimization": ("support", "stages"),
    "detector": (*PLAIN, "stages", "optimization", "winograd"),
    "regions": (
        *(*PLAIN, "stages", "optimization", "matching", "superpixels"),
        *("roi_pooling", "heads", "datasets", "evaluation"),
    ),
}
# the programs: they may import everything above, and what stands before them here; nothing above imports them
PROGRAMS = ("pictures", "prediction", "training", "zoo", "exporting", "serving", "commands", "cli", "__main__")


def part_of(module: str) -> str:
    """``detpipe.heads.fast_rcnn`` -> ``heads``; the package itself is the empty part.

    What makes superpixels is a part of its own, which proposals and masks are made with as well.
    """
    if module == "detpipe.regions.superpixels":
        return "superpixels"
    return module.partition(".")[2].partition(".")[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node: ast.AST, level_of: str = "") -> list[str]:
    """The detpipe modules that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"{level_of}: relative imports hide the direction"
        names = [node.module or ""]
        if node.module == "detpipe":
            names = [f"detpipe.{alias.name}" for alias in node.names]
        elif names[0].startswith("detpipe."):  # a module of a package, or what a module holds
            names = [one if (one := f"{names[0]}.{alias.name}") in modules() else names[0] for alias in node.names]
    else:
        names = []
    return [name for name in names if name.split(".")[0] == "detpipe"]


def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(tree(path)) for name in imported(node, str(path))}


def early_imports(path: Path) -> set[str]:
    """Those that run when the module is imported: not inside functions, not for the type checker."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(child):
                continue
            found.update(imported(child, str(path)))
            visit(child)

    visit(tree(path))
    return found


def test_every_part_has_its_place():
    parts = {part_of(module) for module in modules()} - {""}
    assert parts == set(ALLOWED) | set(PROGRAMS)


@pytest.mark.parametrize("part", [*ALLOWED, *PROGRAMS])
def test_imports_point_one_way(part):
    below = PROGRAMS[: PROGRAMS.index(part)] if part in PROGRAMS else ()
    allowed = {part, *ALLOWED.get(part, ("", *ALLOWED, *below))}  # "": the public names
    wrong = [
        f"{module} imports {name}"
        for module, path in modules().items()
        if part_of(module) == part
        for name in sorted(imports(path))
        if part_of(name) not in allowed
    ]
    assert not wrong


def test_the_walker_sees_every_kind_of_import(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport detpipe.heads, os\nfrom detpipe import boxes as b\n"
        "if TYPE_CHECKING:\n    from detpipe.cli import main\n"
        "def f():\n    from detpipe.heads.fast_rcnn import FastRCNNHead\n"
        "try:\n    import detpipe.support.files\nexcept ImportError:\n    pass\n"
    )
    early = {"detpipe.heads", "detpipe.boxes", "detpipe.support.files"}
    assert early_imports(path) == early
    assert imports(path) == early | {"detpipe.cli", "detpipe.heads.fast_rcnn"}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which leads to all others of its set."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        pending, found = list(graph[module]), set[str]()
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += graph[name]
        reached[module] = found
    sets = [{other for other in reached[module] if module in reached[other]} for module in graph]
    return [one for index, one in enumerate(sets) if one and one not in sets[:index]]


def test_no_module_leads_to_itself():
    """When it is imported, and nowhere else either: inside functions, and for the type checker."""
    early = {module: early_imports(path) & set(modules()) for module, path in modules().items()}
    assert circles(early) == []
    everywhere = {module: imports(path) & set(modules()) for module, path in modules().items()}
    assert circles(everywhere) == []


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [{"b", "c"}, {"d"}]


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tools_are_a_few_lines_over_the_package(path):
    assert len(path.read_text().splitlines()) <= 40
    assert imports(path)


@pytest.mark.parametrize("path", [*modules().values(), *sorted((ROOT / "examples").rglob("*.py"))], ids=module_of)
def test_files_and_functions_stay_small(path):
    assert len(path.read_text().splitlines()) <= FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, node.name


def loaded_after(code: str) -> set[str]:
    """The top-level packages that a fresh process has imported after running some code."""
    program = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import detpipe",
        "from detpipe.cli import main\nassert main(['--help']) == 0",
        "from detpipe.cli import main\nassert main(['trian']) == 2",
        "from detpipe.cli import main\nassert main(['--version']) == 0",
    ],
)
def test_help_and_mistakes_import_nothing_heavy(code):
    heavy = {"torch", "torchvision", "lightning", "numpy", "jsonargparse", "albumentations", "matplotlib"}
    assert not loaded_after(code) & heavy


@pytest.mark.slow
def test_pooling_and_transformers_need_neither_lightning_nor_the_rest_of_the_package():
    loaded = loaded_after(
        "import detpipe.spatial_transformer.sampler, sys\n"
        "assert 'torchvision' not in sys.modules\n"
        "import detpipe.roi_pooling\n"
        "parts = {name.split('.')[1] for name in sys.modules if name.startswith('detpipe.')}\n"
        "assert parts == {'roi_pooling', 'spatial_transformer'}, parts"
    )
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "jsonargparse", "albumentations", "pycocotools"}


def test_public_names_exist():
    import detpipe

    for name in detpipe.__all__:
        assert getattr(detpipe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'FastRCNN'"):
        _ = detpipe.FastRCNN
