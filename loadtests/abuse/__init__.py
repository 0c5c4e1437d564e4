"""What no client should do to a service, done to it for a while beside what clients do."""
