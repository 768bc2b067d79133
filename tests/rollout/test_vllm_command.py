"""The command that starts a server: from flags, from a stage's own file, for bf16 and for an adapter."""

import json

import pytest
from transformers import AutoConfig

from rlhf_fast import cli
from rlhf_fast.config import VLLMCommandConfig
from rlhf_fast.rollout.vllm.command import command

FILE = """
model: {model}
train_data: prompts.jsonl
reward: some.module:function
output_dir: out
sampler: vllm
vllm_url: http://10.0.0.1:8100
max_prompt_length: 100
max_response_length: 28
gamma: 0.9
{more}
"""


@pytest.mark.parametrize(("more", "dtype"), [("", "float32"), ("bf16: true", "bfloat16"), ("dtype: bf16", "bfloat16")])
def test_a_stages_own_file(more, dtype, tiny_model, tmp_path, capsys):
    (tmp_path / "ppo.yaml").write_text(FILE.format(model=tiny_model, more=more))
    assert cli.main(["vllm-command", "--config", str(tmp_path / "ppo.yaml")]) == 0
    assert capsys.readouterr().out == (
        "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server "
        f"--model {tiny_model} --host 10.0.0.1 --port 8100 --max-model-len 128 --dtype {dtype} "
        "--generation-config vllm --logprobs-mode processed_logprobs\n"
    )


def test_an_unknown_key_of_the_file_is_refused(tiny_model, tmp_path, capsys):
    (tmp_path / "ppo.yaml").write_text(FILE.format(model=tiny_model, more="gama: 1"))
    assert cli.main(["vllm-command", "--config", str(tmp_path / "ppo.yaml")]) == 2
    assert "unknown key 'gama'" in capsys.readouterr().err


def test_a_server_on_a_cpu_and_the_base_of_an_adapter(tiny_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": tiny_model}))
    found = command(VLLMCommandConfig(model=str(tmp_path), device="cpu", trust_remote_code=True))
    assert f"--model {tiny_model} --host 127.0.0.1 --port 8000 " in found
    assert found.endswith(" --trust-remote-code --no-enable-chunked-prefill --enforce-eager")
    assert " --max-num-batched-tokens 2048 " in found and "VLLM_CPU_OMP_THREADS_BIND=nobind " in found
    assert "--model org/name " in command(VLLMCommandConfig(model="org/name"))


def test_a_server_on_a_cpu_of_a_model_whose_head_is_its_embedding(tiny_model, tmp_path, capsys):
    AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=True).save_pretrained(tmp_path)
    own_head = "--hf-overrides '{\"tie_word_embeddings\": false}' --load-format dummy "
    assert own_head in command(VLLMCommandConfig(model=str(tmp_path), device="cpu"))
    assert "--load-format" not in command(VLLMCommandConfig(model=str(tmp_path)))
    assert "--load-format" not in command(VLLMCommandConfig(model=tiny_model, device="cpu"))
    (tmp_path / "pairs.yaml").write_text(f"model: {tmp_path}\nprompts: p.jsonl\nreward: a:b\noutput: pairs.jsonl\n")
    assert cli.main(["vllm-command", "--config", str(tmp_path / "pairs.yaml"), "--device", "cpu"]) == 0
    assert "--load-format" not in capsys.readouterr().out


def test_a_server_for_adapters(tiny_model):
    found = command(VLLMCommandConfig(model=tiny_model, lora_rank=12, device="cpu"))
    assert found.startswith("VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True ")
    assert "--max-lora-rank 16 " in found and "--enable-lora" in found and "dummy" not in found


def test_a_server_that_takes_weights_by_nccl(tiny_model):
    found = command(VLLMCommandConfig(model=tiny_model, vllm_transfer="nccl"))
    assert """ --weight-transfer-config '{"backend": "nccl"}'""" in found


def test_an_address_that_is_none(capsys):
    assert cli.main(["vllm-command", "--model", "m", "--vllm-url", "127.0.0.1:8000"]) == 2
    assert (
        "vllm_url: expected an address such as http://127.0.0.1:8000, got '127.0.0.1:8000'" in capsys.readouterr().err
    )
