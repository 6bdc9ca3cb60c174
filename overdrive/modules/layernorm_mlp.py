"""`LayerNormMLP`: norm, fc1, activation, fc2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from overdrive.functional.activation import ActivationOptions
from overdrive.functional.layernorm_mlp import LayerNormMLPOptions, Residual, layernorm_mlp
from overdrive.functional.norm import NormOptions
from overdrive.functional.residual import dropout_seed
from overdrive.modules.base import Module, without_autocast
from overdrive.modules.checks import (
    NORMALIZATIONS,
    InitMethod,
    default_device,
    epsilon,
    normal_init,
    one_of,
    positive_int,
    refuse_parallelism,
)
from overdrive.modules.layernorm_linear import add_norm_parameters
from overdrive.modules.weight_grad import WeightGradStore
from overdrive.ops.activation import ACTIVATIONS
from overdrive.scaling.autocast import current_context

_ACTIVATION_PARAMS = ("limit", "alpha")


def activation_options(module: str, activation: str, params: dict[str, float] | None) -> ActivationOptions:
    """The activation by name; `params` sets clamped_swiglu's limit and alpha."""
    one_of(module, "activation", activation, ACTIVATIONS)
    params = {} if params is None else params
    if not isinstance(params, dict):
        raise TypeError(f"{module}: activation_params must be a dict with {_ACTIVATION_PARAMS}, got {params!r}")
    if params and activation != "clamped_swiglu":
        raise ValueError(f"{module}: activation_params serves activation='clamped_swiglu' only, got {params!r} for {activation!r}")
    for name, value in params.items():
        one_of(module, "activation_params", name, _ACTIVATION_PARAMS)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{module}: activation_params[{name!r}] must be a finite number, got {value!r}")
    if params.get("limit", 1) <= 0:
        raise ValueError(f"{module}: activation_params['limit'] must be above 0, got {params['limit']!r}")
    return ActivationOptions(activation, **{name: float(value) for name, value in params.items()})


