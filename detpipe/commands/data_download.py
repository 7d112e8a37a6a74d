"""The ``data download`` command: a public data set, laid out as the configurations expect it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detpipe.commands.parser import Parser
from detpipe.datasets.public_sets import PUBLIC_SETS, Part, check_room, from_mirror, install, is_complete
from detpipe.support.errors import UsageError
from detpipe.support.suggest import did_you_mean


def run_download(arguments: Sequence[str]) -> int:
    """Fetch and unpack a data set; what was fetched before an error is kept, and running it again goes on from there."""
    options = _parser().parse_args(list(arguments))
    if options.name not in PUBLIC_SETS:
        raise UsageError(
            f"unknown data set {options.name!r}: expected {', '.join(PUBLIC_SETS)}{did_you_mean(options.name, PUBLIC_SETS)}"
        )
    wanted, folder = PUBLIC_SETS[options.name], Path(options.output)
    parts = [from_mirror(part, options.mirror) if options.mirror else part for part in wanted.parts]
    archives = Path(options.archives) if options.archives else folder / "downloads"
    missing = [part for part in parts if not is_complete(part, folder)]
    for part in parts:
        if part not in missing:
            print(f"{folder / part.target}: complete")
    if missing:
        print(plan(missing, archives))
        folder.mkdir(parents=True, exist_ok=True)
        check_room(missing, folder, archives)
    for part in missing:
        count = install(part, folder, archives, options.keep_archives or bool(options.archives))
        print(f"{folder / part.target}: {count} files; the checksums of its archives are as expected")
    if not options.archives and archives.is_dir() and not any(archives.iterdir()):
        archives.rmdir()
    print(f"read by {' and '.join(wanted.configs)}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="detpipe data download",
        description="Fetch and unpack a public data set. What was cut off goes on where it was; what is complete is left alone.",
        epilog=f"home pages, with the terms of use: {', '.join(wanted.page for wanted in PUBLIC_SETS.values())}",
    )
    parser.add_argument("name", metavar="|".join(PUBLIC_SETS), help="the data set")
    parser.add_argument("-o", "--output", default="data", metavar="FOLDER", help="the folder of all data sets (data)")
    parser.add_argument(
        "--archives",
        metavar="FOLDER",
        help="where archives lie already, or are fetched to and stay (default: OUTPUT/downloads, removed when unpacked)",
    )
    parser.add_argument("--keep-archives", action="store_true", help="do not remove archives that are unpacked")
    parser.add_argument("--mirror", metavar="URL", help="take archives of the same names from this address")
    return parser


def plan(parts: Sequence[Part], archives: Path) -> str:
    """Say what will be fetched, a line an archive."""
    lines = []
    for remote in (remote for part in parts for remote in part.archives):
        there = archives / remote.name
        state = "is there" if there.exists() else "goes on" if there.with_name(f"{there.name}.part").exists() else ""
        lines.append(f"{remote.url}  {remote.size / 1e9:.2f} GB{f'  {state}' if state else ''}")
    return "\n".join(lines)
