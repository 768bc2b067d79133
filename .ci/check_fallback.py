"""python .ci/check_fallback.py SITE: rlhf_fast as installed in SITE without its compiled core warns once and works."""

import sys
import warnings
from pathlib import Path

import torch

site = Path(sys.argv[1])
installed = {path.name.partition("-")[0] for path in site.iterdir()}
assert installed == {"rlhf_fast", "bin"}, f"the wheel installs {installed}"
assert not list(site.glob("rlhf_fast/*.so")), "the wheel has a compiled core"
for file in ("kernels/__init__.py", "py.typed", "_cpu.pyi", "_cuda.pyi", "report/report.html.jinja"):
    assert (site / "rlhf_fast" / file).is_file(), f"the wheel has no {file}"

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rlhf_fast.ops
ours = [str(warning.message) for warning in caught if "rlhf_fast" in str(warning.message)]
assert Path(rlhf_fast.ops.__file__).is_relative_to(site), rlhf_fast.ops.__file__
assert len(ours) == 1 and "not built" in ours[0], ours

logits, ids = torch.tensor([[0.0, 0.0, -torch.inf, 0.0]], requires_grad=True), torch.tensor([3])
logprobs, entropy = rlhf_fast.token_logprobs(logits, ids)
logprobs.sum().backward()
log3, third = torch.tensor([3.0]).log(), 1 / 3
torch.testing.assert_close(logprobs.detach(), -log3)
torch.testing.assert_close(entropy.detach(), log3)
torch.testing.assert_close(logits.grad, torch.tensor([[-third, -third, 0.0, 1 - third]]))
print(f"works on the reference and says so once: {ours[0]}")
