"""lm-evaluation-harness: our models as its model type `dlm_jax`, and tasks of our own."""
