"""What has to hold against a real vLLM server. `make DIRECTORY` writes a model; `check DIRECTORY URL` checks."""

import gzip
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from rlhf_fast import methods
from rlhf_fast.config import PairsConfig, VLLMCommandConfig
from rlhf_fast.lab.world import build_tokenizer, prompt_rows
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.rollout.sampler import LocalSampler
from rlhf_fast.rollout.vllm.client import Client, ServerError
from rlhf_fast.rollout.vllm.command import command
from rlhf_fast.rollout.vllm.sampler import VLLMSampler
from rlhf_fast.rollout.vllm.server import Server
from rlhf_fast.stages import pairs
from rlhf_fast.stages.init import init_model
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.mismatch import rescored

PATIENCE = 240.0  # seconds until a server on one busy core is up
SIZES = {"max_new_tokens": 16, "temperature": 0.7, "greedy_max_new_tokens": 12}
REWARD = """def score(prompts, completions):
    return [c.count("e") / 10 for c in completions]  # it differs between any two samples of a random model
"""


def make(directory: Path) -> None:
    """A random Llama whose heads are wide enough for vLLM's kernels, prompts, and a config that names them."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    init_model({"model_type": "llama", **sizes, **heads}, tokenizer, directory / "first", seed=0)
    model = load_policy(str(directory / "first"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)  # so that the likeliest token is clear
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    rows = prompt_rows(32, seed=1)
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(directory / "prompts.jsonl.gz", "wt") as file:  # as the benches read them
        file.write((directory / "prompts.jsonl").read_text())
    (directory / "reward.py").write_text(REWARD)
    config = {
        "model": str(directory / "model"),
        "output_dir": str(directory / "ppo"),
        "train_data": str(directory / "prompts.jsonl"),
        "eval_data": str(directory / "prompts.jsonl"),
        "reward": f"{directory}/reward.py:score",
        "sampler": "vllm",
        "vllm_patience": PATIENCE,
        "steps": 3,
        "batch_size": 16,
        "max_prompt_length": 32,
        "max_response_length": 16,
        "learning_rate": 1e-3,
        "temperature": 0.9,
    }
    (directory / "ppo.yaml").write_text(yaml.safe_dump(config))


def connect(url: str, directory: Path) -> tuple[VLLMSampler, list[list[int]]]:
    """A sampler that has pushed the model of `directory`, and eight prompts."""
    policy, tokenizer = load_policy(str(directory / "model")), load_tokenizer(str(directory / "model"))
    texts = [json.loads(line)["prompt"] for line in (directory / "prompts.jsonl").read_text().splitlines()[:8]]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    server = Server(Client(url, timeout=120, patience=PATIENCE), directory=directory, bound=0.1)
    server.check(policy, prompts, 48, len(tokenizer))
    sampler = VLLMSampler(server, policy, tokenizer, **SIZES)
    sampler.refresh()
    return sampler, prompts


def rows_are_right(sampler: VLLMSampler, prompts: list[list[int]]) -> None:
    """Greedy rows are ours, sampled log-probs too, and rows depend on seed, prompt and number alone."""
    mine = LocalSampler(sampler.model, sampler.tokenizer, **SIZES)(prompts, samples=1, greedy=True).greedy
    found = sampler(prompts, seed=3, samples=3, greedy=True)
    assert mine is not None and found.greedy is not None
    width = found.greedy.response_ids.shape[1]
    assert torch.equal(found.greedy.response_ids, mine.response_ids[:, :width])
    assert torch.equal(found.greedy.finished, mine.finished)
    scored = rescored(found.sampled, Objectives(sampler.model, temperature=SIZES["temperature"]), None)
    assert scored.sampler_logprobs is not None
    drift = ((scored.logprobs - scored.sampler_logprobs).abs() * scored.response_mask).max()
    assert drift < 1e-4, drift
    second = sampler(prompts[4:], seed=3, samples=3, earlier=prompts[:4]).sampled
    for row, again in zip(found.sampled.rows(slice(12, None)).response_ids, second.response_ids, strict=True):
        assert torch.equal(row[row != 0], again[again != 0])
    counts = scored.response_mask.sum(), found.greedy.response_mask.sum()
    print(f"{counts[1]} greedy tokens are ours; log-probs of {counts[0]} sampled tokens differ by {drift:.1e} at most")


def draws_follow_the_model(sampler: VLLMSampler, prompts: list[list[int]]) -> None:
    """First tokens come as often as the model says, and samples of one request agree as often as independent ones."""
    drawn = sampler(prompts[:1] * 64, seed=11, samples=16).sampled
    tokens, prompt = drawn.response_ids[:, 0].view(64, 16), torch.tensor(prompts[:1])
    with torch.no_grad():
        p = (sampler.model(prompt).logits[0, -1].double() / sampler.temperature).softmax(dim=0)
    expected, found = 1024 * p, tokens.flatten().bincount(minlength=len(p)).double()
    common = expected >= 5
    pooled = [torch.cat([x[common], x[~common].sum()[None]]) for x in (found, expected)]
    chi2, freedom = ((pooled[0] - pooled[1]).square() / pooled[1].clamp(min=1e-9)).sum().item(), int(common.sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 10, (chi2, freedom)
    agreed, alike = (tokens[:, 1:] == tokens[:, :-1]).double().mean().item(), p.square().sum().item()
    assert abs(agreed - alike) < 5 * (alike * (1 - alike) / (64 * 15)) ** 0.5, (agreed, alike)
    print(f"1024 draws: chi^2 {chi2:.1f} of {freedom} tokens; neighbours agree in {agreed:.3f} ({alike:.3f})")


def pushes_are_right(sampler: VLLMSampler, prompts: list[list[int]]) -> None:
    """A push changes what is sampled; a push that the server does not take is an error."""
    first = sampler(prompts, samples=0, greedy=True).greedy
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sampler.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    sampler.server.changed()
    began = time.perf_counter()
    sampler.refresh()
    seconds = time.perf_counter() - began
    second = sampler(prompts, samples=0, greedy=True).greedy
    assert first is not None and second is not None and not torch.equal(first.response_ids, second.response_ids)
    rows_are_right(sampler, prompts)
    with torch.no_grad():
        next(sampler.model.parameters()).add_(0.01)
    client, post = sampler.server.client, sampler.server.client.post
    client.post = lambda route, *args, **options: (  # pyright: ignore[reportAttributeAccessIssue]
        None if route == "/collective_rpc" else post(route, *args, **options)
    )
    sampler.server.changed()
    try:
        sampler.refresh()
    except ServerError as error:
        print(f"a stale server: {error}")
    else:
        raise AssertionError("a server that did not reload was not noticed")
    client.post = post  # pyright: ignore[reportAttributeAccessIssue]
    sampler.refresh()
    print(f"a push took {seconds:.2f} s")


def one_batch_for_remax(sampler: VLLMSampler, prompts: list[list[int]]) -> None:
    """Sampled and greedy rows of a prompt in one batch of requests, against two calls."""

    def seconds(*calls: dict) -> float:
        began = time.perf_counter()
        for call in calls:
            sampler(prompts * 2, seed=5, **call)
        return time.perf_counter() - began

    drawn, greedy = {"samples": 2}, {"samples": 0, "greedy": True}
    pairs_of_times = [(seconds({**drawn, "greedy": True}), seconds(drawn, greedy)) for _ in range(3)]
    one, two = (min(times) for times in zip(*pairs_of_times, strict=True))
    print(f"ReMax's rows in one batch: {one:.2f} s; in two calls: {two:.2f} s")


def stages_train(url: str, directory: Path) -> None:
    """Every kind of stage that samples, for three rounds."""
    shared = yaml.safe_load((directory / "ppo.yaml").read_text()) | {"vllm_url": url}
    for name, options in (("ppo", {}), ("remax", {}), ("grpo", {}), ("remax", {"lora_rank": 2})):
        row, output = methods.STAGES[name], directory / "-".join([name, *options])
        config = methods.load(row.config)(**shared | {"output_dir": str(output)} | options)
        began = time.perf_counter()
        methods.load(row.train)(config)
        rows = [r for r in read_metrics(output / "metrics.jsonl") if "mismatch/mean" in r]
        assert len(rows) == 3 and all(r["mismatch/mean"] < 1e-4 and r["mismatch/ess"] > 0.999 for r in rows)
        assert abs(rows[-1]["objective/kl"]) > 1e-5, rows[-1]  # the policy has moved, and the server with it
        worst = max(r["mismatch/max"] for r in rows)
        print(f"{output.name}: three rounds in {time.perf_counter() - began:.1f} s; largest mismatch {worst:.1e}")
    common = {name: shared[name] for name in ("model", "reward", "sampler", "vllm_url", "max_response_length")}
    files = {"prompts": shared["train_data"], "output": str(directory / "pairs.jsonl")}
    try:
        pairs.sample(PairsConfig(**common, **files))
    except ServerError as error:
        print(f"pairs of a server that holds trained weights: {error}")
    else:
        raise AssertionError("a server with other weights than the model's was not noticed")
    sampler, _ = connect(url, directory)  # the model again
    sampler.server.confirm()
    pairs.sample(PairsConfig(**common, **files))
    print(f"pairs: {len((directory / 'pairs.jsonl').read_text().splitlines())} rows")


def restarted(directory: Path, command: str = "") -> None:
    """A server that has forgotten its weights; command: started in this way from now on."""
    (directory / "command").write_text(command)
    (directory / "command").rename(directory / "restart")  # whole, because the shell reads it at once
    while (directory / "restart").exists():
        time.sleep(0.1)


def a_restart_is_found(sampler: VLLMSampler, prompts: list[list[int]], directory: Path) -> None:
    """A server that is started again in the middle gets the weights and the round again."""
    with torch.no_grad():
        next(sampler.model.parameters()).add_(0.3)
    sampler.server.changed()
    sampler.refresh()
    before = sampler(prompts, seed=7, samples=2).sampled
    began = time.perf_counter()
    restarted(directory)
    again = sampler(prompts, seed=7, samples=2).sampled
    assert torch.equal(before.response_ids, again.response_ids)
    print(f"a restart: the same rows after {time.perf_counter() - began:.0f} s")


def remax(url: str, directory: Path, name: str, **options: Any) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics and the weights of a run of ReMax."""
    config = yaml.safe_load((directory / "ppo.yaml").read_text()) | {"vllm_url": url, "eval_data": None} | options
    row, output = methods.STAGES["remax"], directory / name
    methods.load(row.train)(methods.load(row.config)(**config | {"output_dir": str(output)}))
    return read_metrics(output / "metrics.jsonl"), load_file(output / "model.safetensors")


