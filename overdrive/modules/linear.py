"""`Linear`, drop-in for torch.nn.Linear."""

from __future__ import annotations

from typing import Any

import torch

from overdrive.functional.linear import LinearOptions, linear
from overdrive.modules.base import Module, without_autocast
from overdrive.modules.checks import (
    PARALLEL_MODES,
    InitMethod,
    default_device,
    normal_init,
    one_of,
    positive_int,
    refuse,
    refuse_parallelism,
    split_sizes,
)
from overdrive.modules.weight_grad import WeightGradStore
from overdrive.scaling.autocast import current_context


class Linear(Module):
    """y = x W^T + b, in FP8 inside an `autocast`.

    Parameters: weight [out_features, in_features] ~ init_method (N(0, 0.023)), bias [out_features] zero; with
    `parameters_split` (names for equal parts, or a dict of name -> rows) `<name>_weight` and `<name>_bias` instead.
    return_bias: return (y without bias, bias). fuse_wgrad_accumulation: add weight gradients into `weight.main_grad`.
    delay_wgrad_compute: compute them in `backward_dw()`. save_original_input: keep the input itself for backward, for when
    something else keeps it too. device: the GPU where there is one, else the CPU. Arguments of parallelism raise
    NotImplementedError unless at their defaults; unknown modes, bad sizes ValueError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str | None = None,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        refuse_parallelism(
            self._label,
            {
                "sequence_parallel": sequence_parallel,
                "tp_group": tp_group,
                "tp_size": tp_size,
                "ub_overlap_ag": ub_overlap_ag,
                "ub_overlap_rs": ub_overlap_rs,
                "ub_overlap_rs_dgrad": ub_overlap_rs_dgrad,
                "ub_bulk_dgrad": ub_bulk_dgrad,
                "ub_bulk_wgrad": ub_bulk_wgrad,
                "ub_name": ub_name,
                "symmetric_ar_type": symmetric_ar_type,
            },
        )
        refuse(self._label, {"rng_tracker_name": (rng_tracker_name, None)})
        self.parallel_mode = one_of(self._label, "parallel_mode", parallel_mode, PARALLEL_MODES)
        self.in_features = positive_int(self._label, "in_features", in_features)
        self.out_features = positive_int(self._label, "out_features", out_features)
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = save_original_input
        self._weight_grads = WeightGradStore(fuse_wgrad_accumulation, delay_wgrad_compute)
        device = default_device(device)
        self._add_slots(1, device)
        self._add_linear(
            "",
            out_features,
            in_features,
            bias,
            dtype=params_dtype or torch.get_default_dtype(),
            device=device,
            init=init_method or normal_init,
            sizes=split_sizes(self._label, parameters_split, out_features),
            get_rng_state_tracker=get_rng_state_tracker,
            partition_dim=1 if parallel_mode == "row" else 0,
        )

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Any:
        """inp [..., in_features] -> out [..., out_features], or (out, bias) with return_bias.

        is_first_microbatch: None quantizes the weight at each call, True also keeps it, False uses the kept one. fp8_output:
        return a Float8Tensor when running in FP8. ValueError for a wrong last dimension or device, TypeError for a wrong
        dtype.
        """
        refuse(self._label, {"fp8_grad": (fp8_grad, False)}, "gradients between layers stay in high precision")
        weights = self._weights_of(0)
        dtype = self._check_input(inp, self.in_features, weights[0], "in_features")
        context, training = current_context()
        with without_autocast(inp.device):
            parameters = self._parameters_of(0, weights, not self.return_bias, dtype)
            inp = inp if inp.dtype == dtype else inp.to(dtype)
            rules = self._rules(context, training, inp.numel() // self.in_features, self.in_features, self.out_features)
            scales = self._scales(context)
            gemm = self._gemm_options(0, rules, dtype, weights, parameters.biases, inp.requires_grad, training, is_first_microbatch)
            parameters.cached = self._cached_weight(0, parameters, gemm, scales, is_first_microbatch)
            out = linear(inp, parameters, scales, LinearOptions(gemm, training, self.save_original_input, fp8_output))
        return (out, self._whole_bias(0, dtype)) if self.return_bias else out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}"
