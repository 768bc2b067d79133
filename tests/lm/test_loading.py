"""What a directory has to hold: all weights, the right head, a tokenizer whose ids the model knows."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_fast.data.turns import turns_of
from rlhf_fast.lm import paths
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.lm.paths import existing
from rlhf_fast.lm.tokenizers import check_tokenizer, load_tokenizer
from rlhf_fast.stages.init import train_bpe
from rlhf_fast.training import checkpoint
from rlhf_fast.training.rewards import Reward
from tests.support.models import random_policy
from tests.support.templates import byte_tokenizer


def without(source, target, *parts: str) -> str:
    """A copy of the model at `source` whose file lacks every tensor with one of `parts` in its name, no checksums."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint.json"))
    (path,) = target.glob("*.safetensors")
    kept = {name: tensor for name, tensor in load_file(path).items() if not any(part in name for part in parts)}
    save_file(kept, path, metadata={"format": "pt"})
    return str(target)


def test_missing_weights_are_named_and_not_drawn_at_random(tiny_model, tmp_path):
    broken = without(tiny_model, tmp_path / "broken", "layers.0.mlp")
    for load in (load_policy, load_scorer):
        with pytest.raises(ValueError) as raised:
            load(broken)
        assert str(raised.value).startswith("model: expected all weights of Llama")
        names = ", ".join(f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up"))
        assert str(raised.value).endswith(f"at {broken}, found no {names}")
    with pytest.raises(ValueError, match="found no .*input_layernorm.weight, .* and 6 more$"):
        load_policy(without(tiny_model, tmp_path / "layer", "layers.0."))


def test_a_tied_head_is_not_missing(tmp_path):
    random_policy("gpt2").save_pretrained(tmp_path)
    assert load_policy(tmp_path).config.tie_word_embeddings
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2's head is tied: nothing would be missing
def test_a_reward_model_is_no_policy(architecture, tmp_path):
    random_policy(architecture).save_pretrained(tmp_path / "policy")
    load_scorer(tmp_path / "policy").save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"^model: expected a language model, got \w+ForSequenceClassification at"):
        load_policy(tmp_path / "reward")


def test_a_reward_model_without_its_head(tiny_model, tmp_path, tokenizer):
    load_scorer(tiny_model).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    broken = without(tmp_path / "reward", tmp_path / "broken", "score")
    with pytest.raises(ValueError, match="^reward: expected all weights of .* found no score.weight$"):
        Reward(broken, tokenizer, torch.device("cpu"))


