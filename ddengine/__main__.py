"""`python -m ddengine`: the command line, refused where a foreign module stands in front of ours."""

import sys

from ddengine.cli import main

if __name__ == "__main__":
    sys.exit(main(pinned=False))
