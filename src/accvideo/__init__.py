"""Distill any flow-matching video diffusion pipeline into a few-step student (AccVideo, arXiv 2503.19462)."""

__version__ = "0.1.0"
