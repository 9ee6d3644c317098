"""Global rate limits: what callers of the whole mesh want is counted here and shared out between them. Started by `controller.server`."""
