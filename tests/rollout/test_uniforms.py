"""The generator's published output, and what makes its numbers a row's own."""

import torch

from rlhf_fast.rollout.uniforms import _GOLDEN, _mix, prompt_keys, row_uniforms


def test_splitmix64s_published_sequence():
    """Seed 1234567, from the generator's public test vectors."""
    state = 1234567 + torch.arange(1, 6) * _GOLDEN
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [x % 2**64 for x in _mix(state).tolist()] == published


def test_uniform_and_independent():
    u = row_uniforms(3, torch.arange(1000), 64)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 16, 0, 1)
    assert ((counts - 4000) ** 2 / 4000).sum() < 37.7  # 15 degrees of freedom, p = 0.001
    z = (u - 0.5) * 12**0.5
    for a, b in (
        (z[1:], z[:-1]),
        (z[:, 1:], z[:, :-1]),
        (z, (row_uniforms(4, torch.arange(1000), 64) - 0.5) * 12**0.5),
    ):
        assert (a * b).mean().abs() < 3.3 / a.numel() ** 0.5  # correlation of neighbours, p = 0.001


def test_keys_follow_the_prompt_not_its_place():
    ids = torch.tensor([[0, 0, 5, 6], [7, 5, 6, 8], [9, 9, 5, 6], [0, 5, 6, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    keys = prompt_keys(ids, mask)
    assert len(set(keys.tolist())) == 4  # rows 0, 2 and 3 hold the same prompt and are told apart
    order = torch.tensor([1, 3, 0, 2])
    again = prompt_keys(ids[order], mask[order])
    assert again[0] == keys[1]
    assert again.sort().values.tolist() == keys.sort().values.tolist()
