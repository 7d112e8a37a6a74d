"""Run the study of ``examples/stn_digits``; ``python tools/train_classifier.py --help`` shows its options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe import cli

if __name__ == "__main__":
    cli.COMMANDS[""]["train_classifier"] = "stn_digits.study.train_classifier"  # its errors are then told as all are
    sys.exit(cli.main(["train_classifier", *sys.argv[1:]]))
