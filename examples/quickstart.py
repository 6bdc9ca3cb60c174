"""A Transformer layer made faster in five steps, each a change of a few lines. Run it: `python examples/quickstart.py`.

`overdrive quickstart` measures the same steps side by side. Here they are, to read.
"""

import quickstart_utils as utils
import torch

import overdrive.pytorch as te
from overdrive.common.recipe import DelayedScaling, Format

# The last size is a real layer's; the first lets a CPU finish in seconds.
if torch.cuda.is_available():
    device, dtype, iterations = "cuda", torch.float16, 50
    hidden_size, ffn_hidden_size, num_attention_heads, sequence_length, batch_size = 4096, 16384, 32, 2048, 4
else:
    device, dtype, iterations = "cpu", torch.float32, 5
    hidden_size, ffn_hidden_size, num_attention_heads, sequence_length, batch_size = 128, 512, 4, 64, 2


# Step 1: plain PyTorch.
class BasicLayer(torch.nn.Module):
    """Pre-norm attention and MLP, with whatever Linear and LayerNorm it is given."""

    def __init__(self, linear=torch.nn.Linear, layer_norm=torch.nn.LayerNorm):
        super().__init__()
        self.ln1 = layer_norm(hidden_size)
        self.qkv_projection = linear(hidden_size, 3 * hidden_size)
        self.attention = utils.DotProductAttention(num_attention_heads, hidden_size // num_attention_heads, 0.1)
        self.projection = linear(hidden_size, hidden_size)
        self.dropout = torch.nn.Dropout(0.1)
        self.ln2 = layer_norm(hidden_size)
        self.mlp = utils.BasicMLP(hidden_size, ffn_hidden_size, linear)

    def forward(self, x, attention_mask=None):
        """[sequence, batch, hidden] in and out."""
        qkv = self.qkv_projection(self.ln1(x)).unflatten(-1, (num_attention_heads, -1))
        x = x + self.dropout(self.projection(self.attention(*qkv.chunk(3, dim=-1), attention_mask)))
        return x + self.mlp(self.ln2(x))


# Step 3: the norms join the linears that follow them, and the MLP becomes one module.
class FusedLayer(torch.nn.Module):
    """The same layer from LayerNormLinear and LayerNormMLP."""

    def __init__(self):
        super().__init__()
        self.ln_qkv = te.LayerNormLinear(hidden_size, 3 * hidden_size)
        self.attention = utils.DotProductAttention(num_attention_heads, hidden_size // num_attention_heads, 0.1)
        self.projection = te.Linear(hidden_size, hidden_size)
        self.dropout = torch.nn.Dropout(0.1)
        self.ln_mlp = te.LayerNormMLP(hidden_size, ffn_hidden_size)

    def forward(self, x, attention_mask=None):
        """[sequence, batch, hidden] in and out."""
        qkv = self.ln_qkv(x).unflatten(-1, (num_attention_heads, -1))
        x = x + self.dropout(self.projection(self.attention(*qkv.chunk(3, dim=-1), attention_mask)))
        return x + self.ln_mlp(x)


def main():
    """All five steps, timed."""
    torch.manual_seed(1234)
    x = torch.rand(sequence_length, batch_size, hidden_size, device=device, dtype=dtype)
    dy = torch.rand_like(x)

    def time(title, module, **kwargs):
        print(title, end=": ")
        utils.speedometer(module, x, dy, {"attention_mask": None}, timing_iters=iterations, warmup_iters=iterations, **kwargs)

    basic = BasicLayer().to(device=device, dtype=dtype)
    time("1. PyTorch", basic)

    # Step 2: only the classes change.
    basic_te = BasicLayer(te.Linear, te.LayerNorm).to(device=device, dtype=dtype)
    utils.share_parameters_with_basic_te_model(basic_te, basic)
    time("2. Linear and LayerNorm", basic_te)

    fused = FusedLayer().to(device=device, dtype=dtype)
    utils.share_parameters_with_fused_te_model(fused, basic)
    time("3. LayerNormLinear and LayerNormMLP", fused)

    # Step 4: the whole layer is one module.
    layer = te.TransformerLayer(
        hidden_size, ffn_hidden_size, num_attention_heads, self_attn_mask_type="no_mask", params_dtype=dtype, device=device
    )
    utils.share_parameters_with_transformerlayer_te_model(layer, basic)
    time("4. TransformerLayer", layer)

    # Step 5: FP8 inside the `autocast` region.
    recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, amax_compute_algo="max")
    time("5. TransformerLayer in FP8", layer, autocast_kwargs={"enabled": True, "recipe": recipe})


if __name__ == "__main__":
    main()
