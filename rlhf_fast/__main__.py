"""`python -m rlhf_fast ARGUMENTS` is `rlhf-fast ARGUMENTS`: the form that launchers such as torchrun need."""

import sys

from rlhf_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
