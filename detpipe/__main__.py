"""``python -m detpipe``, and what launchers of several processes start: ``torchrun ... -m detpipe train CONFIG.yaml``."""

import sys

from detpipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
