"""Shows files from outside docs/ on the site: mkdocs itself knows no page that does not lie in docs/.

Such files keep their place in the repository, where readers of the repository expect them. Links are written for the
repository too, as `../CONTRIBUTING.md`. This hook turns them into links between pages of the site.

In the API reference it lists the training stages and their configs, as the table of stages has them.
"""

import importlib.util
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
OUTSIDE = {  # path in the repository -> path on the site
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "examples/losses.ipynb": "losses.ipynb",
    "bench/results/README.md": "results/index.md",
    "bench/results/cpu_ahead_vllm.md": "results/cpu_ahead_vllm.md",
    "bench/results/cpu_busy_avx512.md": "results/cpu_busy_avx512.md",
    "bench/results/cpu_exactness.md": "results/cpu_exactness.md",
    "bench/results/cpu_ops.md": "results/cpu_ops.md",
    "bench/results/cpu_ops.png": "results/cpu_ops.png",
    "bench/results/cpu_ops_avx512.md": "results/cpu_ops_avx512.md",
    "bench/results/cpu_ops_avx512.png": "results/cpu_ops_avx512.png",
    "bench/results/cpu_ranks.md": "results/cpu_ranks.md",
    "bench/results/cpu_rollout.md": "results/cpu_rollout.md",
    "bench/results/cpu_rollout_smollm2.md": "results/cpu_rollout_smollm2.md",
    "bench/results/cpu_rollout_vllm.md": "results/cpu_rollout_vllm.md",
    "bench/results/cpu_steps.md": "results/cpu_steps.md",
    "bench/results/cpu_trainers.md": "results/cpu_trainers.md",
    "bench/results/cpu_trainers_smollm2.md": "results/cpu_trainers_smollm2.md",
    "bench/results/static.md": "results/static.md",
}
SOURCE = {page: path for path, page in OUTSIDE.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


def _stages():
    """The table of stages. Its module imports nothing of the package, so it can be read without torch."""
    spec = importlib.util.spec_from_file_location("methods", ROOT / "rlhf_fast/methods.py")
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    return methods.STAGES.values()


def _reference(markdown):
    modules = ["rlhf_fast." + stage.train.replace(":train", "") for stage in _stages()]
    entries = [f"::: {module}\n    options:\n      heading_level: 2\n      members: [train]\n" for module in modules]
    configs = ["::: rlhf_fast." + stage.config.replace(":", ".") for stage in _stages()]
    return markdown.replace("<!-- the stages in rlhf_fast/methods.py -->", "\n".join(entries)).replace(
        "<!-- the configs in rlhf_fast/methods.py -->", "\n".join(configs)
    )


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

    spaced = LINK.sub(on_site, markdown).replace(" ± ", "\u00a0±\u00a0")  # a table must not break there
    return _reference(spaced)
