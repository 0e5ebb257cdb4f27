"""Task files of lm-evaluation-harness that read their documents from a folder of yours instead of the hub."""
