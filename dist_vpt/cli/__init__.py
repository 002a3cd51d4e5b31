"""The command dist-vpt: a file a command group."""
