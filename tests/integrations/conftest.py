"""TRL 1.16 needs Python 3.11; the extra `test` has it from there on."""

import sys

collect_ignore_glob = ["test_*.py"] if sys.version_info < (3, 11) else []
