"""A Llama and a GPT-2 of Hugging Face, run by overdrive's layers, and back again. Run it: `python examples/from_hugging_face.py`.

Both are drawn at random, so that nothing is downloaded. For trained ones, write `AutoModelForCausalLM.from_pretrained(name)`.
"""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import overdrive.pytorch as te
from overdrive.common.recipe import Float8CurrentScaling
from overdrive.models import build
from overdrive.models.hugging_face import load_weights, read_config, weights_of

device = "cuda" if torch.cuda.is_available() else "cpu"
sizes = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "Llama": LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, **sizes
    ),
    "GPT-2": GPT2Config(n_embd=256, n_layer=4, n_head=8, n_positions=512, **sizes),
}


@torch.no_grad()
def compare(name, config):
    """Print how far apart the logits are in every precision, and after the way back."""

    def report(what, model, expected):
        error = (model - expected).norm() / expected.norm()
        print(f"{name}, {what}: logits differ by {error.item():.1e}")

    tokens = torch.randint(config.vocab_size, (2, 128), device=device)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
    expected = theirs(tokens).logits

    for dtype in (torch.float32, torch.bfloat16):
        ours = build(read_config(config), device, dtype).eval()
        load_weights(ours, theirs.state_dict())
        report(f"{dtype}", ours(tokens), expected)
    with te.autocast(recipe=Float8CurrentScaling()):
        report("FP8", ours(tokens), expected)

    back = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
    back.load_state_dict(weights_of(ours))
    report("back in Hugging Face, torch.bfloat16", back(tokens).logits, expected)


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        compare(name, config)
