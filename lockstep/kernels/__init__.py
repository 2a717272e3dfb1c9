"""One file per operation: the torch version, which is the specification, beside the fast one."""
