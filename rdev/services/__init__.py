"""What rdev does, on trio and ports only. A file with `run` is a subsystem with one nursery."""
