"""What is known of how training scales: laws of the best settings and of the loss, fits of both, FLOPs. No torch."""
