"""Every decoder class of transformers gets a score head, whose scores are those of plain passes in float64."""

import copy

import pytest
import torch

from rlhf_fast.lm.loading import load_scorer
from rlhf_fast.lm.passes import sequence_scores
from rlhf_fast.lm.saving import save_model
from tests.support import zoo_turns
from tests.support.zoo_checks import TRAINED, ragged, save_member


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("member", zoo_turns.members(metafunc.config.getoption("--zoo")))


@pytest.mark.filterwarnings("ignore:rlhf_fast")
@torch.no_grad()
def test_scores_of_a_saved_head(member, tmp_path):
    save_member(member, tmp_path / "language")
    torch.manual_seed(2)
    scorer = load_scorer(tmp_path / "language")
    scorer.score.weight.mul_(5)
    save_model(scorer, tmp_path / "reward")
    again = load_scorer(tmp_path / "reward", head=None, trainable=False)
    kept = scorer.state_dict()
    assert again.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.state_dict().items())
    sequences = ragged(TRAINED)
    scores = sequence_scores(again, sequences)
    plain = copy.deepcopy(again).double()
    plain.set_experts_implementation("eager")  # the other kernels have no float64
    try:
        plain.base_model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    except RuntimeError:
        plain = again
    for score, prompt, prompt_mask, answer, mask in zip(scores, *sequences, strict=True):
        ids = torch.cat([prompt[prompt_mask], answer[mask]])[None]
        state = plain.base_model(input_ids=ids, use_cache=False)[0][0, -1]
        wanted = plain.score(state.to(plain.score.weight.dtype)).item()
        assert score.item() == pytest.approx(wanted, rel=5e-5, abs=5e-5)
