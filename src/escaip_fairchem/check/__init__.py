"""Launch checks: everything about a training that can be known before it waits in a queue."""
