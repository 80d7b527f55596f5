"""Expert kernels: one backend, one file, one function `experts`; never imports btx or transformers.

Axes: T tokens, K experts of a token, E experts, D width, F feed-forward width.
"""
