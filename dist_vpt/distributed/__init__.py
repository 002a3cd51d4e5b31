"""The processes of one run: launch environment, collective calls, and an end for all where one fails."""
