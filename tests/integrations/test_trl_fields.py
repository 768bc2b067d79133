"""Every field of TRL's configs: what becomes of it in a changed trainer. A field that the table does not know fails.

loop      of the loop around the model: optimizer, logging, saving, processes
rows      of the rows before the model reads them, or of loading the model before the trainer is changed
rollout   of sampling, which is the model's own forward or a server's
loss      of TRL's loss, which reads log-probs, entropies and their like wherever they come from
forward   of what the model computes; each is in a run below, whose numbers are those of the plain trainer
device    as forward, on GPUs alone
refused   in one line
"""

import dataclasses

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.integrations.head import Distribution, Layer
from rlhf_fast.integrations.trl import accelerate_trainer
from tests.support.models import model_config
from tests.support.trainers import assert_same_training, made, policy, refused, sft_rows, tokenizer

TABLE = {
    "loop": """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
        lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
        optim_target_modules max_grad_norm average_tokens_across_devices torch_empty_cache_steps auto_find_batch_size
        logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
        include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
        trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
        per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps
        save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
        hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
        ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
        accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank log_completions
        log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo""",
    "rows": """remove_unused_columns label_names train_sampling_strategy length_column_name model_init_kwargs
        trust_remote_code chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token pad_token
        max_length truncation_mode shuffle_dataset packing_strategy eval_packing completion_only_loss
        assistant_only_loss disable_dropout""",
    "rollout": """num_generations num_generations_eval max_completion_length ds3_gather_for_generation
        generation_batch_size steps_per_generation top_p top_k min_p generation_kwargs chat_template_kwargs
        repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
        vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
        vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
        max_tool_calling_iterations use_transformers_continuous_batching transformers_continuous_batching_config
        use_transformers_paged""",
    "loss": """loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta discopop_tau
        desirable_weight undesirable_weight epsilon epsilon_high delta reward_weights normalize_advantages
        reward_clip_range mask_truncated_completions sapo_temperature_neg sapo_temperature_pos vespo_k_pos
        vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level multi_objective_aggregation
        scale_rewards top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max
        entropy_coef_delta entropy_target vllm_importance_sampling_correction vllm_importance_sampling_mode
        vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_cap
        off_policy_mask_threshold use_bias_correction_kl center_rewards_coefficient""",
    "forward": """loss_type label_smoothing_factor gradient_accumulation_steps bf16 bf16_full_eval
        activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
        use_cache neftune_noise_alpha router_aux_loss_coef packing padding_free pad_to_multiple_of
        precompute_ref_log_probs precompute_ref_batch_size use_weighting sync_ref_model ref_model_mixup_alpha
        ref_model_sync_steps temperature num_iterations cast_lm_head_to_fp32""",
    "device": "fp16 fp16_full_eval tf32",
    "refused": """torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config
        activation_offloading parallelism_config fsdp fsdp_config deepspeed""",
}
FATE = {field: fate for fate, fields in TABLE.items() for field in fields.split()}
IN_TEST_TRL = {"loss_type", "gradient_accumulation_steps", "bf16", "gradient_checkpointing", "packing", "use_weighting"}
IN_TEST_TRL |= {"temperature", "num_iterations"}
CONFIGS = ("SFT", "DPO", "KTO", "RLOO", "GRPO", "Reward")

