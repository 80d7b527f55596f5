"""The merge of a seed and its experts into one Mixture of Experts, and every kind of expert that it accepts."""
