"""The merge: one Mixture of Experts out of a seed and its experts, and every kind of expert that may come in."""
