"""A vLLM server as a sampler: the same rows as our own decoding, checked weights, and what becomes of every fault."""

import time
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_fast.lm.adapters import LoRA, merged, put_on
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.rollout.sampler import LocalSampler
from rlhf_fast.rollout.vllm.client import Client, ServerError
from rlhf_fast.rollout.vllm.nccl import Nccl
from rlhf_fast.rollout.vllm.sampler import VLLMSampler
from rlhf_fast.rollout.vllm.server import Server
from tests.support.fake_vllm import FakeGroup, FakeVLLM

PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11, 12, 13, 14, 15]]
OPTIONS = {"max_new_tokens": 10, "temperature": 0.8, "greedy_max_new_tokens": 6}
COMPLETIONS = "/v1/completions"


@pytest.fixture
def fake(tiny_model):
    with FakeVLLM(tiny_model) as server:
        yield server


@pytest.fixture
def tied_model(tiny_model, tmp_path):
    """Directory of a model whose head is its embedding."""
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    return str(tmp_path / "tied")


@pytest.fixture
def policy(tiny_model):
    return load_policy(tiny_model)


def connected(
    fake: FakeVLLM, policy, tokenizer, directory: Path | None, *, timeout: float = 10.0, patience: float = 30.0
) -> VLLMSampler:
    """A sampler that has checked its server."""
    server = Server(Client(fake.url, timeout=timeout, patience=patience), directory=directory, bound=0.1)
    server.check(policy, PROMPTS, 20, len(tokenizer))
    return VLLMSampler(server, policy, tokenizer, **OPTIONS)


