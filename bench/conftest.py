"""The option of `pytest bench`."""


def pytest_addoption(parser):
    """Add --quick."""
    parser.addoption("--quick", action="store_true", help="bench: toy shapes, seconds in all")
