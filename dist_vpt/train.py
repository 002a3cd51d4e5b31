"""``accelerate launch -m dist_vpt.train RECIPE... a.b=c``: the entry point of every launcher, without any logic."""

import sys

from dist_vpt.cli.main import main

# Nothing heavy is imported here: the data loader's workers import this module again, as their main one.

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
