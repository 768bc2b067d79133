"""python .ci/check_release.py TAG: TAG is v and the version; the changelog begins with the version and a date."""

import re
import sys
from pathlib import Path

root = Path(__file__).parent.parent
(version,) = re.findall(r'^__version__ = "(.+)"$', (root / "rlhf_fast/__init__.py").read_text(), re.MULTILINE)
heading = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
if sys.argv[1] != f"v{version}":
    raise SystemExit(f"tag: expected v{version}, the version in rlhf_fast/__init__.py, got {sys.argv[1]}")
if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading):
    raise SystemExit(
        f"CHANGELOG.md: expected the first heading to be {version} and a date in brackets, got {heading!r}"
    )
print(f"release {version}")
