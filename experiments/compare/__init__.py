"""Windtunnel next to other optimizers: same problems, budgets and first points, each rival in its own environment."""
