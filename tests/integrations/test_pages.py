"""The pages for loops that are not ours run as they are written."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parent.parent.parent / "docs"


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def test_five_minutes(tmp_path, monkeypatch, capsys):
    """One block after the other, as a reader pastes them."""
    monkeypatch.chdir(tmp_path)
    found = blocks("loops.md")
    assert len(found) == 4  # the model, an own loop, TRL, Trainer
    space = {"__name__": "page"}
    for block in found:
        exec(block, space)
    loss, clipped, entropy = (float(x) for x in capsys.readouterr().out.splitlines()[0].split())
    assert abs(loss) < 1e-5 and clipped == 0.0 and 4.0 < entropy < 5.6  # the policy is the old one, and knows nothing
    assert space["trainer"].state.global_step == 5


def test_the_recipes_compute_what_they_replace():
    """Here beside a line of torch; .ci/check_recipes.py runs them beside the libraries' own functions."""
    verl, openrlhf = ({} for _ in range(2))
    for block, space in zip(blocks("recipes.md"), (verl, openrlhf), strict=True):
        exec(block, space)
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    exact = logits.double().log_softmax(-1)
    picked = exact.gather(-1, ids[..., None])[..., 0]
    for found in (verl["logprobs_from_logits"](logits, ids), openrlhf["log_probs_from_logits"](logits, ids)):
        torch.testing.assert_close(found.double(), picked, rtol=0, atol=1e-5)
    entropy = verl["entropy_from_logits"](logits)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-5)
