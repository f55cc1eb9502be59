"""The door of study/report.py: `python -m intfast.report`."""

import sys

from intfast.study.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
