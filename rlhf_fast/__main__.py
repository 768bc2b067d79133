"""`python -m rlhf_fast ARGUMENTS` does the same as `rlhf-fast ARGUMENTS`. Launchers such as torchrun need this form."""

import sys

from rlhf_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
