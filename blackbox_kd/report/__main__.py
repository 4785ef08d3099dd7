"""`python -m blackbox_kd.report`."""

import sys

from blackbox_kd.report import main

if __name__ == "__main__":
    sys.exit(main())
