"""Reinforcement learning with verifiable rewards: rewards, marks of difficulty, and trl's trainer."""