class LayerNormMLP(Module):
    """y = act(norm(x) W1^T + b1) W2^T + b2, in FP8 inside an `autocast`.

    Parameters: layer_norm_weight and (LayerNorm only) layer_norm_bias [hidden]; fc1_weight [ffn, hidden], twice the rows for
    gated activations, the activated half first; fc1_bias; fc2_weight [hidden, ffn]; fc2_bias. init_method serves fc1,
    output_layer_init_method fc2, N(0, 0.023) by default. activation: a key of ops.activation.ACTIVATIONS; activation_params:
    {"limit", "alpha"} of clamped_swiglu. return_bias: return (y without fc2's bias, that bias). checkpoint: keep only x and
    recompute the rest in backward. seq_length, micro_batch_size: accepted, not needed. Arguments of parallelism raise
    NotImplementedError unless at their defaults.
    """

    layer_norm_weight: torch.nn.Parameter
    layer_norm_bias: torch.nn.Parameter | None
    fc1_weight: torch.nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        return_bias: bool = False,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: InitMethod | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        activation_params: dict[str, float] | None = None,
        output_layer_init_method: InitMethod | None = None,
        fuse_wgrad_accumulation: bool = False,
        params_dtype: torch.dtype | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        set_parallel_mode: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        ub_overlap_ag: bool = False,
        name: str | None = None,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(name)
        refuse_parallelism(
            self._label,
            {
                "sequence_parallel": sequence_parallel,
                "tp_group": tp_group,
                "tp_size": tp_size,
                "return_layernorm_output_gathered": return_layernorm_output_gathered,
                "ub_overlap_ag": ub_overlap_ag,
                "ub_overlap_rs": ub_overlap_rs,
                "ub_overlap_rs_dgrad": ub_overlap_rs_dgrad,
                "ub_bulk_dgrad": ub_bulk_dgrad,
                "ub_bulk_wgrad": ub_bulk_wgrad,
                "symmetric_ar_type": symmetric_ar_type,
            },
        )
        self.hidden_size = positive_int(self._label, "hidden_size", hidden_size)
        self.ffn_hidden_size = positive_int(self._label, "ffn_hidden_size", ffn_hidden_size)
        self.normalization = one_of(self._label, "normalization", normalization, NORMALIZATIONS)
        self.activation, self._activation = activation, activation_options(self._label, activation, activation_params)
        self.eps = epsilon(self._label, eps)
        self.use_bias, self.return_bias, self.return_layernorm_output = bias, return_bias, return_layernorm_output
        self.zero_centered_gamma, self.checkpoint = zero_centered_gamma, checkpoint
        self.set_parallel_mode = set_parallel_mode
        self._norm = NormOptions(self.eps, zero_centered_gamma, normalization == "RMSNorm")
        self._weight_grads = WeightGradStore(fuse_wgrad_accumulation, delay_wgrad_compute)
        device, dtype = default_device(device), params_dtype or torch.get_default_dtype()
        self._add_slots(2, device)
        add_norm_parameters(self, hidden_size, normalization, zero_centered_gamma, dtype, device)
        rows = ffn_hidden_size * (2 if self._activation.gated else 1)
        common = {"dtype": dtype, "device": device, "get_rng_state_tracker": get_rng_state_tracker}
        fc2_init = output_layer_init_method or normal_init
        self._add_linear("fc1_", rows, hidden_size, bias, init=init_method or normal_init, **common)
        self._add_linear("fc2_", hidden_size, ffn_hidden_size, bias, init=fc2_init, partition_dim=1, **common)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        """inp [..., hidden_size] -> out of the same shape, or a tuple (out[, bias][, norm output]). Arguments as Linear's."""
        return self._run(inp, is_first_microbatch)

    def forward_with_residual(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> tuple[Any, torch.Tensor]:
        """(what forward returns, inp): the gradient of the second joins that of the norm's input inside the norm's backward
        kernel.
        """
        return self._run(inp, is_first_microbatch, keep_residual=True)

    def forward_fused_residual(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        p_dropout: float,
        is_first_microbatch: bool | None = None,
    ) -> tuple[Any, torch.Tensor]:
        """(what forward returns for r, r), where r = residual + dropout(x + bias) comes out of the norm's own kernel."""
        seed = dropout_seed(p_dropout, x.device) if self.training else None
        front = Residual(residual, bias, p_dropout if seed is not None else 0.0, seed)
        return self._run(x, is_first_microbatch, front, keep_residual=True)

    def forward_between_residuals(
        self, x: torch.Tensor, residual: torch.Tensor, p_dropout: float = 0.0, is_first_microbatch: bool | None = None
    ) -> Any:
        """r + dropout(forward(r)), where r = residual + dropout(x): both sums in kernels that are there anyway, where those can."""
        p = p_dropout if self.training else 0.0
        front = Residual(residual, None, p, dropout_seed(p, x.device))
        return self._run(x, is_first_microbatch, front, add_input=True, output_seed=dropout_seed(p, x.device))

    def _run(
        self,
        inp: torch.Tensor,
        first: bool | None,
        front: Residual | None = None,
        keep_residual: bool = False,
        add_input: bool = False,
        output_seed: torch.Tensor | None = None,
    ) -> Any:
        dtype = self._check_input(inp, self.hidden_size, self.fc1_weight, "hidden_size")
        if self.checkpoint and torch.is_grad_enabled():
            arguments = (inp, first, front, keep_residual, add_input, output_seed, dtype)
            return torch_checkpoint(self._forward, *arguments, use_reentrant=False)
        return self._forward(inp, first, front, keep_residual, add_input, output_seed, dtype)

    def _forward(
        self,
        inp: torch.Tensor,
        first: bool | None,
        front: Residual | None,
        keep_residual: bool,
        add_input: bool,
        output_seed: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Any:
        context, training = current_context()
        with without_autocast(inp.device):
            weights1, weights2 = self._weights_of(0), self._weights_of(1)
            fc1 = self._parameters_of(0, weights1, True, dtype)
            fc2 = self._parameters_of(1, weights2, not self.return_bias, dtype)
            inp = inp if inp.dtype == dtype else inp.to(dtype)
            if front is not None and front.residual.dtype != dtype:
                front.residual = front.residual.to(dtype)
            gamma, beta = self.layer_norm_weight, self.layer_norm_bias
            rules = self._rules(context, training, inp.numel() // self.hidden_size, self.hidden_size, self.ffn_hidden_size)
            scales = self._scales(context)
            leaves = (inp, gamma, beta, *(() if front is None else (front.residual, front.bias)))
            into_norm = any(leaf is not None and leaf.requires_grad for leaf in leaves)
            options1 = self._gemm_options(0, rules, dtype, weights1, fc1.biases, into_norm, training, first)
            into_fc1 = options1.input_grad or options1.weight_grad or options1.bias_grad
            options2 = self._gemm_options(1, rules, dtype, weights2, fc2.biases, into_fc1, training, first)
            fc1.cached = self._cached_weight(0, fc1, options1, scales, first)
            fc2.cached = self._cached_weight(1, fc2, options2, scales, first)
            options = LayerNormMLPOptions(
                self._norm,
                self._activation,
                options1,
                options2,
                fc1.count,
                self.return_layernorm_output,
                keep_residual,
                add_input,
                front is not None,
                0.0 if front is None else front.p,
                front is not None and front.bias is not None and front.bias.requires_grad,
            )
            out, *rest = layernorm_mlp(inp, gamma, beta, fc1, fc2, scales, options, front, output_seed)
        outputs: list[torch.Tensor | None] = [out]
        if self.return_bias:
            outputs.append(self._whole_bias(1, dtype))
        if self.return_layernorm_output:
            outputs.append(rest[0])
        result = outputs[0] if len(outputs) == 1 else tuple(outputs)
        return (result, rest[-1]) if keep_residual else result

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, ffn_hidden_size={self.ffn_hidden_size}, eps={self.eps}, "
            f"normalization={self.normalization}, activation={self.activation}, bias={self.use_bias}, checkpoint={self.checkpoint}"
        )
