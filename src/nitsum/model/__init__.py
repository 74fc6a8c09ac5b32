"""The decoder: config-driven layers over views of resident weights. Parallelism is an argument."""
