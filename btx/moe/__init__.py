"""The life of a Mixture of Experts after its merge: `btx moe`."""
