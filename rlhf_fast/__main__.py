"""`rlhf-fast ARGUMENTS`, and `python -m rlhf_fast ARGUMENTS`, the form that launchers such as torchrun need."""

import sys

from rlhf_fast.extras import NotInstalled, need_train
from rlhf_fast.threads import wait_quietly


def main() -> int:
    """The command of the process's arguments. Returns its exit code, which is 1 without the extra `[train]`."""
    try:
        need_train("the command")
    except NotInstalled as error:
        print(f"rlhf-fast: {error}", file=sys.stderr)
        return 1
    wait_quietly()
    from rlhf_fast import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
