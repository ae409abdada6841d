"""What was asked and how far it got: jobs, shards and the tickets that wake workers."""