def move(policy, size: float = 0.05) -> None:
    """An update of all weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def same_rows(a, b) -> None:
    """The same tokens, and log-probs within rounding, wherever the rows are padded to."""
    width = min(a.response_ids.shape[1], b.response_ids.shape[1])
    assert torch.equal(a.response_mask.sum(dim=1), b.response_mask.sum(dim=1))
    assert torch.equal(a.response_ids[:, :width], b.response_ids[:, :width]) and torch.equal(a.finished, b.finished)
    assert torch.equal(a.prompt_ids, b.prompt_ids) and torch.equal(a.prompt_mask, b.prompt_mask)
    torch.testing.assert_close(a.logprobs[:, :width], b.logprobs[:, :width], atol=1e-5, rtol=0)


def test_greedy_rows_are_those_of_our_own_decoding(fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.temperature = 1.0  # at which a server gives the log-probs of greedy rows
    sampler.refresh()
    mine = LocalSampler(policy, tokenizer, **OPTIONS | {"temperature": 1.0})(PROMPTS, samples=0, greedy=True)
    found = sampler(PROMPTS, samples=0, greedy=True)
    assert found.greedy.response_mask.sum() > 12 and len(found.sampled.finished) == 0
    same_rows(found.greedy, mine.greedy)


def test_rows_depend_on_seed_prompt_and_number_alone(fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.refresh()
    whole = sampler(PROMPTS, seed=3, samples=3, greedy=True)
    assert whole.sampled.response_ids.shape[0] == 12 and whole.greedy.response_ids.shape[0] == 4
    again = sampler(PROMPTS, seed=3, samples=3).sampled
    second = sampler(PROMPTS[2:], seed=3, samples=3, earlier=PROMPTS[:2]).sampled  # as the second of two processes
    other = sampler(PROMPTS, seed=4, samples=3).sampled
    same_rows(whole.sampled, again)
    rows = whole.sampled.rows(slice(6, None))
    width = min(rows.response_ids.shape[1], second.response_ids.shape[1])
    assert torch.equal(rows.response_ids[:, :width], second.response_ids[:, :width])
    assert not torch.equal(whole.sampled.response_ids[:3], whole.sampled.response_ids[6:9])  # equal prompts
    assert not torch.equal(whole.sampled.response_ids[:, :5], other.response_ids[:, :5])


def test_a_request_says_everything_that_a_server_could_set_otherwise(fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.refresh()
    fake.asked.clear()
    sampler([[5, 6]], seed=1, samples=2, greedy=True)
    bodies = [body for route, body in fake.asked if route == COMPLETIONS]
    drawn, greedy = sorted(bodies, key=lambda body: -body["n"])
    eos = [tokenizer.eos_token_id]
    fixed = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "ignore_eos": True, "stop_token_ids": eos}
    assert fixed.items() <= drawn.items() and fixed.items() <= greedy.items()
    assert (drawn["n"], drawn["temperature"], drawn["max_tokens"]) == (2, 0.8, 10)
    assert (greedy["n"], greedy["temperature"], greedy["max_tokens"]) == (1, 0.0, 6)
    assert 0 <= drawn["seed"] < 2**62


def test_a_push_changes_what_the_server_samples(fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.refresh()
    before = sampler(PROMPTS, samples=0, greedy=True).greedy
    move(policy)
    sampler.server.changed()
    sampler.refresh()
    after = sampler(PROMPTS, samples=0, greedy=True).greedy
    assert not torch.equal(before.response_ids, after.response_ids)
    mine = LocalSampler(policy, tokenizer, **OPTIONS)(PROMPTS, samples=0, greedy=True).greedy
    assert torch.equal(after.response_ids, mine.response_ids[:, : after.response_ids.shape[1]])
    for a, b in zip(fake.model.parameters(), policy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fake.version.endswith("-2") and list(tmp_path.iterdir()) == []  # the files are gone
    sampler.refresh()  # nothing has changed
    assert fake.version.endswith("-2")


def test_an_adapter_is_pushed_with_its_base(fake, policy, tiny_model, tokenizer, tmp_path):
    plain = load_policy(tiny_model)
    put_on(policy, tiny_model, LoRA(2, 16.0, 0), trainable=True)
    move(policy, 0.02)
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    logits = policy(torch.tensor([PROMPTS[0]])).logits
    twin = merged(policy)
    assert twin.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(twin(torch.tensor([PROMPTS[0]])).logits, logits, atol=1e-4, rtol=1e-4)
    sampler = connected(fake, policy, tokenizer, tmp_path)
    with pytest.warns(UserWarning, match="the adapter merged into its base: it was started without --enable-lora"):
        sampler.refresh()
    for a, b in zip(fake.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(x, before[name]) for name, x in policy.state_dict().items())


@pytest.fixture
def adapted(fake, policy, tiny_model, tokenizer, tmp_path):
    """A sampler of a policy with an adapter, by a server that takes adapters."""
    fake.lora = True
    put_on(policy, tiny_model, LoRA(2, 16.0, 0), trainable=True)
    shift_adapter(policy)
    return connected(fake, policy, tokenizer, tmp_path)


def shift_adapter(policy) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_an_adapter_goes_alone_under_the_name_of_its_version(adapted, fake, policy, tokenizer, tmp_path):
    adapted.refresh()
    first = adapted(PROMPTS, seed=1, samples=0, greedy=True).greedy
    assert list(fake.adapters) == [adapted.server.name] and fake.version == "default"
    assert not any(route == "/collective_rpc" for route, _ in fake.asked) and list(tmp_path.iterdir()) == []
    shift_adapter(policy)
    adapted.server.changed()
    adapted.refresh()
    found = adapted(PROMPTS, seed=1, samples=0, greedy=True).greedy
    assert len(fake.adapters) == 1 and adapted.server.name.endswith("-2") and adapted.server.name in fake.adapters
    mine = LocalSampler(policy, tokenizer, **OPTIONS)(PROMPTS, samples=0, greedy=True).greedy
    assert torch.equal(found.response_ids, mine.response_ids[:, : found.response_ids.shape[1]])
    assert not torch.equal(found.response_ids, first.response_ids)
    asked = [body["model"] for route, body in fake.asked if route == COMPLETIONS and "seed" in body]
    assert {name.rpartition("-")[2] for name in asked} == {"1", "2"}  # never the base


def test_weights_by_the_protocol_of_nccl(fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.server.way = Nccl(sampler.server.client, FakeGroup)
    sampler.server.way.name = sampler.server.name
    fake.asked.clear()
    for _ in range(2):
        move(policy)
        sampler.server.changed()
        sampler.refresh()
    routes = [route for route, _ in fake.asked if not route.startswith("/v1")]
    push = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    assert routes == ["/get_world_size", "/init_weight_transfer_engine", *push, *push]
    info = next(body["init_info"] for route, body in fake.asked if route == "/init_weight_transfer_engine")
    assert (info["rank_offset"], info["world_size"], info["packed"]) == (1, 2, False)
    assert fake.joined == bytes(range(128)) and fake.version.endswith("-2") and list(tmp_path.iterdir()) == []
    for a, b in zip(fake.model.parameters(), policy.parameters(), strict=True):
        assert torch.equal(a, b)
    right = sampler(PROMPTS, seed=2, samples=2).sampled
    fake.faults.append((COMPLETIONS, "restarted"))  # the group is gone with the server
    same_rows(sampler(PROMPTS, seed=2, samples=2).sampled, right)
    with pytest.raises(ServerError, match="expected a server that keeps the weights"):
        sampler.server.reload()
    fake.faults.append(("/update_weights", "broken"))
    sampler.server.changed()
    with pytest.raises(ServerError, match="500 out of memory.*did not take the policy's weights by NCCL"):
        sampler.refresh()


def test_a_server_that_has_lost_the_adapter_gets_it_and_the_round_again(adapted, fake):
    adapted.refresh()
    right = adapted(PROMPTS, seed=2, samples=2).sampled
    fake.faults.append((COMPLETIONS, "restarted"))  # it then knows no model of this name
    same_rows(adapted(PROMPTS, seed=2, samples=2).sampled, right)
    assert list(fake.adapters) == [adapted.server.name] and adapted.server.name.endswith("-2")


def test_a_stale_adapter_is_an_error_and_a_refused_adapter_is_merged(adapted, fake, policy):
    fake.faults.append(("/v1/load_lora_adapter", "broken"))
    with pytest.warns(UserWarning, match="merged into its base: .*500 out of memory"):
        adapted.refresh()
    assert fake.adapters == {} and fake.version.endswith("-1") and adapted.server.name == "tiny"
    fake.restart()
    fake.deaf = "all"
    adapted.server.way._merges = False
    with pytest.raises(ServerError, match="nats a token"):
        adapted.server.changed()
        shift_adapter(policy)
        adapted.refresh()


@pytest.mark.parametrize("deaf", ["all", "half"])
def test_stale_and_half_loaded_weights_are_an_error(deaf, fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.refresh()
    fake.deaf = deaf
    move(policy, 0.001)  # moves log-probs by less than the bound of two engines in bf16
    sampler.server.changed()
    sampler.server.bound = 1.0
    with pytest.raises(ServerError, match="update moved them by .*: they are stale, or loaded by half"):
        sampler.refresh()


def test_a_part_that_stays_behind_at_every_push_is_an_error(fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.refresh()
    fake.deaf = "model.norm.weight"  # a small part of each move, so that the server follows most of it
    with pytest.raises(ServerError, match=r"differ by .* where the first weights' differed by .*: a part .* is stale"):
        for _ in range(8):
            move(policy, 0.002)
            sampler.server.changed()
            sampler.refresh()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_server_without_weights_and_with_a_head_of_its_own_gets_all(
    sharded, tied_model, tokenizer, tmp_path, monkeypatch
):
    if sharded:
        save = PreTrainedModel.save_pretrained
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", partialmethod(save, max_shard_size=20_000))
    policy = load_policy(tied_model)
    with FakeVLLM(tied_model, load_format="dummy") as fake:
        sampler = connected(fake, policy, tokenizer, tmp_path)
        for _ in range(2):
            sampler.refresh()
            assert torch.equal(fake.model.lm_head.weight, policy.model.embed_tokens.weight)
            assert torch.equal(fake.model.model.embed_tokens.weight, policy.model.embed_tokens.weight)
            move(policy, 0.01)
            sampler.server.changed()
        fake.faults.append(("/weight_info", "restarted"))
        found = sampler(PROMPTS, samples=0, greedy=True).greedy  # it is told again to load files, and gets the weights
        mine = LocalSampler(policy, tokenizer, **OPTIONS)(PROMPTS, samples=0, greedy=True).greedy
        same = min(found.response_ids.shape[1], mine.response_ids.shape[1])
        assert torch.equal(found.response_ids[:, :same], mine.response_ids[:, :same])
        with pytest.raises(
            ServerError, match="got --load-format dummy, which waits for weights, and `pairs` pushes none"
        ):
            connected(fake, policy, tokenizer, None)


def test_a_server_that_starts_with_other_weights_is_an_error_where_it_gets_none(fake, policy, tokenizer):
    sampler = connected(fake, policy, tokenizer, None)
    sampler.refresh()
    same_rows(sampler(PROMPTS, samples=2).sampled, sampler(PROMPTS, samples=2).sampled)
    move(policy)
    sampler.server.changed()
    with pytest.raises(ServerError, match="start it with the policy's model"):
        sampler.refresh()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "raw_logprobs"}, "expected a server with --logprobs-mode processed_logprobs, got raw_logprobs"),
        ({"most": 19}, "expected a server that takes 20 tokens, prompt and completion, got --max-model-len 19"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(settings, words, tiny_model, policy, tokenizer, tmp_path):
    with FakeVLLM(tiny_model, **settings) as fake, pytest.raises(ServerError, match=words):
        connected(fake, policy, tokenizer, tmp_path)


def test_a_model_with_another_vocabulary_is_refused(fake, policy, tokenizer, tmp_path):
    server = Server(Client(fake.url, timeout=1, patience=1), directory=tmp_path, bound=0.1)
    with pytest.raises(ServerError, match=f"a model with {len(tokenizer) + 1} tokens.*got a smaller vocabulary"):
        server.check(policy, PROMPTS, 20, len(tokenizer) + 1)
    fake.model.resize_token_embeddings(len(tokenizer) + 8)
    with pytest.raises(ServerError, match="got a larger vocabulary"):
        server.check(policy, PROMPTS, 20, len(tokenizer))


def test_a_server_that_is_not_there_is_one_line(policy, tokenizer, tmp_path):
    server = Server(Client("http://127.0.0.1:9", timeout=1, patience=0.3), directory=tmp_path, bound=0.1)
    with pytest.raises(ServerError, match=r"^vllm_url: expected an answer from http://127.0.0.1:9/v1/models, got none"):
        server.check(policy, PROMPTS, 20, len(tokenizer))


def test_a_server_without_the_developer_routes_is_told_how_to_start(fake, policy, tokenizer, tmp_path, monkeypatch):
    answer = fake.of
    fake.of = lambda route, body: (404, {}) if route == "/server_info" else answer(route, body)
    with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE=1.*rlhf-fast vllm-command"):
        connected(fake, policy, tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["busy", "broken", "dropped", "short", "slow", "cut", "lost", "other", "nan"])
def test_a_fault_is_tried_again_until_every_row_is_right(kind, fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.refresh()
    right = sampler(PROMPTS, seed=2, samples=2, greedy=True)
    sampler.server.client.timeout, fake.nap = (0.7, 1.0) if kind == "slow" else (10.0, 0.0)
    fake.faults += [(COMPLETIONS, kind)] * 2
    found = sampler(PROMPTS, seed=2, samples=2, greedy=True)
    assert not fake.faults
    same_rows(found.sampled, right.sampled)
    same_rows(found.greedy, right.greedy)


def test_a_server_that_stays_broken_ends_the_round(fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path, patience=0.6)
    sampler.refresh()
    fake.faults += [(COMPLETIONS, "broken")] * 200
    start = time.monotonic()
    with pytest.raises(ServerError, match="got none in 0.6 s of tries: 500 out of memory"):
        sampler(PROMPTS, samples=2)
    assert time.monotonic() - start < 3
    fake.faults.clear()
    assert len(sampler(PROMPTS, samples=2).sampled.finished) == 8  # the client is as good as new


def test_a_restarted_server_gets_the_weights_and_the_round_again(fake, policy, tokenizer, tmp_path):
    move(policy)
    sampler = connected(fake, policy, tokenizer, tmp_path)
    sampler.refresh()
    right = sampler(PROMPTS, seed=2, samples=2).sampled
    fake.faults.append((COMPLETIONS, "restarted"))
    same_rows(sampler(PROMPTS, seed=2, samples=2).sampled, right)
    assert fake.version.endswith("-2")
    for _ in range(3):
        fake.faults.append(("/weight_info", "restarted"))
    with pytest.raises(ServerError, match="got 'default': the server was started again, or another run uses it"):
        sampler(PROMPTS, seed=2, samples=2)


def test_a_reload_that_fails_is_not_tried_again(fake, policy, tokenizer, tmp_path):
    sampler = connected(fake, policy, tokenizer, tmp_path, patience=60)
    fake.faults.append(("/collective_rpc", "broken"))
    with pytest.raises(ServerError, match="500 out of memory; the server did not take the policy's weights"):
        sampler.refresh()
    assert list(tmp_path.iterdir()) == []
