"""The command `tropd`: one file per subcommand. Each is imported when it is called."""
