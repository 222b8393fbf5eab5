// The curves of activations.
#pragma once

#include "step.h"
#include "wide.h"

namespace infopt {
namespace INFOPT_ISA {

template <int curve> static inline vf activated(vf x) {
    if constexpr (curve == SILU) return x / (1.0f + exponential(-x));
    if constexpr (curve == RELU) return select(x < splat(0.0f), vf{}, x);
    if constexpr (curve == GELU_TANH) {
        // 0.5 (1 + tanh(u)) is the logistic function of 2u.
        vf u = 0.797884561f * (x + 0.044715f * x * x * x);
        return x / (1.0f + exponential(-2.0f * u));
    }
    if constexpr (curve == GELU) {
        float held[W];
        store(held, x);
        for (int i = 0; i < W; i++) held[i] = 0.5f * held[i] * (1.0f + erff(held[i] * 0.707106781f));
        return load<vf>(held);
    }
}

}  // namespace INFOPT_ISA
}  // namespace infopt
