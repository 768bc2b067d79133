// Recurrences over time, row by row from the row's end: GAE, discounted returns, ReMax returns. The state is in double.
// A masked position leaves the state unchanged; its output is 0.
#include "../returns.h"
#include "ops.h"

namespace rlhf::ISA {
namespace {

template <typename T>
void gae_rows(Pointer rewards, Pointer values, Pointer mask, Pointer lams, int64_t B, int64_t L, double gamma,
              double lam, Pointer advantages, Pointer returns, int threads) {
    const int team = team_size(B * L, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
        const T *r = rewards.as<T>() + b * L, *v = values.as<T>() + b * L;
        const uint8_t* on = mask.as<uint8_t>() + b * L;
        T *a = advantages.as<T>() + b * L, *ret = returns.as<T>() + b * L;
        const double of_row = lams ? double(lams.as<T>()[b]) : lam;
        GAEState state;
        for (int64_t t = L - 1; t >= 0; --t) {
            if (!on[t]) {
                a[t] = ret[t] = 0;
                continue;
            }
            state.step(double(r[t]), double(v[t]), gamma, of_row);
            a[t] = T(state.advantage);
            ret[t] = T(state.advantage + double(v[t]));
        }
    }
}

template <typename T>
void return_rows(Pointer rewards, Pointer mask, int64_t B, int64_t L, double gamma, Pointer out, int threads) {
    const int team = team_size(B * L, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
        double sum = 0;
        for (int64_t i = (b + 1) * L - 1; i >= b * L; --i) {
            const bool on = mask.as<uint8_t>()[i];
            if (on) sum = rewards.as<T>()[i] + gamma * sum;
            out.as<T>()[i] = on ? T(sum) : T(0);
        }
    }
}

template <typename T>
void remax_rows(Pointer scores, Pointer greedy, Pointer logp, Pointer ref, Pointer mask, int64_t B, int64_t L,
                double kl_coef, double gamma, double clip, int variant, Pointer out, int threads) {
    const int team = team_size(B * L, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
        double advantage = clamp(double(scores.as<T>()[b]) - double(greedy.as<T>()[b]), -clip, clip), kl_to_go = 0;
        for (int64_t i = (b + 1) * L - 1; i >= b * L; --i) {
            const bool on = mask.as<uint8_t>()[i];
            if (on) {
                const double kl = double(logp.as<T>()[i]) - double(ref.as<T>()[i]);
                kl_to_go = variant == kVerl ? kl_to_go + kl : kl;
                if (variant == kOfficial) advantage *= gamma;  // gamma^(L - t), gamma at the last token
            }
            out.as<T>()[i] = on ? T(advantage - kl_coef * kl_to_go) : T(0);
        }
    }
}

}  // namespace

void gae(int dtype, Pointer rewards, Pointer values, Pointer mask, Pointer lams, int64_t B, int64_t T, double gamma,
         double lam, Pointer advantages, Pointer returns, int threads) {
    RLHF_BY_DTYPE(gae_rows, rewards, values, mask, lams, B, T, gamma, lam, advantages, returns, threads);
}

void discounted_returns(int dtype, Pointer rewards, Pointer mask, int64_t B, int64_t T, double gamma, Pointer out,
                        int threads) {
    RLHF_BY_DTYPE(return_rows, rewards, mask, B, T, gamma, out, threads);
}

void remax_returns(int dtype, Pointer scores, Pointer greedy, Pointer logp, Pointer ref, Pointer mask, int64_t B,
                   int64_t T, double kl_coef, double gamma, double clip, int variant, Pointer out, int threads) {
    RLHF_BY_DTYPE(remax_rows, scores, greedy, logp, ref, mask, B, T, kl_coef, gamma, clip, variant, out, threads);
}

}  // namespace rlhf::ISA
