"""The ``data`` command: look at a data set, find its faults, convert and divide it; or fetch a public one."""

from __future__ import annotations

from collections.abc import Sequence

from detpipe.commands.parser import run_one_of

HELP = """usage: detpipe data check|info|show|convert|split|shards PATH ...
       detpipe data download voc07|voc12|coco2017

A data set of images with boxes. PATH is a folder in VOC, COCO or YOLO layout, a COCO annotation file (*.json, with --images),
a table with a row a box (*.csv), or shards: a folder that 'detpipe data shards' wrote, or its web address.

commands:
  check PATH            name every fault in it, and pictures that several splits share
  info PATH [-o FOLDER]
                        count and measure images and boxes, draw it, suggest sizes of anchors
  show PATH -o OUT.png  draw images with their boxes
  convert PATH --to coco|voc|yolo|csv -o FOLDER
                        write it in another layout, without loss where that can be
  split PATH -o FOLDER --parts train=.8,val=.1,test=.1
                        divide it into parts with equal shares of the objects of every class
  download voc07|voc12|coco2017 [-o FOLDER]
                        fetch and unpack a public data set, or go on where that was cut off
  shards PATH -o FOLDER --workers 8
                        write it as tar files with an index, to train from without unpacking; --verify compares them

'detpipe data COMMAND --help' shows the options of a command.
"""

COMMANDS = {
    "check": ("detpipe.commands.data_check", "run_check"),
    "info": ("detpipe.commands.data_info", "run_info"),
    "show": ("detpipe.commands.data_show", "run_show"),
    "convert": ("detpipe.commands.data_convert", "run_convert"),
    "split": ("detpipe.commands.data_split", "run_split"),
    "download": ("detpipe.commands.data_download", "run_download"),
    "shards": ("detpipe.commands.data_shards", "run_shards"),
}


def main(arguments: Sequence[str]) -> int:
    """Run a command on a data set.

    Args:
        arguments: the command and its arguments.

    Returns:
        The exit status.

    Raises:
        DetpipeError: what users can mend.
    """
    return run_one_of(COMMANDS, "data", HELP, arguments)
