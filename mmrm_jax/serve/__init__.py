"""`mmrm serve`: rewards over HTTP, batched onto the compiled shapes of `mmrm_jax.load`."""
