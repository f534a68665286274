"""The command line `fastgen`: one file per command, each with `add_parser` and `run`."""
