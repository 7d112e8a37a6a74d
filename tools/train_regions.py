"""Run ``detpipe train_regions``; ``python tools/train_regions.py --help`` shows its options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.cli import main

if __name__ == "__main__":
    sys.exit(main(["train_regions", *sys.argv[1:]]))
