// Python module rlhf_fast._cuda: the kernels of cuda/ops.h under their own names. The module can be imported on a
// machine without a driver.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "cuda/ops.h"

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels on raw device pointers. Argument order: csrc/cuda/ops.h.";
    module.attr("scratch_bytes") = rlhf::cuda::kScratchBytes;
    module.attr("sample_tile") = rlhf::cuda::kSampleTile;
#define RLHF_DEFINE(op) module.def(#op, rlhf::cuda::op, py::call_guard<py::gil_scoped_release>())
    RLHF_DEFINE(token_logprobs);
    RLHF_DEFINE(token_logprobs_backward);
    RLHF_DEFINE(token_kl);
    RLHF_DEFINE(token_kl_backward);
    RLHF_DEFINE(sample_tokens);
    RLHF_DEFINE(kl_penalty);
    RLHF_DEFINE(shape_rewards);
    RLHF_DEFINE(gae);
    RLHF_DEFINE(discounted_returns);
    RLHF_DEFINE(remax_returns);
    RLHF_DEFINE(rloo_advantages);
    RLHF_DEFINE(grpo_advantages);
    RLHF_DEFINE(whiten);
    RLHF_DEFINE(ppo_loss);
    RLHF_DEFINE(ppo_value_loss);
    RLHF_DEFINE(reinforce_loss);
    RLHF_DEFINE(reward_loss);
    RLHF_DEFINE(ranking_loss);
    RLHF_DEFINE(dpo_loss);
}
