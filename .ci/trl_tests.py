"""TRL's own tests of its trainers, without our change and with it: how many pass, and which pass without it alone.

    python .ci/trl_tests.py CHECKOUT [-k EXPRESSION] [--change packed|heads] [FILE...]

CHECKOUT: of https://github.com/huggingface/trl. Nothing is read from the hub. TRL's generator makes the data sets, and
this script makes models under the hub's names, with a tokenizer of its own. Tests that need another model, a vision
model or a file of the hub fail on both sides, and do not count. Exit code 1 where our change makes a test fail.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = ("sft", "dpo", "kto", "rloo", "grpo", "reward")
MODELS = {
    "Qwen2ForCausalLM-2.5": ("qwen2", "qwen2_5"),
    "Qwen2ForSequenceClassification-2.5": ("qwen2", "qwen2_5"),
    "Qwen3ForCausalLM": ("qwen3", "qwen3"),
    "Qwen3ForSequenceClassification": ("qwen3", "qwen3"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "qwen3"),
    "LlamaForCausalLM-3.2": ("llama", "llama3"),
    "LlamaForSequenceClassification-3.2": ("llama", "llama3"),
    "MistralForCausalLM-0.2": ("mistral", "qwen2_5"),
    "GPTNeoXForCausalLM": ("gpt_neox", "qwen2_5"),
    "Gemma2ForCausalLM": ("gemma2", "qwen2_5"),
    "CohereForCausalLM": ("cohere", "qwen2_5"),
    "Cohere2ForCausalLM": ("cohere2", "qwen2_5"),
}
SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def make_rows(checkout: Path, directory: Path) -> list[str]:
    """The data sets of TRL's generator on disk; returns all their texts."""
    import datasets

    texts: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                collect(each)

    def save(rows: Any, repository: str, config_name: str = "default", **_: Any) -> None:
        rows.save_to_disk(str(directory / repository / config_name))
        for part in rows.values():
            collect(part.to_list())

    datasets.DatasetDict.push_to_hub = save
    for name in ("zen", "toolcall"):
        script = checkout / f"scripts/generate_{name}_dataset.py"
        found = importlib.util.spec_from_file_location(name, script)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        module.main(test_size=0.1, push_to_hub=True, repo_id=f"trl-internal-testing/{name}")
    return texts


def make_models(texts: list[str], cache: Path) -> None:
    """Tiny models in the layout of the hub's cache."""
    import torch
    import transformers
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    byte_level.train_from_iterator(texts, trainer)
    templates = Path(trl.__file__).parent / "chat_templates"
    for name, (kind, template) in MODELS.items():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=byte_level,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=["<|im_start|>"],
            chat_template=(templates / f"{template}.jinja").read_text(),
        )
        settings = SIZES | (EXPERTS if "Moe" in name else {}) | ({"head_dim": 4} if kind == "gemma2" else {})
        settings |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        settings |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        scores = "SequenceClassification" in name
        auto = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **settings, **({"num_labels": 1} if scores else {}))
        model = auto.from_config(config).to(torch.bfloat16)
        for module in model.modules():  # as TRL's own tiny models
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)
        repository, revision = cache / f"models--trl-internal-testing--tiny-{name}", "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(revision)
        for part in (model, tokenizer):
            part.save_pretrained(repository / "snapshots" / revision)


def run(change: str, checkout: Path, scratch: Path, files: list[str], chosen: str) -> dict[str, Any]:
    """The outcomes of TRL's tests."""
    outcomes = scratch / f"{change}.json"
    environment = os.environ | {
        "TRL_CHANGE": change,
        "TRL_ROWS": str(scratch / "rows"),
        "TRL_OUTCOMES": str(outcomes),
        "HF_HOME": str(scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".ci"), str(ROOT)]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "trl_plugin", "-p", "no:cacheprovider", "--tb=line", "-W"]
    command += ["ignore", "-k", chosen, *(f"tests/test_{name}_trainer.py" for name in files)]
    with (scratch / f"{change}.log").open("w") as log:
        ran = subprocess.run(command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not outcomes.exists():
        sys.exit(f"pytest ended with {ran.returncode}:\n{(scratch / f'{change}.log').read_text()[-3000:]}")
    return json.loads(outcomes.read_text())


def main() -> int:
    """Run both, print the counts; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", help=f"of {', '.join(FILES)}; all without any")
    parser.add_argument("-k", dest="chosen", default="not vlm and not VLM and not vision and not slow")
    parser.add_argument("--change", choices=["heads", "packed"], default="packed")
    args = parser.parse_args()
    files = args.files or list(FILES)
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        make_models(make_rows(args.checkout, scratch / "rows"), scratch / "hub/hub")
        found = {change: run(change, args.checkout, scratch, files, args.chosen) for change in ("no", args.change)}
    before, after = (found[change]["outcomes"] for change in ("no", args.change))
    passed = {name for name, outcome in before.items() if outcome == "passed"}
    still = {name for name in passed if after.get(name) == "passed"}
    changed, refused = found[args.change]["changed"], found[args.change]["refused"]
    print(f"TRL's tests of {', '.join(files)}: {len(before)} ran; {len(passed)} pass without our change")
    print(f"of these, {len(still)} pass with it; it was in the trainers of {len(passed & set(changed))} of them")
    for reason in sorted(set(refused.values())):
        print(f"refused in {sum(other == reason for other in refused.values())}: {reason}")
    for name in sorted(passed - still):
        print(f"FAILS with our change: {name}")
    return int(bool(passed - still) or not passed)


if __name__ == "__main__":
    sys.exit(main())
