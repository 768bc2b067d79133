"""The neural bandit against plain loops over one seed, hand-computed losses and enumeration."""

import json
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid, one_hot

from rlhf_fast import cli
from rlhf_fast.lab.bandit import neural, neural_experiment, neural_problem
from rlhf_fast.lab.bandit.config import NeuralBanditConfig
from rlhf_fast.lab.bandit.networks import ACTIONS, HIDDEN, STATE_SIZE, Layers

SEEDS = (3, 4)
BETA = 0.3


@pytest.fixture
def small(monkeypatch):
    """Fewer states of evaluation and fewer fresh ones."""
    monkeypatch.setattr(neural_problem, "EVALUATION_STATES", 200)
    monkeypatch.setattr(neural_experiment, "_FRESH", 128)


@pytest.fixture
def short(small, monkeypatch):
    """Fewer epochs too."""
    monkeypatch.setattr(neural, "POLICY_EPOCHS", 8)


def config(**values):
    return NeuralBanditConfig(**{"out": "unused", "seeds": 3, "first_seed": 7, "ratios": [0.5, 2.0], **values})


def sequential(layers: Layers, seed: int, activation: type[nn.Module], *, last: bool = False) -> nn.Sequential:
    """One seed's layers as torch's own."""
    modules = []
    for weight, bias in zip(layers.weights, layers.biases, strict=True):
        linear = nn.Linear(*weight.shape[1:], dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight[seed].T.detach().clone(), bias[seed, 0].detach().clone()
        modules += [linear, activation()]
    return nn.Sequential(*modules if last else modules[:-1])


class PlainReward(nn.Module):
    """r(state, one-hot action) of one seed, as the published code writes it."""

    def __init__(self, reward, seed: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.additive = hasattr(reward, "of_state")
        if self.additive:
            self.of_state = sequential(reward.of_state, seed, activation, last=True)
            self.of_action = sequential(reward.of_action, seed, activation, last=True)
            self.head = sequential(reward.head, seed, activation)
        else:
            first = sequential(reward.first, seed, activation, last=True)
            self.head = nn.Sequential(first, sequential(reward.rest, seed, activation))

    def forward(self, state, action):
        action = one_hot(action, ACTIONS).double()
        if self.additive:
            return self.head(torch.cat((self.of_state(state), self.of_action(action)), -1))[..., 0]
        return self.head(torch.cat((state, action), -1))[..., 0]

    def all_actions(self, states):
        return torch.stack([self(states, torch.full((len(states),), a)) for a in range(ACTIONS)], -1)


def plain_training(module, loss, size, steps):
    """AdamW on the mean of loss(row) over batches of 64 rows in order, again from the first, `steps` times."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
    done = 0
    while done < steps:
        for start in range(0, size, 64):
            if done == steps:
                return
            optimizer.zero_grad()
            rows = range(start, min(start + 64, size))
            (sum(loss(i) for i in rows) / len(rows)).backward()
            optimizer.step()
            done += 1


def problem(form="additive", n=70):
    truth = neural_problem.true_reward(SEEDS, form)
    return truth, neural_problem.draw(SEEDS, truth, n, 5)


@pytest.mark.parametrize("form", ["additive", "contextual"])
def test_reward_networks_against_torchs_layers(form):
    truth, draws = problem(form, 6)
    for reward, activation in ((truth.network, nn.Tanh), (neural_problem.learned_reward(SEEDS, form), nn.ReLU)):
        for seed in range(2):
            plain = PlainReward(reward, seed, activation).all_actions(draws.states[seed])
            torch.testing.assert_close(reward(draws.states)[seed], plain, atol=1e-12, rtol=0)
    plain = PlainReward(truth.network, 1, nn.Tanh).all_actions(draws.states[1])
    torch.testing.assert_close(truth(draws.states)[1], plain + plain.sign(), atol=1e-12, rtol=0)


def test_initial_weights_are_torchs_default():
    layers = Layers(range(40), 0, (STATE_SIZE, HIDDEN, ACTIONS))
    for values, inputs in (
        (layers.weights[0], STATE_SIZE),
        (layers.biases[0], STATE_SIZE),
        (layers.weights[1], HIDDEN),
        (layers.biases[1], HIDDEN),
    ):
        bound = inputs**-0.5
        assert values.abs().max() <= bound and values.abs().max() > 0.98 * bound
        # The variance of a uniform variable is bound^2 / 3, of its square 4/45 bound^4.
        error = (4 / 45 / values.numel()) ** 0.5 * bound**2
        assert abs(values.square().mean().item() - bound**2 / 3) < 4 * error


@pytest.mark.parametrize("form", ["additive", "contextual"])
def test_reward_training_against_a_loop(form, monkeypatch):
    monkeypatch.setattr(neural, "REWARD_EPOCHS", 4)
    _, draws = problem(form)
    reward = neural_problem.learned_reward(SEEDS, form)
    plain = [PlainReward(reward, seed, nn.ReLU) for seed in range(2)]
    neural.fit_reward(reward, draws.states, draws.winners, draws.losers)
    for seed, module in enumerate(plain):
        states, winners, losers = draws.states[seed], draws.winners[seed], draws.losers[seed]
        plain_training(
            module,
            lambda i, m=module, s=states, w=winners, x=losers: -logsigmoid(m(s[i], w[i]) - m(s[i], x[i])),
            70,
            8,
        )
        found, expected = (
            r - r.mean(-1, keepdim=True) for r in (reward(draws.states)[seed], module.all_actions(states))
        )
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["log_probabilities", "probabilities", "rmb_po"])
def test_policy_training_against_a_loop(method):
    truth, draws = problem()
    states, rewards = draws.states, truth(draws.states)
    together = neural_problem.initial_policy(SEEDS)
    alone = [sequential(together, seed, nn.ReLU) for seed in range(2)]
    if method == "rmb_po":
        neural.rmb_po(together, states, rewards, 15, BETA)
    else:
        neural.dpo(together, states, neural.observed(draws.winners, draws.losers), 15, BETA, method)
    for seed, policy in enumerate(alone):

        def loss(i, policy=policy, seed=seed):
            pi = policy(states[seed, i]).softmax(-1)
            if method == "rmb_po":  # with the gradient of the bracket, which adds nothing
                return -(pi * (rewards[seed, i] - BETA * (pi / 0.1).log())).sum()
            x = pi.log() if method == "log_probabilities" else pi
            return -logsigmoid(BETA * (x[draws.winners[seed, i]] - x[draws.losers[seed, i]]))

        plain_training(policy, loss, 70, 15)
        torch.testing.assert_close(together(states)[seed], policy(states[seed]), atol=1e-10, rtol=0)


def test_both_forms_of_dpos_loss_by_hand():
    """pi = (.5, .3, .2), action 1 preferred to action 0, beta = 2."""
    logits = torch.tensor([0.5, 0.3, 0.2]).double().log() + 7
    wins = torch.zeros(3, 3).double()
    wins[1, 0] = 1
    # (.3/.5)^2 = .36: sigmoid(2 log .6) = .36 / 1.36; sigmoid(2 (.3 - .5)) = 1 / (1 + e^.4)
    assert neural.dpo_losses(logits, wins, 2.0, "log_probabilities").item() == pytest.approx(1.329136, abs=1e-6)
    assert neural.dpo_losses(logits, wins, 2.0, "probabilities").item() == pytest.approx(0.913015, abs=1e-6)


def test_pair_weights():
    rewards = torch.linspace(-1, 1, 10).double()[None, None]
    first, second = torch.tensor([[2]]), torch.tensor([[9]])
    wins = neural.expected(rewards, first, second)[0, 0]
    probability = torch.sigmoid(rewards[0, 0, 2] - rewards[0, 0, 9]).item()
    assert wins[2, 9].item() == pytest.approx(probability) and wins[9, 2].item() == pytest.approx(1 - probability)
    assert wins.count_nonzero() == 2 and neural.observed(first, second)[0, 0].nonzero().tolist() == [[2, 9]]
    pairs = [neural.expected(rewards, torch.tensor([[a]]), torch.tensor([[b]])) for a, b in combinations(range(10), 2)]
    torch.testing.assert_close(neural.all_pairs(rewards), sum(pairs) / 45)


def test_steps():
    assert [neural.steps_of(50, size) for size in (1, 64, 65, 550)] == [50, 50, 100, 450]


def test_gradient_steps_of_every_method(small):
    run = neural_experiment.run(config(seeds=2, n=60, ratios=[0.5, 1.0]), 60, error_sources=False)
    assert run.steps == {
        "dpo": 50,
        "dpo_published": 50,
        "rmb_po": 50,
        "rmb_po_plus@0.5": 100,  # 90 states
        "rmb_po_plus@1": 100,
        "rmb_po_plus@0.5_matched_steps": 50,
        "rmb_po_plus@1_matched_steps": 50,
        "rmb_po@1_matched_steps": 100,
    }
    assert run.gaps.keys() == run.steps.keys()


@pytest.mark.parametrize(("form", "least", "most"), [("additive", 1, 1), ("contextual", 0.1, 0.85)])
def test_best_action_and_gaps(small, form, least, most):
    """One action is best in every state of the additive reward, and in no more than most of the contextual one's."""
    seeds = range(12)
    truth = neural_problem.true_reward(seeds, form)
    evaluated = neural_problem.evaluation(seeds, truth)
    share = evaluated.commonest_best_action()
    for seed in range(12):
        counts = torch.bincount(evaluated.rewards[seed].argmax(-1), minlength=ACTIONS)
        assert share[seed].item() == pytest.approx(counts.max().item() / 200)
        assert least <= share[seed] <= most
    best = evaluated.rewards.amax(-1).mean(-1)
    uniform = best - evaluated.rewards.mean((1, 2))
    torch.testing.assert_close(evaluated.uniform_gap(), uniform, atol=1e-12, rtol=0)
    single = (best[:, None] - evaluated.rewards.mean(1)).amin(-1)
    torch.testing.assert_close(evaluated.single_action_gap(), single, atol=1e-12, rtol=0)
    assert (single.abs() < 1e-12).all() if form == "additive" else (single > 0.02).all()
    logits = neural_problem.initial_policy(seeds)(evaluated.states)
    expected = best - (logits.softmax(-1) * evaluated.rewards).sum(-1).mean(-1)
    found = evaluated.gap(neural_problem.initial_policy(seeds))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert (found > 0).all()


def test_preferences_follow_bradley_terry():
    truth = neural_problem.true_reward(range(100), "contextual")
    draws = neural_problem.draw(range(100), truth, 60, 0)
    assert (draws.winners != draws.losers).all() and draws.states.abs().max() <= 1
    rewards = truth(draws.states)
    margin = (rewards.gather(-1, draws.winners[..., None]) - rewards.gather(-1, draws.losers[..., None]))[..., 0]
    p = torch.sigmoid(margin.abs())
    assert abs(((margin > 0).double() - p).sum() / (p * (1 - p)).sum().sqrt()) < 3


def test_draws_are_nested_and_a_seeds_own():
    truth = neural_problem.true_reward([6, 7], "additive")
    alone = neural_problem.true_reward([7], "additive")
    small, large = neural_problem.draw([7], alone, 5, 3), neural_problem.draw([6, 7], truth, 9, 20)
    for name in ("states", "winners", "losers"):
        assert torch.equal(getattr(small, name)[0], getattr(large, name)[1, :5])
    assert torch.equal(small.new_states[0], large.new_states[1, :3])


def test_a_seed_does_not_depend_on_the_others(short, monkeypatch):
    together = neural_experiment.run(config(n=20, ratios=[2.0]), 20, error_sources=True)
    monkeypatch.setattr(neural_experiment, "_SEEDS", 1)
    alone = neural_experiment.run(config(n=20, ratios=[2.0], seeds=2, first_seed=8), 20, error_sources=True)
    for name, gap in together.gaps.items():
        torch.testing.assert_close(alone.gaps[name], gap[1:], atol=1e-10, rtol=0)
    for name, pieces in together.sources.items():
        for piece, gap in pieces.items():
            torch.testing.assert_close(alone.sources[name][piece], gap[1:], atol=1e-10, rtol=0)
    assert list(together.sources) == ["dpo", "rmb_po", "rmb_po_plus@2"]
    assert torch.equal(together.sources["rmb_po"]["actions"], together.gaps["rmb_po"])


def test_new_states_only(short):
    both, new = (neural_experiment.run(config(n=40, pref_states=x), 40, error_sources=False) for x in (True, False))
    for name in ("dpo", "rmb_po"):
        assert torch.equal(both.gaps[name], new.gaps[name])
    assert (both.gaps["rmb_po_plus@2"] != new.gaps["rmb_po_plus@2"]).all()
    assert (both.steps["rmb_po_plus@0.5"], new.steps["rmb_po_plus@0.5"]) == (8, 8)
    assert (both.steps["rmb_po_plus@2"], new.steps["rmb_po_plus@2"]) == (16, 16)


def test_command(short, tmp_path, capsys):
    out = tmp_path / "neural.json"
    flags = ["--seeds", "3", "--n", "12", "--ratios", "2", "--sizes", "12", "24", "--reward", "contextual"]
    assert cli.main(["bandit", "neural", "--out", str(out), *flags]) == 0
    record = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert {key: record[key] for key in ("bandit", "mode", "setting", "n", "seeds")} == {
        "bandit": "neural",
        "mode": "faithful",
        "setting": "contextual",
        "n": 12,
        "seeds": 3,
    }
    names = ["dpo", "dpo_published", "rmb_po", "rmb_po_plus@2", "rmb_po_plus@2_matched_steps", "rmb_po@2_matched_steps"]
    assert list(record["methods"]) == names and list(record["by_n"]) == ["12", "24"]
    assert all(len(method["gap"]) == 3 and min(method["gap"]) >= 0 for method in record["methods"].values())
    assert (
        record["by_n"]["12"]["dpo"]["mean"] == record["methods"]["dpo"]["mean"] != record["by_n"]["24"]["dpo"]["mean"]
    )
    assert len(record["paired_z"]) == 15 and record["references"]["uniform"]["mean"] > 0
    assert "Optimality gap, contextual reward, n = 12" in shown and "commonest" in shown
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["neural.json", "neural_gap.png", "neural_n.png", "neural_ratio.png"]


def test_wrong_reward(capsys):
    assert cli.main(["bandit", "neural", "--out", "x.json", "--reward", "linear"]) == 2
    assert capsys.readouterr().err == "rlhf-fast: reward: expected additive|contextual, got 'linear'\n"