RUNS = {  # name -> trainer, options
    "noise in the embeddings": ("SFT", {"neftune_noise_alpha": 5.0}),
    "smoothed labels": ("SFT", {"label_smoothing_factor": 0.1}),
    "no padding": ("SFT", {"padding_free": True, "max_length": None, "use_cache": False}),
    "some layers again": (
        "SFT",
        {
            "activation_checkpointing": True,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"selective": True},
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        },
    ),
    "experts": ("SFT", {"router_aux_loss_coef": 0.1, "pad_to_multiple_of": 8}),
    "mixture of losses": (
        "DPO",
        {
            "loss_type": ["discopop", "sigmoid_norm", "exo_pair"],
            "label_smoothing": 0.1,
            "discopop_tau": 0.1,
            "ld_alpha": 0.5,
            "f_divergence_type": "alpha_divergence",
        },
    ),
    "reference's log-probs ahead": ("DPO", {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}),
    "a reference that follows": (
        "DPO",
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "loss_type": ["aot"]},
    ),
    "an adapter as reference": ("DPO", {}),
    "sequences and entropy": (
        "GRPO",
        {
            "importance_sampling_level": "sequence",
            "top_entropy_quantile": 0.5,
            "use_adaptive_entropy": True,
            "off_policy_mask_threshold": 0.01,
            "loss_type": "luspo",
        },
    ),
    "a head in fp32": ("GRPO", {"cast_lm_head_to_fp32": True, "loss_type": "sapo", "temperature": 0.9}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_has_a_fate(name):
    fields = [field.name for field in dataclasses.fields(getattr(trl, f"{name}Config"))]
    assert [field for field in fields if field not in FATE] == []


def test_the_table_has_no_other_field_and_its_forward_is_run():
    known = {field.name for name in CONFIGS for field in dataclasses.fields(getattr(trl, f"{name}Config"))}
    assert set(FATE) == known and sum(len(fields.split()) for fields in TABLE.values()) == len(FATE)
    run = {option for _, options in RUNS.values() for option in options} | {*IN_TEST_TRL, "bf16_full_eval"}
    assert {field for field, fate in FATE.items() if fate == "forward"} - run == set()


def model_of(name, start):
    if name == "experts":
        sizes = model_config("llama", 64) | {"num_local_experts": 4}
        sizes.pop("model_type")
        torch.manual_seed(6)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    if name == "an adapter as reference":
        torch.manual_seed(5)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(policy(), lora)
    return start


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy_of_fields")
    policy().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.mark.filterwarnings("ignore")  # TRL's of options that it is going to drop
@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_are_those_of_the_plain_trainer(name, start, tmp_path):
    kind, options = RUNS[name]
    # another reference than the policy's own start, whose margins would be 0 or the rounding of 0
    given = {"ref_model": policy(seed=9)} if "precompute_ref_log_probs" in options else None
    plain, changed = (
        made(kind, tmp_path, model_of(name, start), given=given, max_steps=2, **options) for _ in range(2)
    )
    accelerate_trainer(changed)
    assert_same_training(plain, changed, steps=2)


@pytest.mark.filterwarnings("ignore")
def test_functions_of_the_user_get_what_they_get_in_the_plain_trainer(start, tmp_path):
    """A loss of the logits, and metrics of an evaluation's logits; an evaluation in bf16."""

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().logsumexp(-1).mean()

    def metrics(predictions):
        return {"spread": float(predictions.predictions.std())}

    given = {"compute_loss_func": loss, "compute_metrics": metrics, "eval_dataset": sft_rows(8)}
    trainers = [made("SFT", tmp_path, start, given=given, max_steps=2) for _ in range(2)]
    accelerate_trainer(trainers[1])
    assert_same_training(*trainers, steps=2)
    theirs, ours = (trainer.evaluate() for trainer in trainers)
    assert theirs["eval_spread"] > 0
    for key in ("eval_spread", "eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    halves = [made("SFT", tmp_path, start, given={"eval_dataset": sft_rows(8)}, bf16_full_eval=True) for _ in range(2)]
    accelerate_trainer(halves[1])
    theirs, ours = (trainer.evaluate() for trainer in halves)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=2e-2)


def test_a_head_in_fp32_is_so_under_autocast_on_a_gpu():
    with FakeTensorMode():
        hidden, weight = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((5, 3), (7, 3)))
    torch.set_autocast_enabled("cuda", True)
    try:
        half, full = (Layer(weight, None, Distribution(in_fp32=x)).scaled(hidden) for x in (False, True))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert half[0].dtype == half[1].dtype == torch.get_autocast_dtype("cuda")
    assert full[0].dtype == full[1].dtype == torch.float32


def test_a_field_that_a_subclass_asks_for_is_given(start, tmp_path):
    """A subclass may put a head of its own; its outputs are those that ours has."""
    trainer = made("SFT", tmp_path, start)
    trl.trainer.utils.add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "is_top1", "log_sum_sq_probs"))
    row = torch.tensor([[5, 6, 7, 8]])
    call = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row, "fused_lm_head": True}
    theirs = trainer.model(**call)
    accelerate_trainer(trainer)
    ours = trainer.model(**call)
    assert ours.keys() == theirs.keys() and "log_sum_sq_probs" in ours
    torch.testing.assert_close(ours.log_sum_sq_probs, theirs.log_sum_sq_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["SFT", "Reward"])
def test_refusals_are_those_of_every_trainer(kind, start, tmp_path, monkeypatch):
    trainer = made(kind, tmp_path, start)
    for field, message in {
        "torch_compile": "torch_compile=False",
        "use_liger_kernel": "use_liger_kernel=False",
        "activation_offloading": "activation_offloading=False",
    }.items():
        assert FATE[field] == "refused"
        with monkeypatch.context() as patch:
            patch.setattr(trainer.args, field, True)
            refused(trainer, message)
