"""Run ``detpipe data shards``; ``python tools/make_shards.py --help`` shows its options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "shards", *sys.argv[1:]]))
