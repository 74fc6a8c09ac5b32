"""The real engine on a virtual clock, with workers whose steps last what a cost model says."""
