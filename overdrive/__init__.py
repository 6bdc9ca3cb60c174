"""overdrive: Transformer layers in FP8, a drop-in for NVIDIA Transformer Engine in pure Python and Triton."""

__version__ = "0.1.0"
