"""A Kubernetes API server as the source of objects: `source` holds what is in force, `reflector` follows one kind, `shapes` says what is read of it."""
