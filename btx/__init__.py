"""btx turns one pretrained checkpoint and several domains into one Mixture-of-Experts checkpoint.

The method is Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816).
"""

__version__ = "0.1.0"
