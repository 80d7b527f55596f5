"""Expert kernels: one backend, one file, one function `experts`; never imports btx or transformers.

Axes: T tokens, K experts per token, E experts, D hidden width, F feed-forward width.
"""