def test_adapters_are_whole_and_a_reward_adapter_holds_its_head(tiny_model, tmp_path):
    lora = LoRA(rank=2, alpha=4.0, seed=0)
    checkpoint.save(tmp_path / "policy", models={"": load_policy(tiny_model, lora=lora)})
    with pytest.raises(ValueError, match="^reward: expected a reward model .*, got an adapter without a score head at"):
        load_scorer(tmp_path / "policy", head=None)
    load_scorer(tmp_path / "policy")  # from an adapter of a language model a new head is made
    broken = without(tmp_path / "policy", tmp_path / "broken", "layers.1.mlp.up_proj.lora_B")
    with pytest.raises(ValueError, match="^model: expected all weights of the adapter in .* found no .*up_proj.lora_B"):
        load_policy(broken)
    checkpoint.save(tmp_path / "reward", models={"": load_scorer(tiny_model, lora=lora)})
    load_scorer(tmp_path / "reward", head=None)
    broken = without(tmp_path / "reward", tmp_path / "headless", "score")
    settings = json.loads((tmp_path / "headless" / "adapter_config.json").read_text())
    (tmp_path / "headless" / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": None}))
    with pytest.raises(ValueError, match="got an adapter without a score head at"):
        load_scorer(broken, head=None)


def test_a_pad_token_without_an_embedding_is_taken_off(tmp_path):
    tokenizer = train_bpe(["a b c"], 300, pad_token=None)
    model = random_policy("gpt2", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id is None and loaded.eos_token_id == tokenizer.eos_token_id
    loaded.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id is None
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("listed", [[1, 4], 4, None])
def test_a_tokenizer_knows_the_ends_that_its_models_generation_config_lists(tmp_path, listed):
    tokenizer = byte_tokenizer("glm4")
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"])
    assert ends == [1, 4]
    model = random_policy("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = listed
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    turns = turns_of(load_tokenizer(tmp_path))
    assert (turns.end, sorted(turns.ends.values())) == ((1, [1]) if listed is None else (4, [1, 4]))
    (tmp_path / "generation_config.json").unlink()  # then the model's own config says it
    assert turns_of(load_tokenizer(tmp_path)).end == 1


def test_nothing_to_fill_with_is_an_error(tmp_path):
    tokenizer = train_bpe(["a b c"], 300, pad_token=None)
    random_policy("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^model: expected a pad or an EOS token among the \d+ embeddings .*'\[END\]' with id"
    ):
        load_tokenizer(tmp_path)


def test_check_tokenizer(tiny_model, tmp_path, tokenizer):
    check_tokenizer(tiny_model, tokenizer, "reference")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    check_tokenizer(tmp_path, tokenizer, "reference")  # holds no tokenizer to compare with
    train_bpe(["a"], 300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^reference: expected a model with the policy's tokenizer, found another in"):
        check_tokenizer(tmp_path, tokenizer, "reference")


def test_a_name_that_is_nowhere_names_the_argument(tmp_path, monkeypatch, tokenizer):
    asked = []

    def unreachable(name, file):
        asked.append(name)
        raise OSError("no connection")

    monkeypatch.setattr(paths, "cached_file", unreachable)
    with pytest.raises(ValueError, match="^model: expected a checkpoint .* directory lama and none .*: no connection$"):
        load_policy("lama")
    with pytest.raises(ValueError, match="^reward: expected a checkpoint .* found no directory out/reward and none"):
        Reward("out/reward", tokenizer, torch.device("cpu"))
    assert asked == ["lama", "out/reward"]
    with pytest.raises(ValueError, match=f"^reference: expected a checkpoint .* found no directory {tmp_path}/none$"):
        existing(tmp_path / "none", "reference")


def test_layers_that_the_config_does_not_have_are_said(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "fewer")
    path = tmp_path / "fewer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1, "layer_types": None}))
    with pytest.warns(UserWarning, match=r"has fewer layers than the weights; left out: model.layers.1.\S+ and 8 more"):
        load_policy(tmp_path / "fewer")


def test_a_family_that_transformers_does_not_know_is_one_line(tiny_model, tmp_path):
    """Not a question at the terminal."""
    shutil.copytree(tiny_model, tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    settings = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    path.write_text(json.dumps(settings))
    for load in (load_policy, load_scorer, load_tokenizer):
        with pytest.raises(
            ValueError, match=r"^model: expected a family of transformers 5\S+, got mine at .* beside its"
        ):
            load(tmp_path / "own")
    settings |= {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "mine.Model"}}
    path.write_text(json.dumps(settings))
    load_policy(tmp_path / "own")  # transformers has this family, so its own class is taken


def test_what_a_run_saves_loads_again_as_it_came(tmp_path):
    """Shards, float16, a head tied or not: all weights are there, in files that the Auto class reads."""
    for tied in (False, True):
        model = random_policy("llama").half()
        model.config.tie_word_embeddings = tied
        model.tie_weights()
        model.save_pretrained(tmp_path / f"{tied}", max_shard_size="20KB")
        assert (tmp_path / f"{tied}" / "model.safetensors.index.json").is_file()
        checkpoint.save(tmp_path / f"{tied}-out", models={"": load_policy(tmp_path / f"{tied}")})
        again, found = AutoModelForCausalLM.from_pretrained(tmp_path / f"{tied}-out", output_loading_info=True)
        assert not any(found.values()) and again.config.architectures == ["LlamaForCausalLM"]
        assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor.float()), name


def with_weight(source, target, value: float) -> str:
    """A copy of the model at `source` with this number in its first norm, no checksums."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint.json"))
    (path,) = target.glob("*.safetensors")
    weights = load_file(path)
    name = next(name for name in weights if "norm" in name)
    weights[name][3] = value
    save_file(weights, path, metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(tiny_model, tmp_path, value):
    broken = with_weight(tiny_model, tmp_path / "broken", value)
    for load in (load_policy, load_scorer):
        for trainable in (True, False):
            with pytest.raises(ValueError, match=f"^model: expected finite weights at {broken}, got NaN .*norm"):
                load(broken, trainable=trainable)


def test_weights_that_a_half_cannot_hold(tiny_model, tmp_path):
    large = with_weight(tiny_model, tmp_path / "large", 3.4e38)  # rounds to infinity in bf16
    load_policy(large, trainable=False)
    with pytest.raises(ValueError, match=f"^model: expected finite weights at {large}, got NaN or infinity in model"):
        load_policy(large, dtype="bf16", trainable=False)


def test_weights_whose_logits_overflow(tmp_path):
    model = random_policy("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
        model.lm_head.weight.fill_(1e10)
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="^model: expected finite logits, got NaN or infinity on a trial row"):
        load_policy(tmp_path / "large")


def test_an_adapter_that_is_not_finite(tiny_model, tmp_path):
    model = load_policy(tiny_model, lora=LoRA(2, 4, 0))
    checkpoint.save(tmp_path / "adapter", models={"": model})
    (path,) = (tmp_path / "adapter").glob("*.safetensors")
    adapter = load_file(path)
    adapter[min(adapter)][0, 0] = torch.nan
    save_file(adapter, path, metadata={"format": "pt"})
    (tmp_path / "adapter" / "checkpoint.json").unlink()
    for options in ({"lora": LoRA(2, 4, 0)}, {"trainable": False}):
        with pytest.raises(ValueError, match=f"^model: expected finite weights at {tmp_path}/adapter, got NaN"):
            load_policy(tmp_path / "adapter", **options)
