"""Several processes of one run: their launcher, collective calls, and an end for all where one fails."""
