"""`python -m bench COMMAND`: imports no more than the command needs, because a GPU would wait for the rest."""

import sys


def main() -> int:
    """Run the command that was named; its exit code."""
    command, *argv = sys.argv[1:] or [""]
    if command == "trust":
        from bench.trust.command import main as trust

        return trust(argv)
    if command == "static":
        from bench.static.command import main as static

        return static(argv)
    if command == "gpu":
        from bench.gpu.command import main as gpu

        return gpu(argv)
    from bench.command import main as others

    return others()


if __name__ == "__main__":
    sys.exit(main())
