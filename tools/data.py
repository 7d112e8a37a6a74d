"""Run ``detpipe data``; ``python tools/data.py --help`` shows its commands."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
