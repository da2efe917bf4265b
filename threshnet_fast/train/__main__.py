"""``python -m threshnet_fast.train`` is ``threshnet-fast train``, as torchrun starts it."""

import sys

from threshnet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
