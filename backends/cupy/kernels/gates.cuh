// The gates in float32, accurate over its whole range.
#pragma once

// exp(A_log) for one head. Finite, so that it never meets a zero as infinity.
__device__ __forceinline__ float rate_of(float A_log) { return fminf(expf(A_log), 3.402823466e38f); }

// __fdividef is 2 ulp off and gives 0 beyond 2**126, where the quotient is below 1e-37.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// log1p(exp(z)) as max(z, 0) + log1p(exp(-|z|)): nothing overflows whatever the threshold. For very negative z the
// product with exp(A_log) is formed in the exponent, where a huge rate and a vanishing softplus cannot give 0 * inf.
__device__ __forceinline__ float decay_of(float A_log, float rate, float x, const Arguments& p) {
  if (p.bounded) return expf(p.lower_bound * sigmoid(rate * x));
  const float z = p.softplus_beta * x;
  if (z < -17.0f) return expf(-expf(A_log + z) * p.softplus_unit);
  const float softplus = z > p.softplus_threshold ? z : fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z)));
  return expf(-rate * (softplus * p.softplus_unit));
}
