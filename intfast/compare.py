"""The door of study/compare.py: `python -m intfast.compare`."""

import sys

from intfast.study.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
