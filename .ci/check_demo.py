"""python .ci/check_demo.py demo_out: the report is there and whole, and the demo showed what it is meant to show.

Every method above the SFT model by two standard errors of the paired gain, the reward model's held-out pair accuracy
well above chance, ReMax's gradient variance below REINFORCE's on every trained policy and on average. At the SFT model
the scores average 0 by construction, so that no baseline is nearly the best one there; that figure is only printed.
"""

import json
import re
import sys
from pathlib import Path

METHODS = {"PPO", "ReMax", "REINFORCE", "RLOO", "DPO"}
ACCURACY = 0.6

out = Path(sys.argv[1])
html = (out / "report.html").read_text()
report = json.loads((out / "report.json").read_text())
accuracy = json.loads((out / "reward" / "run.json").read_text())["eval/accuracy"]
failures = []


def expect(holds: bool, what: str) -> None:
    print(f"{'ok' if holds else 'NOT SO':7}{what}")
    if not holds:
        failures.append(what)


loaded = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']*""", html)
expect(html.rstrip().endswith("</html>"), "report.html is whole")
expect(not loaded, f"report.html loads nothing from elsewhere {loaded or ''}".rstrip())
expect(html.count("data:image/svg+xml") >= 5, "report.html has its figures")
gains = {row["method"]: row["gain over SFT"] for row in report["quality"] if row["method"] != "SFT"}
expect(set(gains) == METHODS, f"methods in the report: {', '.join(gains)}")
for method, (gain, error) in gains.items():
    expect(gain > 2 * error > 0, f"{method}: gain over SFT in true reward {gain:.3f}, standard error {error:.3f}")
expect(accuracy >= ACCURACY, f"reward model: held-out pair accuracy {accuracy:.3f}, at least {ACCURACY}")
totals = {"ReMax": 0.0, "REINFORCE": 0.0}
for where, measured in report["gradient_variance"].items():
    remax, reinforce = (measured[method]["variance"] for method in totals)
    totals = {"ReMax": totals["ReMax"] + remax, "REINFORCE": totals["REINFORCE"] + reinforce}
    figures = f"gradient variance, {where}: ReMax {remax:.4g}, REINFORCE {reinforce:.4g}"
    if where == "SFT model":
        print(f"       {figures}")
    else:
        expect(remax < reinforce, figures)
expect(totals["ReMax"] < totals["REINFORCE"], "gradient variance, mean over these policies: ReMax below REINFORCE")
sys.exit(len(failures) > 0)
