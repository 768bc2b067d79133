"""Shows files from outside docs/ on the site: mkdocs itself knows no page that does not lie in docs/.

Such files keep their place in the repository, where readers of the repository expect them. Links are written for the
repository too, as `../CONTRIBUTING.md`. This hook turns them into links between pages of the site.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
OUTSIDE = {  # path in the repository -> path on the site
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "bench/results/README.md": "results/index.md",
    "bench/results/cpu_exactness.md": "results/cpu_exactness.md",
    "bench/results/cpu_ops.md": "results/cpu_ops.md",
    "bench/results/cpu_ops.png": "results/cpu_ops.png",
    "bench/results/cpu_rollout.md": "results/cpu_rollout.md",
    "bench/results/cpu_trainers.md": "results/cpu_trainers.md",
}
SOURCE = {page: path for path, page in OUTSIDE.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


def on_files(files, config):
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = os.path.dirname(SOURCE.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def on_site(link):
        path = os.path.normpath(os.path.join(folder, link[1]))
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        return os.path.relpath(target, os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(on_site, markdown).replace(" ± ", "\u00a0±\u00a0")  # which else break over lines in tables
