"""The `dlm` command: one file per subcommand, its flags beside its action."""
