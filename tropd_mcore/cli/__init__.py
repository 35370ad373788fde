"""The command `tropd`: one file a subcommand, each imported when it is called."""