def a_round_ahead_is_the_same_twice(url: str, directory: Path) -> None:
    """Rounds one ahead, twice and over a resumed run: the same scores and weights, within the server's rounding."""
    options = {"rollouts_ahead": 1, "max_mismatch": 1.0, "steps": 4}

    class Away(Listener):
        def collected(self, step: int, experience: Any) -> None:
            if step == 3:
                raise RuntimeError("away")

    first, again = (remax(url, directory, f"ahead-{i}", **options) for i in range(2))
    row = methods.STAGES["remax"]
    config = yaml.safe_load((directory / "ppo.yaml").read_text()) | {"vllm_url": url, "eval_data": None} | options
    config = methods.load(row.config)(**config | {"output_dir": str(directory / "ahead-cut")})
    try:
        methods.load(row.train)(config, listeners=[Away()])
    except RuntimeError as error:
        assert str(error) == "away", error
    resumed = remax(url, directory, "ahead-cut", resume=True, **options)
    for metrics, weights in (again, resumed):
        worst = max(abs(a["objective/scores"] - b["objective/scores"]) for a, b in zip(metrics, first[0], strict=True))
        apart = max(float((weights[name] - x).abs().mean()) for name, x in first[1].items())
        assert worst < 0.02 and apart < 1e-4, (worst, apart)
        print(f"one round ahead, again: scores differ by {worst:.1e}, weights by {apart:.1e} on average")
    moved = [r["mismatch/mean"] for r in first[0]]
    assert moved[0] < 1e-4 < min(moved[1:]), moved
    print(f"a round is older by one update: {moved[1]:.1e} nats a token")


