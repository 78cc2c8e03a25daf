// The gates in float32, accurate over its whole range, subnormal results included.
#pragma once

// exp(A_log) for one head. Finite, so that it never meets a zero as infinity.
__device__ __forceinline__ float rate_of(float A_log) { return fminf(expf(A_log), 3.402823466e38f); }

// The quotient is of numbers between 1 and 2, where __fdividef is 2 ulp off at most (beyond 2**126 it would give 0).
__device__ __forceinline__ float sigmoid(float x) {
  const float small = expf(-fabsf(x)), large = __fdividef(1.0f, 1.0f + small);
  return x < 0.0f ? small * large : large;
}

// log1p(exp(y)) for y <= 0, within 5 units of 2**-24: 2 atanh(s) with s = e / (2 + e), as a polynomial in s * s on
// [0, 1/9]. No branch and no logarithm; where e is tiny the result is 2 s, and nothing is lost.
__device__ __forceinline__ float log1p_of_exp(float y) {
  const float e = expf(y), s = __fdividef(e, 2.0f + e), w = s * s;
  float p = fmaf(w, 0.28030503f, 0.27998009f);
  p = fmaf(p, w, 0.40021762f);
  p = fmaf(p, w, 0.66666412f);
  return s * fmaf(p, w, 2.0f);
}

// softplus(z) is max(z, 0) + log1p(exp(-|z|)): nothing overflows whatever the threshold. For very negative z it is
// exp(z) to half an ulp, and its product with exp(A_log) is formed in the exponent, where a huge rate and a vanishing
// softplus cannot give 0 * inf. All of it is selections: a branch would end the loads that can be waited for apart.
__device__ __forceinline__ float log_decay_of(float A_log, float x, const Arguments& p) {
  if constexpr (Shape::BOUNDED) return p.lower_bound * sigmoid(rate_of(A_log) * x);
  const float z = p.softplus_beta * x;
  const bool vanishing = z < -17.0f;
  const float curved = fmaxf(z, 0.0f) + log1p_of_exp(-fabsf(z)), softplus = z > p.softplus_threshold ? z : curved;
  const float rate = rate_of(vanishing ? A_log + z : A_log);
  return -rate * (vanishing ? p.softplus_unit : softplus * p.softplus_unit);
}
__device__ __forceinline__ float decay_of(float A_log, float x, const Arguments& p) {
  return expf(log_decay_of(A_log, x, p));
}

struct Scalars {  // of one token, ready for u = gain * (v - keep * S^T k), S = decay * S + k u^T, o = scale * S^T q
  float decay, keep, gain, scale;  // k and q as they were given: their norms are in here
};

// KDA decays by channel, before its sums: decay is 1 here.
__device__ __forceinline__ Scalars scalars_of(float decay, float b, float k_factor, float q_factor,
                                              const Arguments& p) {
  return {decay, decay * k_factor, p.beta_factor * sigmoid(b) * k_factor, p.scale * q_factor};
}
