// Python module rlhf_fast._cpu: every kernel of cpu/ops.h under its own name. The module chooses the instruction set
// when it is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <cstdlib>
#include <string>
#include <vector>

#include "bind.h"

#define ISA scalar
#include "cpu/ops.h"
#undef ISA
#if defined(__x86_64__)
#define ISA avx2
#include "cpu/ops.h"
#undef ISA
#define ISA avx512
#include "cpu/ops.h"
#undef ISA
#define RLHF_VERSIONS(op) {rlhf::scalar::op, rlhf::avx2::op, rlhf::avx512::op}
#else
#define RLHF_VERSIONS(op) {rlhf::scalar::op, rlhf::scalar::op, rlhf::scalar::op}
#endif

namespace {

const char* const kNames[] = {"scalar", "avx2", "avx512"};
int level = 0;  // index of the instruction set in use

bool available(int i) {
#if defined(__x86_64__)
    if (i == 1)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (i == 2)
        return available(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return i == 0;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (int i = 0; i < 3; ++i)
        if (available(i)) names.push_back(kNames[i]);
    return names;
}

void set_isa(const std::string& name) {
    for (int i = 0; i < 3; ++i)
        if (name == kNames[i] && available(i)) {
            level = i;
            return;
        }
    throw py::value_error("isa: expected one of this CPU's " + py::repr(py::cast(isas())).cast<std::string>() +
                          ", got '" + name + "'");
}

// The units of this CPU that multiply bfloat16, by the numbers that matmul_bf16 takes.
bool has_bf16_unit(int unit) {
    if (level < 2) return false;
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, d;
    if (unit == 1) return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    // The system keeps AMX's registers for a process that asks, from the first question on.
    if (unit == 2)
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) &&
               syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* the data of tiles */) == 0;
#endif
    (void)unit;
    return false;
}

std::vector<int> bf16_units() {
    std::vector<int> units;
    for (int unit : {1, 2})
        if (has_bf16_unit(unit)) units.push_back(unit);
    return units;
}

// AMX, else vdpbf16ps where it is faster than the fused multiply-add of floats: not on Intel's CPUs.
int bf16_unit() {
    static const bool amx = has_bf16_unit(2);
    if (level < 2) return 0;
    if (amx) return 2;
#if defined(__x86_64__)
    return !__builtin_cpu_is("intel") && has_bf16_unit(1) ? 1 : 0;
#else
    return 0;
#endif
}

template <typename Result, typename... Args>
void define(py::module_& module, const char* name, const std::array<Result (*)(Args...), 3>& versions) {
    module.def(name, [versions](Args... args) {
        py::gil_scoped_release release;
        return versions[level](args...);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    while (level < 2 && available(level + 1)) ++level;
    if (const char* name = std::getenv("RLHF_FAST_CPU_ISA")) set_isa(name);
    module.doc() = "CPU kernels on raw pointers. Argument order: csrc/cpu/ops.h.";
    module.def("isa", [] { return kNames[level]; });
    module.def("isas", isas);
    module.def("set_isa", set_isa);
    module.def("bf16_units", bf16_units);
    module.def("bf16_unit", bf16_unit);
#define RLHF_DEFINE(op) define(module, #op, std::array<decltype(&rlhf::scalar::op), 3> RLHF_VERSIONS(op))
    RLHF_DEFINE(token_logprobs);
    RLHF_DEFINE(token_logprobs_backward);
    RLHF_DEFINE(token_kl);
    RLHF_DEFINE(token_kl_backward);
    RLHF_DEFINE(sample_tokens);
    RLHF_DEFINE(matmul_bf16);
    RLHF_DEFINE(decode_attention);
    RLHF_DEFINE(add_rms_norm);
    RLHF_DEFINE(add_rms_norm_backward);
    RLHF_DEFINE(swiglu);
    RLHF_DEFINE(swiglu_backward);
    RLHF_DEFINE(packed_attention);
    RLHF_DEFINE(packed_attention_backward);
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