def two_processes_in_shards(url: str, directory: Path) -> None:
    """Two processes with a model in shards give the scores of one process."""
    alone, _ = remax(url, directory, "alone", max_grad_norm=0.0)
    config = yaml.safe_load((directory / "ppo.yaml").read_text()) | {"vllm_url": url, "max_grad_norm": 0.0}
    config = {name: value for name, value in config.items() if name != "eval_data"}
    (directory / "shards.yaml").write_text(yaml.safe_dump(config | {"output_dir": str(directory / "shards")}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rlhf_fast", "remax"]
    subprocess.run([*launcher, "--config", str(directory / "shards.yaml"), "--shard", "full"], check=True)
    several = read_metrics(directory / "shards" / "metrics.jsonl")
    for a, b in zip(alone, several, strict=True):
        assert abs(a["objective/scores"] - b["objective/scores"]) < 0.02, (a, b)
    print("two processes, a model in shards: the scores of one process")


def benches_run(url: str, directory: Path) -> None:
    """Both benches of a server, a few tokens each."""
    where = ["--vllm", url, "--model", str(directory / "model"), "--data", str(directory), "--quick", "--rounds", "2"]
    for what in ("rollout", "ahead"):
        out = directory / f"{what}.json"
        subprocess.run([sys.executable, "-m", "bench", what, *where, "--out", str(out)], check=True)
        assert json.loads(out.read_text())["results"]


def an_adapter_goes_alone(url: str, directory: Path) -> None:
    """A server for adapters gets them alone, by the names of their versions, and a restart is found."""
    options = {"lora_rank": 2, "learning_rate": 1e-2}
    plain = yaml.safe_load((directory / "ppo.yaml").read_text())
    started = VLLMCommandConfig(
        model=plain["model"], max_prompt_length=32, max_response_length=16, vllm_url=url, lora_rank=2, device="cpu"
    )
    merged, _ = remax_with_adapter(url, directory, "merged", **options)
    restarted(directory, command(started))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        alone, last = remax_with_adapter(url, directory, "alone-adapter", **options)
    assert not [line for line in said if "merged into its base" in str(line.message)], said
    for a, b in zip(alone, merged, strict=True):  # a draw within rounding of two tokens' boundary may fall otherwise
        assert a["mismatch/mean"] < 1e-4 and abs(a["objective/scores"] - b["objective/scores"]) < 0.02, (a, b)
    client = Client(url, timeout=60, patience=PATIENCE)
    served = [model["id"] for model in client.get("/v1/models")["data"]]
    assert len(served) == 2 and served[1].endswith("-3"), served  # one adapter, of the third round
    assert str(client.get("/weight_info")["weight_version"]) == "default"
    print(f"adapters alone: the scores of merged adapters; served: {', '.join(served)}; {last}")


def remax_with_adapter(url: str, directory: Path, name: str, **options: Any) -> tuple[list[dict], str]:
    """The metrics of a run with an adapter, and what it says of its largest mismatch."""
    config = yaml.safe_load((directory / "ppo.yaml").read_text()) | {"vllm_url": url, "eval_data": None} | options
    row, output = methods.STAGES["remax"], directory / name
    methods.load(row.train)(methods.load(row.config)(**config | {"output_dir": str(output)}))
    rows = read_metrics(output / "metrics.jsonl")
    return rows, f"largest mismatch {max(r['mismatch/max'] for r in rows):.1e}"


def check(directory: Path, url: str) -> None:
    began = time.perf_counter()
    sampler, prompts = connect(url, directory)
    print(f"the server is up and has the weights after {time.perf_counter() - began:.0f} s")
    rows_are_right(sampler, prompts)
    draws_follow_the_model(sampler, prompts)
    pushes_are_right(sampler, prompts)
    one_batch_for_remax(sampler, prompts)
    stages_train(url, directory)
    a_round_ahead_is_the_same_twice(url, directory)
    two_processes_in_shards(url, directory)
    benches_run(url, directory)
    a_restart_is_found(*connect(url, directory), directory)
    an_adapter_goes_alone(url, directory)
    print(f"all checks hold after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), sys.argv[3])
