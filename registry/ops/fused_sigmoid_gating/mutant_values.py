"""Planted faults in what is computed: the formula, its precision, the flags it honours."""

from __future__ import annotations

import math

import torch

from .call import Call
from .mutant_seams import Rows, Seams, folded

__all__ = ["VALUE_FAULTS"]

Tensor = torch.Tensor


class NaiveSoftplus(Seams):
    """softplus as log(1 + exp(x)) in float32: coarse for negative x, and 0 below -17"""

    def softplus(self, z: Tensor, threshold: float) -> Tensor:
        return torch.where(z > threshold, z, torch.log(1 + torch.exp(z.float())).double())


class TruncatedOutput(Seams):
    """outputs are truncated to 16 bits instead of rounded"""

    def rounded(self, o: Tensor, dtype: torch.dtype) -> Tensor:
        return _truncated(o, dtype)


class TruncatedState(Seams):
    """states are truncated to a 16-bit pool instead of rounded"""

    def rounded_state(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return _truncated(state, dtype)


def _truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(dtype)
    if dropped is None:
        return x.to(dtype)
    return ((x.contiguous().view(torch.int32) >> dropped) << dropped).view(torch.float32).to(dtype)


class Threshold5(Seams):
    """softplus turns into the identity at 5"""

    def softplus(self, z: Tensor, threshold: float) -> Tensor:
        return super().softplus(z, min(threshold, 5.0))


class Relu(Seams):
    """relu in place of softplus"""

    def softplus(self, z: Tensor, threshold: float) -> Tensor:
        return z.clamp(min=0)


class IgnoredThreshold(Seams):
    """softplus_threshold is ignored: always 20"""

    def softplus(self, z: Tensor, threshold: float) -> Tensor:
        return super().softplus(z, 20.0)


class ThresholdOnX(Seams):
    """softplus_threshold is compared with x, not with beta * x"""

    def log_decay(self, x: Tensor, call: Call) -> Tensor:
        return super().log_decay(x, call.replace(softplus_threshold=call.softplus_threshold * call.softplus_beta))


class IgnoredSoftplusBeta(Seams):
    """softplus_beta is ignored: always 1"""

    def log_decay(self, x: Tensor, call: Call) -> Tensor:
        return super().log_decay(x, call.replace(softplus_beta=1.0))


class RateOverflows(Seams):
    """in float32, exp(A_log) overflows to infinity and meets a softplus of 0: NaN"""

    def rate(self, call: Call) -> Tensor:
        return super().rate(call).float().double()

    def softplus(self, z: Tensor, threshold: float) -> Tensor:
        return super().softplus(z, threshold).float().double()


class LargerEps(Seams):
    """eps of the norm is 1e-5"""

    def normalised(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(folded(x * x, -1)[..., None] + 1e-5)


class EpsOutside(Seams):
    """eps is added to the norm, not to the sum of squares"""

    def normalised(self, x: Tensor) -> Tensor:
        return x / (torch.sqrt(folded(x * x, -1)[..., None]) + 1e-6)


class EpsInMean(Seams):
    """eps is added to the mean of squares, as in an RMS norm"""

    def normalised(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(folded(x * x, -1)[..., None] / x.shape[-1] + 1e-6) / math.sqrt(x.shape[-1])


class QueryNotNormalised(Seams):
    """only k is normalised"""

    def query(self, q: Tensor, call: Call) -> Tensor:
        return q * call.scale


class AlwaysNormalised(Seams):
    """q and k are normalised though the call does not ask for it"""

    def query(self, q: Tensor, call: Call) -> Tensor:
        return self.normalised(q) * call.scale

    def key(self, k: Tensor, call: Call) -> Tensor:
        return self.normalised(k)


class ScaleBeforeNorm(Seams):
    """scale is applied before the norm, which undoes it up to eps"""

    def query(self, q: Tensor, call: Call) -> Tensor:
        return self.normalised(q * call.scale) * call.key_dim**-0.5 if call.use_qk_l2norm else q * call.scale


class IgnoredScale(Seams):
    """scale is ignored: always K ** -0.5"""

    def query(self, q: Tensor, call: Call) -> Tensor:
        return super().query(q, call.replace(scale=call.key_dim**-0.5))


class NoBiasInHead0(Seams):
    """dt_bias is not added in value head 0"""

    def gate_input(self, a: Tensor, dt_bias: Tensor) -> Tensor:
        bias = dt_bias.clone()
        bias[0] = 0
        return a + bias


class Gate0ForAll(Seams):
    """KDA: the gate of key channel 0 is used for all K"""

    def gate_input(self, a: Tensor, dt_bias: Tensor) -> Tensor:
        x = super().gate_input(a, dt_bias)
        return x[..., :1].expand_as(x) if x.dim() == 3 else x


class GateOfHead0(Seams):
    """KDA: the gate of value head 0 is used for all heads"""

    def gate_input(self, a: Tensor, dt_bias: Tensor) -> Tensor:
        x = super().gate_input(a, dt_bias)
        return x[:, :1].expand_as(x) if x.dim() == 3 else x


class Bf16Gate(Seams):
    """the logarithm of the decay goes through bfloat16"""

    def log_decay(self, x: Tensor, call: Call) -> Tensor:
        return super().log_decay(x, call).bfloat16().double()


class Bf16GateInput(Seams):
    """a + dt_bias is added in bfloat16"""

    def gate_input(self, a: Tensor, dt_bias: Tensor) -> Tensor:
        return (a + dt_bias).bfloat16().double()


class Bf16Rate(Seams):
    """A_log is read as bfloat16"""

    def rate(self, call: Call) -> Tensor:
        return super().rate(call.replace(A_log=call.A_log.bfloat16()))


class Bf16Beta(Seams):
    """beta goes through bfloat16"""

    def beta(self, b: Tensor, call: Call) -> Tensor:
        return super().beta(b, call).bfloat16().double()


class Exp2(Seams):
    """exp2 without the change of base"""

    def decay(self, g: Tensor) -> Tensor:
        return torch.exp2(g)


class IgnoredLowerBound(Seams):
    """lower_bound is ignored"""

    def log_decay(self, x: Tensor, call: Call) -> Tensor:
        return super().log_decay(x, call.replace(lower_bound=None))


class LowerBoundMinus5(Seams):
    """lower_bound is -5, whatever is given"""

    def log_decay(self, x: Tensor, call: Call) -> Tensor:
        return super().log_decay(x, call if call.lower_bound is None else call.replace(lower_bound=-5.0))


class IgnoredNegEigval(Seams):
    """allow_neg_eigval is ignored"""

    def beta(self, b: Tensor, call: Call) -> Tensor:
        return super().beta(b, call.replace(allow_neg_eigval=False))


class HeadsModulo(Seams):
    """value head i uses q/k head i % H"""

    def head_map(self, call: Call) -> Tensor:
        return torch.arange(call.hv, device=call.q.device) % call.h


class GateAfter(Seams):
    """the state decays after v - S^T k was taken, not before"""

    def step(self, rows: Rows, row: int, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        u = rows.beta[row] * (rows.v[row] - self.product(state, rows.k[row]))
        state = state * rows.decay[row][..., None] + rows.k[row][..., None] * u[:, None, :]
        return state, self.product(state, rows.q[row])


class OutputBefore(Seams):
    """the output is taken from the state before the token"""

    def step(self, rows: Rows, row: int, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        after, _ = super().step(rows, row, t, state)
        return after, self.product(state, rows.q[row])


class Tf32(Seams):
    """products with the state take TF32 operands"""

    def product(self, state: Tensor, x: Tensor) -> Tensor:
        return super().product(_tf32(state), _tf32(x))


def _tf32(x: Tensor) -> Tensor:
    """Rounded to 10 explicit mantissa bits."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Bf16State(Seams):
    """the state is carried in bfloat16"""

    def carried(self, state: Tensor) -> Tensor:
        return state.bfloat16().float()


class Bf16Keys(Seams):
    """normalised q and k go back to bfloat16"""

    def query(self, q: Tensor, call: Call) -> Tensor:
        return super().query(q, call).bfloat16().float()

    def key(self, k: Tensor, call: Call) -> Tensor:
        return super().key(k, call).bfloat16().float()


class Fp16Output(Seams):
    """outputs go through float16, whatever their dtype"""

    def rounded(self, o: Tensor, dtype: torch.dtype) -> Tensor:
        return o.half().to(dtype)


class LastHead(Seams):
    """the last value head is off by one part in a thousand"""

    def beta(self, b: Tensor, call: Call) -> Tensor:
        beta = super().beta(b, call)
        beta[:, -1] *= 1.001
        return beta


class Beyond16Tokens(Seams):
    """token 16 of a sequence uses the key of token 15: a tile's last key is used twice"""

    def step(self, rows: Rows, row: int, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        if t == 16:
            k = rows.k.clone()
            k[row] = rows.k[row - 1]
            rows = Rows(rows.q, k, rows.v, rows.decay, rows.beta)
        return super().step(rows, row, t, state)


class KeysBeyond128(Seams):
    """key channels beyond the 128th do not enter products with the state"""

    def product(self, state: Tensor, x: Tensor) -> Tensor:
        return super().product(state[:, :128], x[:, :128])


class ValuesBeyond128(Seams):
    """value columns beyond the 128th take no value in"""

    def step(self, rows: Rows, row: int, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        v = rows.v.clone()
        v[..., 128:] = 0
        return super().step(Rows(rows.q, rows.k, v, rows.decay, rows.beta), row, t, state)


VALUE_FAULTS: dict[str, type[Seams]] = {
    "naive_softplus": NaiveSoftplus,
    "trunc": TruncatedOutput,
    "trunc_state": TruncatedState,
    "thr5": Threshold5,
    "relu": Relu,
    "no_threshold": IgnoredThreshold,
    "threshold_on_x": ThresholdOnX,
    "no_softplus_beta": IgnoredSoftplusBeta,
    "rate_overflows": RateOverflows,
    "eps1e-5": LargerEps,
    "eps_outside": EpsOutside,
    "eps_in_mean": EpsInMean,
    "no_l2q": QueryNotNormalised,
    "always_l2": AlwaysNormalised,
    "scale_before_norm": ScaleBeforeNorm,
    "no_scale": IgnoredScale,
    "no_bias_head0": NoBiasInHead0,
    "kda_gate_channel0": Gate0ForAll,
    "kda_gate_head0": GateOfHead0,
    "g_bf16": Bf16Gate,
    "x_bf16": Bf16GateInput,
    "A_log_bf16": Bf16Rate,
    "beta_bf16": Bf16Beta,
    "exp2": Exp2,
    "no_lower_bound": IgnoredLowerBound,
    "lower_bound_-5": LowerBoundMinus5,
    "no_neg_eigval": IgnoredNegEigval,
    "gqa_mod": HeadsModulo,
    "gate_after": GateAfter,
    "out_before": OutputBefore,
    "tf32": Tf32,
    "h_bf16": Bf16State,
    "qk_bf16": Bf16Keys,
    "out_fp16": Fp16Output,
    "last_head": LastHead,
    "beyond16": Beyond16Tokens,
    "keys_beyond128": KeysBeyond128,
    "values_beyond128": ValuesBeyond128,
}
